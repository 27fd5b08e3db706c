"""A causal MASK with a scale of 0 or less: PyTorch's CPU kernels return NaN for ``is_causal=True`` there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import afbs_compile
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.op import arguments_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.attention import masked_attention
from afbs_compile.kernels.spec.selection import live_blocks
from afbs_compile.tuner import site as tuner_site
from tests.toy import HEAD_DIM, HEADS, drifting

LENGTH = 512
SCALES = [-0.5, 0.0]


def lower_triangle(length: int) -> Tensor:
    places = torch.arange(length)
    return places <= places[:, None]


class Masked(nn.Module):
    """Attention under a dense causal mask, on contiguous operands: the kernel for others has no NaN."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2).contiguous()
        mask = lower_triangle(x.shape[1])
        return F.scaled_dot_product_attention(3 * q, -3 * q, q, attn_mask=mask, scale=self.scale)


def exactly(operands: Operands) -> Tensor:
    """Dense attention in float64, by its formula."""
    q, k, v = (x.double() for x in (operands.q, operands.k, operands.v))
    scores = (q @ k.mT * operands.scale).masked_fill(~lower_triangle(operands.q_len), -torch.inf)
    return scores.softmax(-1) @ v


@pytest.fixture(params=SCALES)
def operands(request) -> Operands:
    q = drifting(LENGTH).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2).contiguous()
    return Operands(3 * q, -3 * q, q, Causal(), request.param)


def by_the_operator(operands: Operands, call: SparseCall) -> Tensor:
    arguments = arguments_of(call, operands.mask, operands.scale)
    return torch.ops.afbs.sparse_attention(operands.q, operands.k, operands.v, **arguments)


@pytest.mark.parametrize("call", [{"tau": KEEP_ALL}, {"tau": 0.3, "min_length": LENGTH + 1}], ids=["DENSE", "short"])
def test_the_operators_dense_path_equals_float64(operands, call):
    out = by_the_operator(operands, SparseCall.uniform(HEADS, **call))
    torch.testing.assert_close(out.double(), exactly(operands), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", ["meansim", "meanshare", "cumulant"])
def test_the_operators_sparse_path_equals_float64(operands, policy):
    call = SparseCall.uniform(HEADS, 0.5, policy=policy)
    live = live_blocks(operands, call)
    exact = replace(operands, q=operands.q.double(), k=operands.k.double(), v=operands.v.double())
    out = by_the_operator(operands, call)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), masked_attention(exact, live, call.lam, call.shape), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo", "sparse_is_faster")
@pytest.mark.parametrize("outcome", ["dense", "sparse"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.slow
def test_the_compiled_model_is_finite_and_right(monkeypatch, scale, outcome):
    if outcome == "dense":
        slow = tuner_site.SiteSpeed(1.0, 1.1, None)
        monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(lambda *_, **__: slow))
    model, x = Masked(scale).eval(), drifting(LENGTH)
    tolerance = 0.2 if scale else 0.9  # all keys count alike with a scale of 0: there is little to skip
    sparse = torch.compile(model, backend="afbs", fullgraph=True, options={"min_length": 128, "tolerance": tolerance})
    out = sparse(x)
    assert out.isfinite().all()
    q = x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2).contiguous()
    expected = exactly(Operands(3 * q, -3 * q, q, Causal(), scale))
    difference = float((out - expected).abs().sum() / expected.abs().sum())
    (row,) = afbs_compile.explain(sparse).rows
    assert row.outcome == outcome
    assert difference <= (1e-5 if outcome == "dense" else tolerance)
