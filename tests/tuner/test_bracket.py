"""The tau search, on landscapes whose crossing is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from afbs_compile.tuner.bracket import X_MIN, bracket_tau
from afbs_compile.tuner.measure import Measurement
from afbs_compile.tuner.space import Thresholds

TOLERANCE = 0.055


class Landscape:
    """A meter with a known error: ``error = slope * (1 - tau) ** power`` per head; sparsity falls with tau."""

    def __init__(self, slope: list[float], power: list[float]) -> None:
        self.slope, self.power = torch.tensor(slope), torch.tensor(power)
        self.heads = len(slope)
        self.calls = 0

    def __call__(self, thresholds: Thresholds) -> Measurement:
        self.calls += 1
        error = self.slope * (1 - thresholds.tau).clamp_min(0) ** self.power
        return Measurement(error[None], 1 - thresholds.tau)

    def crossing(self) -> Tensor:
        """Largest feasible 1 - tau."""
        return ((TOLERANCE / self.slope) ** (1 / self.power)).clamp_max(1)


def solve(landscape: Landscape, **keywords):
    return bracket_tau(landscape, torch.full((landscape.heads,), -1.0), TOLERANCE, **{"steps": 8, **keywords})


def test_every_head_ends_just_inside_its_own_crossing():
    landscape = Landscape([0.3, 1.0, 2.5, 0.6, 0.9], [1.0, 1.4, 0.8, 0.6, 1.8])
    found = solve(landscape)
    share = (1 - found.thresholds.tau) / landscape.crossing()
    assert (found.error <= TOLERANCE).all()
    assert (share <= 1 + 1e-5).all()
    assert (share > 0.9).all()


def test_a_head_that_nothing_hurts_goes_to_tau_zero_and_one_that_everything_hurts_stays_dense():
    found = solve(Landscape([0.01, 500.0], [1.0, 1.0]))
    assert found.thresholds.tau[0] == pytest.approx(0, abs=1e-6)
    assert found.thresholds.is_dense.tolist() == [False, True]
    assert found.sparsity.tolist() == pytest.approx([1.0, 0.0])
    assert found.error[1] == 0


def test_nan_errors_make_a_head_dense():
    found = solve(Landscape([math.nan, 0.3], [1.0, 1.0]))
    assert found.thresholds.is_dense.tolist() == [True, False]


def test_a_good_start_saves_evaluations_and_a_bad_one_still_arrives():
    landscape = Landscape([0.3], [1.0])
    start = 1 - landscape.crossing() * 0.98
    solve(landscape, start=start)
    assert landscape.calls == 1
    for bad in (0.0, 1 - math.exp(X_MIN), 1.0):
        found = solve(landscape, start=torch.tensor([bad]))
        assert found.error[0] == pytest.approx(TOLERANCE, rel=0.06)


def test_the_budget_of_evaluations_is_kept():
    landscape = Landscape([5.0], [0.2])
    solve(landscape, steps=3)
    assert landscape.calls == 3
