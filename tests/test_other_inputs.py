"""Lengths that were not validated, and what the validation promises, through the backend and ``explain``."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import afbs_compile
from afbs_compile import backend
from tests.toy import Toy, drifting

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "sparse_is_faster")

LENGTH = 1024
OPTIONS = {"min_length": 128}


@pytest.fixture
def calibrations(monkeypatch):
    """How often the backend calibrated."""
    made = []
    original = backend.calibrate_graph
    monkeypatch.setattr(backend, "calibrate_graph", lambda *args: made.append(1) or original(*args))
    return made


def relative_l1(a, b):
    return float((a - b).abs().sum() / b.abs().sum())


@torch.no_grad()
@pytest.mark.parametrize("outside", ["extrapolate", "dense", "recalibrate"])
def test_a_length_that_was_not_validated_obeys_the_user(outside, calibrations):
    model, x = Toy().eval(), drifting(2 * LENGTH, seed=1)
    sparse = torch.compile(model, backend="afbs", dynamic=False, options={**OPTIONS, "outside": outside})
    sparse(drifting(LENGTH))
    y = sparse(x)
    rows = [row for row in afbs_compile.explain(sparse).rows if row.graph == 1]
    if outside == "dense":
        assert torch.allclose(y, model(x), atol=1e-5)
        sentence = r"outside the validated lengths: 2048 tokens, validated from \d+ to 1024"
        assert all(re.fullmatch(sentence, row.reason) for row in rows)
    else:
        assert {row.outcome for row in rows} == {"sparse"}
        assert relative_l1(y, model(x)) <= 0.1
    assert len(calibrations) == (2 if outside == "recalibrate" else 1)


@torch.no_grad()
def test_a_graph_for_all_lengths_runs_dense_outside_the_validated_ones():
    model = Toy().eval()
    sparse = torch.compile(model, backend="afbs", dynamic=True, options={**OPTIONS, "outside": "dense"})
    inside = drifting(LENGTH)
    assert relative_l1(sparse(inside), model(inside)) <= 0.055
    assert not torch.allclose(sparse(inside), model(inside), atol=1e-5)
    beyond = drifting(LENGTH + 200)
    assert torch.allclose(sparse(beyond), model(beyond), atol=1e-5)
    assert "max_length = 1024" in afbs_compile.explain(sparse).after[0]


@torch.no_grad()
def test_tau_rises_at_a_length_at_which_the_error_is_known_to_grow():
    model = Toy().eval()
    recipe = afbs_compile.calibrate(model, [drifting(LENGTH)], min_length=128)

    def growing(site):
        heads = tuple(replace(head, tau_exponent=1.0, length_exponent=1.0) for head in site.heads)
        return replace(site, heads=heads)

    graphs = tuple(replace(g, sites=tuple(map(growing, g.sites))) for g in recipe.graphs)
    recipe = replace(recipe, graphs=graphs)
    sparse = torch.compile(model, backend="afbs", dynamic=False, options={**OPTIONS, "recipe": recipe})
    sparse(drifting(2 * LENGTH))
    head = recipe.sites[0].heads[0]
    assert head.error > 0.055 / 2, "twice its error is more than the tolerance"
    tau = 1 - (1 - recipe.sites[0].calibrated.tau[0]) * 0.055 / (2 * head.error)
    assert f"{tau:.6g}" in afbs_compile.explain(sparse).after[0]


def test_explain_prints_what_the_validation_promises():
    model = Toy().eval()
    one = afbs_compile.calibrate(model, [drifting(512)], min_length=128)
    assert "one sample promises nothing about other inputs" in flat(afbs_compile.explain(one))
    several = afbs_compile.calibrate(model, [drifting(512, seed=seed) for seed in range(30)], min_length=128)
    promise = several.graphs[0].promise
    assert (promise.inputs, promise.confidence) == (29, 0.95)
    assert promise.head_bound == pytest.approx(1 - 0.05 ** (1 / 29), abs=1e-6)
    assert "at most 10 % of such inputs, confidence 95 %, n = 29" in flat(afbs_compile.explain(several))


def flat(explanation) -> str:
    return " ".join(str(explanation).split())
