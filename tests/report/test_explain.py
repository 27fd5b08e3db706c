"""The kernel of every call: in the recipe, in the table of a compiled model, in what ``inspect`` prints."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import afbs_compile
from afbs_compile.cli.main import main
from afbs_compile.found import FoundGraph
from afbs_compile.kernels.attend import engines
from afbs_compile.kernels.attend.hopper.engine import Hopper
from afbs_compile.kernels.attend.portable.engine import Portable
from afbs_compile.recipe import Recipe
from afbs_compile.report.explain import Explanation
from afbs_compile.tuner.speed import SiteSpeed
from tests.toy import Toy, drifting

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "sparse_is_faster")

LENGTH = 512
REASON = "head_dim is 32; accepted: (64, 128)"


@pytest.fixture
def elsewhere(monkeypatch):
    """Reports see a GPU whose portable kernel serves; what runs is not touched."""

    def patch():
        monkeypatch.setattr(engines, "engine_of", lambda *_: (Portable(), [(Hopper(), REASON)]))
        monkeypatch.setattr(Portable, "layout", lambda *_: "portable 64x64 tiles, 4 warps, 2 stages")

    return patch


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_a_compiled_models_rows_name_the_kernel_that_serves_now(dynamic, elsewhere):
    sparse = torch.compile(Toy().eval(), backend="afbs", dynamic=dynamic, options={"min_length": 128})
    sparse(drifting(LENGTH))
    explanation = afbs_compile.explain(sparse)
    assert [row.kernel for row in explanation.rows] == ["flex 64x64 tiles"] * 2
    assert [record["kernel_reason"] for record in explanation.to_records()] == [None, None]
    assert explanation.notes[1:] == ("sparse calls run on flex 64x64 tiles",)
    elsewhere()
    explanation = afbs_compile.explain(sparse)
    assert {row.kernel for row in explanation.rows} == {"portable 64x64 tiles, 4 warps, 2 stages"}
    assert {row.kernel_reason for row in explanation.rows} == {f"not the Hopper kernel: {REASON}"}
    line = f"2 calls on portable 64x64 tiles, 4 warps, 2 stages: not the Hopper kernel: {REASON}"
    assert explanation.notes[1:] == (line,)
    if dynamic:
        sparse(drifting(LENGTH + 100))
        assert len(afbs_compile.explain(sparse).after) == 1, "reading the sizes added a guard"


@torch.no_grad()
def test_a_recipe_keeps_the_kernel_that_was_timed(elsewhere, tmp_path, capsys):
    elsewhere()
    recipe = afbs_compile.calibrate(Toy().eval(), [drifting(LENGTH)], min_length=128)
    recipe.save(tmp_path / "r.json")
    kernel, reason = "portable 64x64 tiles, 4 warps, 2 stages", f"not the Hopper kernel: {REASON}"
    assert Recipe.load(tmp_path / "r.json") == recipe
    assert {(head["kernel"], head["kernel_reason"]) for head in recipe.to_records()} == {(kernel, reason)}
    assert {(row.kernel, row.kernel_reason) for row in afbs_compile.explain(recipe).rows} == {(kernel, reason)}
    assert main(["inspect", str(tmp_path / "r.json")]) == 0
    assert f"{kernel}: 2 calls ({reason})" in capsys.readouterr().out
    assert main(["inspect", "--json", str(tmp_path / "r.json")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {(site["kernel"], site["kernel_reason"]) for site in told["sites"]} == {(kernel, reason)}


@torch.no_grad()
def test_a_call_that_stays_dense_has_its_kernel_in_brackets(monkeypatch):
    monkeypatch.setattr(SiteSpeed, "measure", staticmethod(lambda *_, **__: SiteSpeed(1.0, 2.0, None)))
    recipe = afbs_compile.calibrate(Toy().eval(), [drifting(LENGTH)], min_length=128)
    explanation = afbs_compile.explain(recipe)
    assert [(row.outcome, row.kernel) for row in explanation.rows] == [("dense", "flex 64x64 tiles")] * 2
    assert len(explanation.notes) == 1
    one, other = explanation.rows
    table = Explanation((one, replace(other, outcome="sparse", kernel="flex 128x64 tiles")), ())
    for text in (str(table), table._repr_html_()):
        assert "(flex 64x64 tiles)" in text
        assert "flex 128x64 tiles" in text
        assert "(flex 128x64 tiles)" not in text


@torch.no_grad()
def test_columns_in_which_all_rows_say_the_same_are_left_out():
    recipe = afbs_compile.calibrate(Toy().eval(), [drifting(LENGTH)], min_length=128)
    explanation = afbs_compile.explain(recipe)
    for text in (str(explanation), explanation._repr_html_()):
        assert "kernel" not in text
        assert "graph" not in text
    one, other = explanation.rows
    several = Explanation((one, replace(other, graph=1)), ())
    assert "<th>graph</th><th>site</th>" in several._repr_html_()
    assert "<td>1</td><td>" in several._repr_html_()


@torch.no_grad()
def test_where_no_head_is_sparse_no_kernel_is_named():
    recipe = afbs_compile.calibrate(Toy().eval(), [drifting(LENGTH)], min_length=128, tolerance=1e-9)
    assert [(row.outcome, row.kernel) for row in afbs_compile.explain(recipe).rows] == [("dense", None)] * 2


class Sliced(nn.Module):
    """Queries from the middle of wider rows, one key head for all of them."""

    def forward(self, x):
        q = x[:, :, :, 1:33]
        k = x[:, :1, :, 32:].expand(-1, 4, -1, -1)
        return F.scaled_dot_product_attention(q, k, k, is_causal=True)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_operands_lie_as_in_the_call(dynamic):
    graphs = []
    model = torch.compile(Sliced(), backend=lambda gm, inputs: graphs.append((gm, inputs)) or gm, dynamic=dynamic)
    model(torch.randn(2, 4, 100, 64))
    (site,) = FoundGraph.of(*graphs[0], 1).sites
    operands = site.shapes().operands()
    q, k, v = operands.q, operands.k, operands.v
    assert (q.shape, q.stride(), q.storage_offset()) == ((2, 4, 100, 32), (25600, 6400, 64, 1), 1)
    assert k.stride()[2:] == (64, 1)
    assert v.storage_offset() == 32
    assert {type(size) for x in (q, k, v) for size in (*x.shape, *x.stride())} == {int}
