"""A budget: what it counts, and how sure a measurement of it is."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from afbs_compile.tuner.budget import Budget
from afbs_compile.tuner.end_to_end import OutputChange

CHANGES = [OutputChange(kl=k, loss=0.8 * k, output=0.1 * k) for k in (0.01, 0.02, 0.04, 0.03)]


@pytest.mark.parametrize(("quantity", "cost"), [("kl", 0.025), ("perplexity", math.expm1(0.02)), ("output", 0.0025)])
def test_the_cost_is_the_mean_over_the_pieces(quantity, cost):
    assert Budget(quantity, 0.1).cost(CHANGES) == pytest.approx(cost)


@pytest.mark.parametrize("quantity", ["kl", "perplexity", "output"])
def test_the_upper_end_is_student_s(quantity):
    values = [change.kl * {"kl": 1, "perplexity": 0.8, "output": 0.1}[quantity] for change in CHANGES]
    upper = stats.ttest_1samp(values, 0.0, alternative="less").confidence_interval(0.95).high
    assert Budget(quantity, 0.1).upper(CHANGES) == pytest.approx(
        math.expm1(upper) if quantity == "perplexity" else upper
    )


def test_one_piece_says_nothing_of_chance():
    assert Budget("kl", 0.1).upper(CHANGES[:1]) is None


def test_the_upper_end_covers_the_truth_as_often_as_it_says():
    torch.manual_seed(0)
    covered = 0
    for _ in range(2000):
        values = 0.02 + 0.01 * torch.randn(8)
        covered += Budget("kl", 1.0).upper([OutputChange(kl=float(v)) for v in values]) >= 0.02
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)
