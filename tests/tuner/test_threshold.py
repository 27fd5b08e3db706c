"""One threshold: bracketed on the output, checked on what had no say, stepped back where the check fails."""

from __future__ import annotations

import math

import pytest

from afbs_compile.kernels.call import SparseCall
from afbs_compile.tuner.budget import Budget
from afbs_compile.tuner.threshold import MOST_STEPS_BACK, START, Found, search, spend

LIMIT = 0.01


def power(at_limit: float, slope: float):
    """A cost that reaches the limit at a threshold."""
    return lambda threshold: LIMIT * (threshold / at_limit) ** slope


class FakeJudge:
    """Costs by formula; counts passes."""

    def __init__(self, choosing, checking=None, quick=None, unit="samples"):
        self.budget, self.unit = Budget("kl", LIMIT), unit
        self._choosing, self._checking, self._quick = choosing, checking, quick
        self.passes = 0

    @property
    def is_quick(self):
        return self._quick is not None

    def _count(self, cost, calls):
        self.passes += 1
        ((_, call),) = calls.items()
        tau = call.tau[0]
        return cost((1 - tau) / tau)

    def quickly(self, calls):
        return self._count(self._quick, calls)

    def choosing(self, calls):
        return self._count(self._choosing, calls)

    def checking(self, calls):
        if self._checking is None:
            return None
        cost = self._count(self._checking, calls)
        return cost, 1.1 * cost


def chosen(threshold: float) -> dict[str, SparseCall]:
    return {"site": SparseCall.uniform(2, 1 / (1 + threshold), policy="cumulant")}


def spent(judge):
    ticks = []
    spending = spend(judge, chosen, lambda: ticks.append(1))
    assert len(ticks) == judge.passes
    return spending


@pytest.mark.parametrize("at_limit", [0.002, 0.01, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("slope", [1.0, 1.5, 2.5])
def test_most_of_the_budget_is_spent_and_no_more(at_limit, slope):
    judge = FakeJudge(power(at_limit, slope), power(at_limit, slope), power(at_limit, slope))
    spending = spent(judge)
    assert 0.6 * LIMIT <= spending.measured <= LIMIT
    assert spending.checked == pytest.approx(spending.measured)
    assert spending.upper == pytest.approx(1.1 * spending.measured)
    assert judge.passes <= 9


def test_the_quick_sample_only_says_where_to_look():
    judge = FakeJudge(power(0.02, 1.5), power(0.02, 1.5), power(0.1, 1.5))
    assert spent(judge).threshold == pytest.approx(0.02, rel=0.3)


def test_a_failed_check_steps_back():
    judge = FakeJudge(power(0.02, 1.5), power(0.012, 1.5))
    spending = spent(judge)
    assert spending.steps_back == 1
    assert spending.measured == pytest.approx(power(0.02, 1.5)(spending.threshold), rel=1e-5)
    assert spending.checked <= LIMIT
    assert spending.threshold <= 0.012


@pytest.mark.parametrize("slope", [2.5, 4.0])
def test_a_step_back_that_went_too_far_is_taken_back_in_part(slope):
    """A steep cost leaves most of the budget behind: the step was made for one that grows with the threshold."""
    judge = FakeJudge(power(0.02, slope), power(0.018, slope))
    spending = spent(judge)
    assert spending.steps_back == 1
    assert 0.6 * LIMIT <= spending.checked <= LIMIT
    assert spending.measured == pytest.approx(power(0.02, slope)(spending.threshold), rel=1e-5)


def test_what_fails_again_between_leaves_the_step_back():
    def jumps(threshold):
        return 0.3 * LIMIT if threshold < 0.0145 else 1.2 * LIMIT

    spending = spent(FakeJudge(power(0.02, 1.5), jumps))
    assert spending.steps_back == 1
    assert spending.checked == 0.3 * LIMIT


def test_a_check_that_never_passes_leaves_all_dense():
    spending = spent(FakeJudge(power(0.02, 1.5), lambda _: 1.0))
    assert (spending.threshold, spending.steps_back) == (0.0, MOST_STEPS_BACK + 1)


def test_without_a_check_nothing_is_said_to_be_checked():
    spending = spent(FakeJudge(power(0.02, 1.5)))
    assert (spending.checked, spending.upper) == (None, None)
    assert spending.threshold > 0


def test_nothing_inside_leaves_all_dense():
    assert spent(FakeJudge(lambda _: 1.0, lambda _: 1.0)).threshold == 0.0


@pytest.mark.parametrize("cost", [math.nan, math.inf])
def test_a_cost_that_is_no_number_is_never_inside(cost):
    assert spent(FakeJudge(lambda _: cost)).threshold == 0.0


def test_costs_below_nothing_are_noise_and_inside():
    """Perplexity may fall by chance."""
    found = search(lambda x: -0.001 if x < 0.03 else 0.02, LIMIT, START, 3)
    assert isinstance(found, Found)
    assert found.inside >= START


def test_a_threshold_above_one_that_fails_is_not_trusted():
    seen = []

    def cost(x):
        seen.append(x)
        return {1: 0.02, 2: 0.03}.get(len(seen), 0.001)

    found = search(cost, LIMIT, START, 3)
    assert found.inside <= min(seen[:2])
