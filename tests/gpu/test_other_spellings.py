"""Attention that is not spelled as SDPA, on a GPU: packed sequences by PyTorch's own kernel, and written-out calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.conftest import compiled, select_everything

pytestmark = pytest.mark.gpu

TOKENS, HEADS, DIM = 3000, 8, 64


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (255, 0)], ids=["all", "causal", "window"])
@torch.no_grad()
def test_packed_sequences_are_what_torchs_kernel_computes(window: tuple[int, int]) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    starts = torch.tensor([0, 700, 701, 2200, TOKENS], dtype=torch.int32, device="cuda")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, TOKENS, HEADS, DIM, dtype=torch.bfloat16, device="cuda")

    def call(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        if window == (-1, -1):
            return varlen.varlen_attn(q, k, v, starts, starts, 1499, 1499)
        return varlen.varlen_attn(q, k, v, starts, starts, 1499, 1499, window_size=window)

    try:
        expected = call(q, k, v, starts)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"this PyTorch's varlen_attn does not take it: {error}")
    found = compiled(call, change=True, call=select_everything)
    out = found.call(q, k, v, starts)
    assert found.site.attn_mask is not None
    assert difference(out, expected) < 0.02


@pytest.mark.parametrize("kind", ["softcap", "sinks"])
@torch.no_grad()
def test_written_out_attention(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, 1000, DIM, dtype=torch.bfloat16, device="cuda")
    sinks = torch.randn(HEADS, device="cuda", dtype=torch.bfloat16)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5
        hidden = torch.ones(1000, 1000, dtype=torch.bool, device="cuda").triu(1)
        if kind == "softcap":
            scores = torch.tanh(scores / 2.0) * 2.0
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        if kind == "softcap":
            return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(2, -1, 1000, -1)], dim=-1)
        return scores.softmax(-1)[..., :-1] @ v

    found = compiled(call, change=True, call=select_everything)
    out = found.call(q, k, v, sinks)
    assert (found.site.softcap > 0, found.site.sinks is not None) == (kind == "softcap", kind == "sinks")
    assert difference(out, call(*(x.float() for x in (q, k, v, sinks)))) < 0.02
