"""The backend on a real GPU: calibrated, rewritten, compiled, and honest about causality."""

from __future__ import annotations

import pytest
import torch

import afbs_compile
from afbs_compile.backend import afbs
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
