"""The budget: spent where it is cheap, measured on the output, checked on other samples, stepped back on failure."""

from __future__ import annotations

import math

import pytest
import torch

from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.tuner.budget import Budget, SitePoints, spend
from afbs_compile.tuner.end_to_end import OutputChange

TAUS = torch.tensor([1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.3])


class FakeModel:
    """An output that changes by the squared errors of its heads, some heads counting more, times ``factor``."""

    def __init__(self, sites: list[SitePoints], weights: dict[str, torch.Tensor], factor: float = 1.0) -> None:
        self.sites = {site.name: site for site in sites}
        self.weights, self.factor, self.calls = weights, factor, 0

    def __call__(self, chosen):
        self.calls += 1
        kl = 0.0
        for name, call in chosen.items():
            site = self.sites[name]
            point = (site.tau == torch.tensor(call.tau)[:, None]).int().argmax(1)
            kl += float((self.weights[name] * site.error.gather(1, point[:, None])[:, 0] ** 2).sum())
        several = sum(call.dense_heads.count(False) > 1 for call in chosen.values())
        kl *= self.factor if several else 1.0
        return [OutputChange(kl, 0.8 * kl)]


def site(name: str, heads: int = 4, seed: int = 0) -> SitePoints:
    generator = torch.Generator().manual_seed(seed)
    slope = 0.5 + torch.rand(heads, 1, generator=generator)
    tau = TAUS.expand(heads, -1)
    return SitePoints(name, SparseCall.uniform(heads, KEEP_ALL), tau, slope * (1 - tau), tau**2)


def live_of(sites, spending) -> float:
    return float(torch.cat([s.live.gather(1, spending.points[s.name][:, None]) for s in sites]).mean())


@pytest.fixture
def sites():
    return [site(f"layers.{i}", seed=i) for i in range(3)]


@pytest.fixture
def weights(sites):
    return {s.name: torch.tensor([0.1, 0.1, 1.0, 50.0]) for s in sites}


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("quantity", ["kl", "perplexity"])
def test_the_measured_cost_is_inside_and_most_is_spent(sites, weights, factor, quantity):
    model = FakeModel(sites, weights, factor)
    spending = spend(sites, model, None, Budget(quantity, 0.05))
    assert 0.7 * 0.05 <= spending.measured <= 0.05
    assert spending.checked is None


def test_heads_that_matter_stay_dense_and_cheap_ones_go_sparse(sites, weights):
    spending = spend(sites, FakeModel(sites, weights), None, Budget("kl", 0.05))
    for points in spending.points.values():
        assert (points[:2] >= points[3]).all()
        assert points[3] <= 1


def test_more_budget_is_less_work(sites, weights):
    live = [
        live_of(sites, spend(sites, FakeModel(sites, weights), None, Budget("kl", limit)))
        for limit in (0.001, 0.01, 0.1)
    ]
    assert live == sorted(live, reverse=True)
    assert live[0] > live[-1]


def test_a_failed_check_steps_back(sites, weights):
    worse = FakeModel(sites, weights, factor=2.0)
    spending = spend(sites, FakeModel(sites, weights), worse, Budget("kl", 0.05))
    assert spending.steps_back > 0
    assert spending.checked is not None
    assert spending.checked <= 0.05


def test_a_check_that_never_passes_leaves_all_dense(sites, weights):
    class Hopeless(FakeModel):
        def __call__(self, chosen):
            return [OutputChange(1.0, 1.0)]

    spending = spend(sites, FakeModel(sites, weights), Hopeless(sites, weights), Budget("kl", 0.05))
    assert all((points == 0).all() for points in spending.points.values())


def test_points_without_a_finite_error_are_never_used(sites, weights):
    broken = sites[0].error.clone()
    broken[0, 1:] = math.nan
    changed = [SitePoints(**{**vars(sites[0]), "error": broken}), *sites[1:]]
    spending = spend(changed, FakeModel(changed, weights), None, Budget("kl", 1e9))
    assert spending.points["layers.0"][0] == 0
    assert (spending.points["layers.1"] > 0).all()


def test_each_head_is_measured_once(sites, weights):
    model = FakeModel(sites, weights)
    ticks = []
    spend(sites, model, None, Budget("kl", 0.05), progress=lambda: ticks.append(1))
    assert len(ticks) == 12
    assert model.calls <= 12 + 5
