"""The pass on a GPU against the pass in PyTorch, in float64 where the engine's own rounding allows."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.measure.one_pass import PassPlan, one_pass
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import UNNAMED

pytestmark = pytest.mark.gpu

TAUS = torch.tensor([0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995])


def operands(heads: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype, mask: str = "causal") -> Operands:
    generator = torch.Generator().manual_seed(length)
    path = torch.randn(kv_heads, length // 50 + 2, dim, generator=generator)
    path = torch.nn.functional.interpolate(path.transpose(1, 2), length, mode="linear").transpose(1, 2)
    k = path + 0.3 * torch.randn(kv_heads, length, dim, generator=generator)
    q = k.repeat_interleave(heads // kv_heads, 0) * torch.linspace(0.5, 3.0, heads).view(-1, 1, 1)
    v = path + torch.randn(kv_heads, length, dim, generator=generator)
    return Operands(*(x[None].to("cuda", dtype) for x in (q, k, v)), mask_of(mask), dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 2048, 64), (2, 2, 1999, 128), (2, 1, 700, 40)], ids=str)
def test_it_equals_the_operator_at_every_threshold(shape, blocks, mask, dtype):
    call = operands(*shape, dtype, mask)
    heads, dense = shape[0], dense_attention(call)
    tau, theta = TAUS.expand(heads, -1).contiguous(), torch.full((heads,), -1.0)
    sums = one_pass(call, dense, tau, theta, PassPlan(UNNAMED, BlockShape(*blocks)))
    dense = dense[0].float()
    for column, threshold in enumerate(TAUS.tolist()):
        out, counts = run(call, SparseCall.uniform(heads, threshold, shape=BlockShape(*blocks)))
        error = (out[0].float() - dense).abs().sum((1, 2)) / dense.abs().sum((1, 2))
        found = sums.difference[..., column].sum(-1) / sums.magnitude.sum(-1)
        # A block whose mass lies within rounding of tau may be live on one side only.
        assert (sums.live[..., column] != counts[0]).float().mean() < 0.01
        torch.testing.assert_close(found, error, rtol=0.02, atol=2e-3 if dtype != torch.float32 else 2e-4)


def test_sampled_rows_measure_what_all_rows_measure():
    call = operands(4, 4, 4096, 64, torch.bfloat16)
    tau, theta = TAUS.expand(4, -1).contiguous(), torch.full((4,), 0.4)
    rows = tuple(range(3, 64, 7))
    plans = [PassPlan(UNNAMED, BlockShape(64, 64), rows=some) for some in (None, rows)]
    whole, part = (one_pass(call, dense_attention(call), tau, theta, plan) for plan in plans)
    assert torch.equal(part.live, whole.live[:, list(rows)])
    torch.testing.assert_close(part.difference, whole.difference[:, list(rows)])
