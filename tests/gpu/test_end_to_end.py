"""The backend on a real GPU: calibrated, rewritten, compiled, and honest about causality."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import afbs_compile
from afbs_compile.backend import afbs
from afbs_compile.kernels.attend.engines import kernel_of
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.operands import Operands
from afbs_compile.tuner import site as tuner_site
from tests.toy import Toy, drifting

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo", "sparse_is_faster")]

LENGTH = 4096


def relative_l1(a, b):
    return float((a.float() - b.float()).abs().sum() / b.float().abs().sum())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_is_rewritten_and_close_to_dense(dtype):
    model, x = Toy().eval().to("cuda", dtype), drifting(LENGTH).to("cuda", dtype)
    sparse = torch.compile(model, backend=afbs, fullgraph=True)
    out = sparse(x)
    rows = afbs_compile.explain(sparse).rows
    assert [row.outcome for row in rows] == ["sparse", "sparse"]
    assert all(0 < row.error <= 0.055 and row.sparsity > 0.3 for row in rows)
    assert relative_l1(out, model(x)) <= 0.055


@torch.no_grad()
def test_cuda_graphs_replay_it():
    model = Toy().eval().to("cuda", torch.bfloat16)
    sparse = torch.compile(model, backend=afbs, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        x = drifting(LENGTH, seed=seed).to("cuda", torch.bfloat16)
        assert relative_l1(sparse(x).clone(), model(x)) <= 0.08


@torch.no_grad()
def test_later_tokens_change_nothing_in_earlier_query_blocks():
    model, x = Toy().eval().to("cuda", torch.bfloat16), drifting(LENGTH).to("cuda", torch.bfloat16)
    sparse = torch.compile(model, backend=afbs, fullgraph=True)
    before = sparse(x).clone()
    changed = x.clone()
    changed[:, 2048:] = drifting(LENGTH, seed=9)[:, 2048:].to(x)
    assert torch.equal(sparse(changed)[:, :2048], before[:, :2048])


@torch.no_grad()
def test_the_stop_watch_decides_for_itself(monkeypatch):
    monkeypatch.undo()
    model, x = Toy().eval().to("cuda", torch.bfloat16), drifting(LENGTH).to("cuda", torch.bfloat16)
    recipe = afbs_compile.calibrate(model, [x])
    for site in recipe.sites:
        worthwhile = site.sparse_ms <= 0.97 * site.dense_ms
        assert (site.outcome == "sparse") == worthwhile
        assert (site.reason is None) == worthwhile


class Masked(nn.Module):
    """Attention under a dense causal mask, as transformers makes it."""

    def forward(self, q, k, v):
        places = torch.arange(q.shape[2], device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(places <= places[:, None])[None, None])


@torch.no_grad()
def test_a_call_that_stays_dense_runs_without_its_causal_mask(monkeypatch):
    slow = tuner_site.SiteSpeed(1.0, 1.1, None)
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(lambda *_, **__: slow))
    q, k, v = (torch.randn(2, 4, 1500, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    sparse = torch.compile(Masked(), backend=afbs, fullgraph=True)
    out = sparse(q, k, v)
    (row,) = afbs_compile.explain(sparse).rows
    assert row.outcome == "dense"
    assert (row.reason or "").endswith("; stays dense; mask dropped: causal")
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert float((out - exact).abs().max()) < 3e-2
    changed = v.clone()
    changed[:, :, 1000:] = 100.0
    assert torch.equal(sparse(q, k, changed)[:, :, :1000], out[:, :, :1000]), "later tokens are read"


@torch.no_grad()
@pytest.mark.parametrize(("dim", "kernel"), [(64, "hopper"), (32, "portable")])
def test_the_kernel_that_is_told_is_one_of_this_gpu(dim, kernel):
    q, k, v = (torch.randn(1, 2, 2048, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = kernel if torch.cuda.get_device_capability()[0] == 9 else "portable"
    operands = Operands(q, k, v, Causal(), dim**-0.5)
    told = kernel_of(operands, SparseCall.uniform(2, 0.5, shape=BlockShape(128, 128)))
    assert told.name.startswith(f"{expected} 128x128" if expected == "hopper" else "portable ")
    assert (told.reason is None) == (expected == "hopper")
