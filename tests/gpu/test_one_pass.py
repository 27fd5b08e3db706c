"""The pass on a GPU against the pass in PyTorch, in float64 where the engine's own rounding allows."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.kernels import one_pass
from afbs_compile.kernels.op import sparse_attention_with_counts

pytestmark = pytest.mark.gpu

TAUS = torch.tensor([0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995])


def operands(heads: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(length)
    path = torch.randn(kv_heads, length // 50 + 2, dim, generator=generator)
    path = torch.nn.functional.interpolate(path.transpose(1, 2), length, mode="linear").transpose(1, 2)
    k = path + 0.3 * torch.randn(kv_heads, length, dim, generator=generator)
    q = k.repeat_interleave(heads // kv_heads, 0) * torch.linspace(0.5, 3.0, heads).view(-1, 1, 1)
    v = path + torch.randn(kv_heads, length, dim, generator=generator)
    return [x.to("cuda", dtype) for x in (q, k, v)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 2048, 64), (2, 2, 1999, 128), (2, 1, 700, 40)], ids=str)
def test_it_equals_the_operator_at_every_threshold(shape, blocks, causal, dtype):
    q, k, v = operands(*shape, dtype)
    heads = shape[0]
    batch = (x[None] for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*batch, is_causal=causal, enable_gqa=True)[0]
    call = {"causal": causal, "block_q": blocks[0], "block_k": blocks[1]}
    sums = one_pass.one_pass(q, k, v, dense, TAUS.expand(heads, -1).contiguous(), torch.full((heads,), -1.0), **call)
    for column, tau in enumerate(TAUS.tolist()):
        constants = [tau] * heads, [-1.0] * heads, [-1000.0] * heads
        out, counts = sparse_attention_with_counts(q[None], k[None], v[None], *constants, **call)
        error = (out[0].float() - dense.float()).abs().sum((1, 2)) / dense.float().abs().sum((1, 2))
        found = sums.difference[..., column].sum(-1) / sums.magnitude.sum(-1)
        # A block whose mass lies within rounding of tau may be live on one side only.
        assert (sums.live[..., column] != counts[0]).float().mean() < 0.01
        torch.testing.assert_close(found, error, rtol=0.02, atol=2e-3 if dtype != torch.float32 else 2e-4)


def test_sampled_rows_measure_what_all_rows_measure():
    q, k, v = operands(4, 4, 4096, 64, torch.bfloat16)
    dense = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    tau, theta = TAUS.expand(4, -1).contiguous(), torch.full((4,), 0.4)
    rows = tuple(range(3, 64, 7))
    whole = one_pass.one_pass(q, k, v, dense, tau, theta, causal=True)
    part = one_pass.one_pass(q, k, v, dense, tau, theta, rows=rows, causal=True)
    assert torch.equal(part.live, whole.live[:, list(rows)])
    torch.testing.assert_close(part.difference, whole.difference[:, list(rows)])
