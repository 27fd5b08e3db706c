"""Evidence by betting: false alarms, delays, and which heads are named, by simulation."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.monitor.betting import STREAK, Streak, Wealth, enduring, exceeding

RATE, DELTA = 0.098, 0.05
CPU = torch.device("cpu")


def alarms(losses, rate=RATE):
    """When each column of ``[rounds, runs]`` reaches 1/delta; infinite where it does not."""
    wealth = Wealth(losses.shape[1], rate, CPU)
    when = torch.full((losses.shape[1],), torch.inf)
    for number, loss in enumerate(losses, 1):
        wealth.update(loss)
        when = torch.where((wealth.values >= 1 / DELTA) & when.isinf(), number, when)
    return when


def drawn(rate, rounds, runs=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rounds, runs, generator=generator) < torch.as_tensor(rate)).double()


def test_at_the_null_there_is_an_alarm_in_at_most_delta_of_all_runs():
    assert alarms(drawn(RATE, 2000)).isfinite().float().mean() <= DELTA


@pytest.mark.parametrize("rate", [0.02, 0.098, 0.3])
def test_losses_that_depend_on_each_other_raise_no_more(rate):
    """Streaks: each loss is the one before with a chance of 0.9, but what comes next is never more than promised."""
    draw = torch.Generator().manual_seed(1)
    runs, rounds = 2000, 500
    losses, before = [], torch.zeros(runs)
    for _ in range(rounds):
        chance = torch.where(before > 0, rate, 0.9 * rate)
        before = (torch.rand(runs, generator=draw) < chance).double()
        losses.append(before)
    assert alarms(torch.stack(losses), rate).isfinite().float().mean() <= DELTA


@pytest.mark.parametrize(("rate", "reference"), [(0.15, 324), (0.2, 77), (0.3, 20), (0.5, 5)])
def test_the_delay_is_that_of_a_simulation_elsewhere(rate, reference):
    delay = alarms(drawn(rate, 1500, runs=1000)).median()
    assert delay <= 1.2 * reference + 3


def test_a_rate_that_rises_late_is_found_soon():
    quiet, loud = torch.full((1000, 1), 0.05), torch.full((600, 1), 0.3)
    delay = alarms(drawn(torch.cat([quiet, loud]), 1600, runs=500)) - 1000
    assert (delay <= 0).float().mean() <= 0.01
    assert delay.median() <= 120


def test_losses_between_0_and_1_are_held_to_their_mean():
    generator = torch.Generator().manual_seed(0)
    fair = torch.rand(1500, 1000, generator=generator, dtype=torch.float64) * 2 * RATE
    assert alarms(fair).isfinite().float().mean() <= DELTA
    assert alarms(fair * 2).isfinite().all()


def test_a_loss_that_is_not_known_changes_nothing():
    with_gaps, without = Wealth(2, RATE, CPU), Wealth(2, RATE, CPU)
    for _ in range(3):
        with_gaps.update(torch.tensor([1.0, torch.nan]))
        without.update(torch.tensor([1.0, 0.0]))
    assert with_gaps.values[0] == without.values[0]
    assert with_gaps.values[1] == 1.0


def test_before_the_first_loss_wealth_is_1_and_it_stays_finite():
    wealth = Wealth(1, 0.01, CPU)
    assert wealth.values.tolist() == [1.0]
    for _ in range(500):
        wealth.update(torch.ones(1))
    assert torch.isfinite(wealth.values).all()


def test_the_mean_says_that_some_head_and_e_bh_says_which():
    values = torch.ones(100, dtype=torch.float64)
    assert exceeding(values, DELTA) == (False, pytest.approx(torch.zeros(100)))
    values[:90] = 25.0  # nobody alone, but all of them together
    some, named = exceeding(values, DELTA)
    assert some
    assert named.tolist() == [True] * 90 + [False] * 10
    values[:] = 1.0
    values[7] = 2100.0
    some, named = exceeding(values, DELTA)
    assert some
    assert named.nonzero().flatten().tolist() == [7]
    values[7] = 1000.0  # less than 100 heads / delta
    assert not exceeding(values, DELTA)[0]
    values[:] = torch.tensor([1500.0, 400.0] + [1.0] * 98)
    assert exceeding(values, DELTA)[0] is False


def test_some_head_and_nobody_knows_which():
    values = torch.tensor([39.0] * 2 + [3.0] * 2, dtype=torch.float64)
    some, named = exceeding(values, DELTA)
    assert some
    assert not named.any()  # two of four need 40 each


def test_false_alarms_over_many_heads_are_at_most_delta_together():
    false = 0
    for seed in range(200):
        wealth = Wealth(32, RATE, CPU)
        for loss in drawn(RATE, 150, runs=32, seed=seed):
            wealth.update(loss)
            if exceeding(wealth.values, DELTA)[0]:
                false += 1
                break
    assert false <= 200 * DELTA


def test_the_paper_s_rule_needs_a_hundred_in_a_row():
    streak = Streak(2, RATE, CPU)
    for number in range(STREAK):
        assert not enduring(streak.values, DELTA)[0]
        streak.update(torch.tensor([1.0, 0.0 if number == 50 else 1.0]))
    some, named = enduring(streak.values, DELTA)
    assert some
    assert named.tolist() == [True, False]
    streak.update(torch.tensor([torch.nan, 1.0]))
    assert streak.values.tolist() == [STREAK, 50]
