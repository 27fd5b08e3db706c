"""Exploring a site: what it costs and what it times."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.tuner.curves import Crossing, Curves, crossing
from afbs_compile.tuner.explore import EXPLORED_ROWS, _best, candidates, explore
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.speed import Stopwatch
from tests.toy import HEADS
from tests.tuner.test_site import operands

SQUARE = BlockShape(64, 64)


class Recorded(Stopwatch):
    """Every call takes a millisecond; remembers which sparse calls were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[SparseCall] = []

    def attention_ms(self, sample, call):
        self.asked.append(call)
        return 1.0

    def predictor_ms(self, sample, call):
        return 0.0


def test_a_part_of_the_rows_of_one_input_is_measured():
    inputs = SiteInputs([operands(length=4 * EXPLORED_ROWS), operands(length=1024)])
    explore(inputs, 0.05, [SQUARE], Recorded())
    passes = inputs.evaluations - 1  # the dense call
    share = EXPLORED_ROWS / inputs.length
    assert 0.3 * share < passes / len(candidates(inputs, SQUARE)) < 1.3 * share


def test_the_sparsest_choice_is_the_one_that_is_timed():
    stopwatch = Recorded()
    found = explore(SiteInputs([operands(length=2048)]), 0.05, [SQUARE], stopwatch)[SQUARE]
    (timed,) = stopwatch.asked
    saved = [float(crossing(curve.tau, curve.error, curve.sparsity, 0.05).sparsity.mean()) for curve in found.curves]
    best = found.curves[saved.index(max(saved))]
    assert (timed.policy, timed.theta) == (best.call.policy, best.call.theta)


@pytest.mark.parametrize(("cost", "leave"), [(0.0, 2), (0.06, 1), (0.2, 0)])
def test_a_head_leaves_the_choice_of_its_site_for_what_saves_it_clearly_more(cost, leave):
    sparsity = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.6, 0.55, 0.52, 0.2]])
    tau = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.7, 0.8, 0.9]])
    nothing = torch.zeros(HEADS, 1)
    measured = torch.ones(HEADS).bool()
    calls = [SparseCall.uniform(HEADS, KEEP_ALL, policy=name, shape=SQUARE) for name in ("meansim", "meanshare")]
    curves = [Curves("explore", 1024, call, nothing, nothing, nothing, measured) for call in calls]
    found = _best(curves, Crossing(tau, sparsity), [0.0, cost])
    own = torch.arange(HEADS) < leave
    assert found.call.policy == tuple("meanshare" if mine else "meansim" for mine in own)
    assert torch.equal(found.sparsity, torch.where(own, sparsity[1], sparsity[0]))
    assert torch.equal(torch.tensor(found.call.tau), torch.where(own, tau[1], tau[0]))


def test_a_pass_over_a_shorter_input_costs_as_much_less():
    inputs = SiteInputs([operands(length=2048), operands(length=1024)])
    tau, call = torch.ones(HEADS, 1), SparseCall.uniform(HEADS, KEEP_ALL, shape=SQUARE)
    spent = []
    for index in (0, 1):
        inputs.dense(index)
        before = inputs.evaluations
        inputs.sums(index, tau, call)
        spent.append(inputs.evaluations - before)
    # Every block is live: as much as dense attention, which computes half of all pairs, and half of the diagonal's.
    assert spent == pytest.approx([1, 1024 * 1025 / (2048 * 2049)], rel=1e-5)
