"""Weights that are written into after compilation: noticed, checked, said once."""

from __future__ import annotations

import warnings

import pytest
import torch

import afbs_compile
from afbs_compile.errors import AfbsWarning
from tests.toy import Toy, drifting, without_a_clock

LENGTH = 512


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, fresh_dynamo):
    without_a_clock(monkeypatch)


def compiled(model):
    return torch.compile(model, backend="afbs", options={"min_length": 128})


def outcomes(model):
    return {row.outcome for row in afbs_compile.explain(model).rows}


@torch.no_grad()
def test_the_same_values_once_more_change_nothing():
    model, x = Toy().eval(), drifting(LENGTH)
    sparse = compiled(model)
    before = sparse(x)
    model.load_state_dict(Toy().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)
        assert torch.equal(sparse(x), before)
    assert outcomes(sparse) == {"sparse"}


@torch.no_grad()
def test_a_small_step_is_checked_said_once_and_used():
    model, x = Toy().eval(), drifting(LENGTH)
    sparse = compiled(model)
    sparse(x)
    for layer in model.layers:
        layer.out.weight.add_(1e-4 * torch.randn_like(layer.out.weight))
    with pytest.warns(AfbsWarning, match="the recipe of this graph was made for a model that differs: its weights"):
        found = sparse(x)
    torch.testing.assert_close(found, model(x), rtol=0.1, atol=0.05)
    assert outcomes(sparse) == {"sparse"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)
        sparse(x)


@torch.no_grad()
def test_heads_that_no_longer_hold_are_dense_at_once():
    model, x = Toy().eval(), drifting(LENGTH)
    sparse = compiled(model)
    sparse(x)
    for layer in model.layers:
        layer.sharpness.mul_(0.02)
    with pytest.warns(AfbsWarning, match="hold; the others are dense"):
        found = sparse(x)
    assert (found - model(x)).norm() < 0.02 * model(x).norm()
    assert any(row.dense_heads for row in afbs_compile.explain(sparse).rows)


@torch.no_grad()
def test_the_weights_of_another_model_run_dense():
    model, x = Toy().eval(), drifting(LENGTH)
    sparse = compiled(model)
    sparse(x)
    model.load_state_dict(Toy(seed=9).state_dict())
    with pytest.warns(AfbsWarning, match="the weights changed, and the recipe of this graph belongs to another model"):
        found = sparse(x)
    torch.testing.assert_close(found, Toy(seed=9).eval()(x), rtol=1e-4, atol=1e-4)
    assert outcomes(sparse) == {"dense"}


@torch.no_grad()
def test_a_graph_for_every_length():
    model = Toy().eval()
    sparse = torch.compile(model, backend="afbs", dynamic=True, options={"min_length": 128})
    sparse(drifting(LENGTH))
    for layer in model.layers:
        layer.sharpness.mul_(0.02)
    x = drifting(LENGTH + 64)
    with pytest.warns(AfbsWarning, match="was made for a model that differs"):
        found = sparse(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
