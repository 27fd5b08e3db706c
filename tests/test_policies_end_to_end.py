"""A recipe whose heads name policies runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import afbs_compile
from afbs_compile.errors import RecipeError
from afbs_compile.kernels.call import LAMBDA_OFF, THETA_OFF
from tests.toy import Toy, drifting

LENGTH = 1024
NAMES = ("cumulant", "meanshare", "sink_window", "meansim")
TAU = (0.95, 0.93, 0.1, 0.7)
THETA, LAM = (THETA_OFF,) * 4, (LAMBDA_OFF,) * 4


@pytest.fixture
def recipe(fresh_dynamo, sparse_is_faster):
    calibrated = afbs_compile.calibrate(Toy().eval(), [drifting(LENGTH)], min_length=128)
    sites = [
        replace(
            site,
            outcome="sparse",
            call=replace(site.calibrated, tau=TAU, theta=THETA, lam=LAM, policy=NAMES, min_length=0),
            heads=tuple(replace(head, outcome="sparse") for head in site.heads),
        )
        for site in calibrated.sites
    ]
    (graph,) = calibrated.graphs
    return replace(calibrated, graphs=(replace(graph, sites=tuple(sites)),))


@torch.no_grad()
def test_policies_of_a_recipe_stand_in_the_graph_and_run(recipe, tmp_path, monkeypatch):
    x = drifting(LENGTH)
    recipe.save(tmp_path / "toy.json")
    sparse = torch.compile(
        Toy().eval(), backend="afbs", fullgraph=True, options={"min_length": 128, "recipe": tmp_path / "toy.json"}
    )
    out = sparse(x)
    assert str(list(NAMES)).replace('"', "'") in afbs_compile.explain(sparse).after[0].replace('"', "'")

    def by_hand(q, k, v, is_causal):
        constants = (TAU, THETA, LAM, "causal" if is_causal else "full")
        return torch.ops.afbs.sparse_attention(q, k, v, *constants, policy=NAMES, last_rows=64, local_keys=128)

    dense = Toy().eval()(x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand)
    torch.testing.assert_close(out, Toy().eval()(x))
    assert not torch.equal(out, dense)


def test_an_unknown_policy_is_refused(recipe, tmp_path):
    recipe.save(tmp_path / "toy.json")
    text = (tmp_path / "toy.json").read_text()
    (tmp_path / "toy.json").write_text(text.replace('"sink_window"', '"median"'))
    with pytest.raises(RecipeError, match="policy is 'median'; accepted: meansim"):
        afbs_compile.Recipe.load(tmp_path / "toy.json")
