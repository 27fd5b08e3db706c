"""The knapsack: within the budget, and as little work as an exhaustive search finds, up to one head's step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from afbs_compile.tuner.allocate import allocate


def curves(heads: int, points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Falling work and rising cost, dense first; some heads bumpy."""
    rng = np.random.default_rng(seed)
    work = 1 - np.sort(rng.random((heads, points)), 1)
    cost = np.sort(rng.random((heads, points)) ** 2, 1) * rng.lognormal(size=(heads, 1))
    work[:, 0], cost[:, 0] = 1.0, 0.0
    return work, cost


def exhaustive(work: np.ndarray, cost: np.ndarray, budget: float) -> float:
    rows = np.arange(len(work))
    choices = (np.array(choice) for choice in itertools.product(range(work.shape[1]), repeat=len(work)))
    return min(work[rows, c].sum() for c in choices if cost[rows, c].sum() <= budget)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.0, 0.05, 0.5, 3.0])
def test_within_the_budget_and_one_step_from_the_optimum(seed, budget):
    work, cost = curves(5, 6, seed)
    chosen = allocate(work, cost, budget)
    rows = np.arange(5)
    assert cost[rows, chosen].sum() <= budget + 1e-9
    largest_step = np.ptp(work, axis=1).max()
    assert work[rows, chosen].sum() <= exhaustive(work, cost, budget) + largest_step


def test_no_budget_is_all_dense():
    work, cost = curves(40, 17, 0)
    cost[:, 1:] += 1e-6
    assert (allocate(work, cost, 0.0) == 0).all()


def test_unlimited_budget_takes_the_least_work():
    work, cost = curves(40, 17, 1)
    assert (allocate(work, cost, 1e9) == work.argmin(1)).all()


def test_points_that_are_not_finite_are_never_taken():
    work, cost = curves(10, 5, 2)
    work[:, 3], cost[:, 4] = np.nan, np.inf
    assert (allocate(work, cost, 1e9) <= 2).all()


def test_sensitive_heads_stay_dense():
    work, cost = curves(10, 5, 3)
    cost[4] *= 1e6
    chosen = allocate(work, cost, 0.5)
    assert chosen[4] == 0
    assert (np.delete(chosen, 4) > 0).any()


def test_a_thousand_heads():
    work, cost = curves(1024, 33, 4)
    chosen = allocate(work, cost, 10.0)
    rows = np.arange(1024)
    assert 9.5 < cost[rows, chosen].sum() <= 10.0


def test_a_head_that_cannot_be_dense_is_refused():
    work, cost = curves(3, 4, 5)
    cost[1] += 0.1
    with pytest.raises(ValueError, match="a point that costs nothing"):
        allocate(work, cost, 1.0)
