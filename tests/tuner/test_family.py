"""Policy and block shape of a budget: a few contenders by their heads' error, one of them by the output."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afbs_compile.found import FoundGraph
from afbs_compile.kernels.attend.flex.engine import Flex
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.passes.capture import SampleRun
from afbs_compile.passes.record import record_graphs
from afbs_compile.tuner import budgeted, family
from afbs_compile.tuner.explore import tau_grid
from afbs_compile.tuner.family import BEHIND, MOST, Contender, Family, SiteTimes, contenders, fastest
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.speed import Stopwatch
from tests.toy import Toy, drifting

SHAPES = (BlockShape(64, 64), BlockShape(128, 64))


class Grouped(nn.Module):
    """One layer whose query heads share key heads by twos."""

    def forward(self, x):
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        k = q[:, ::2].contiguous()
        return F.scaled_dot_product_attention(8 * q, k, k, is_causal=True, enable_gqa=True)


def runs_of(model, length=512):
    (graph,) = record_graphs(model.eval(), [drifting(length)])
    found = FoundGraph.of(graph.gm, graph.samples[0], min_length=1)
    return [SampleRun(found.gm, found.sites, inputs) for inputs in graph.samples]


def contending(monkeypatch, predictor=None, attention=None, shapes=SHAPES, model=None):
    """With the milliseconds of each policy's predictor and of each shape's attention given."""
    predictor, attention = predictor or {}, attention or {}
    monkeypatch.setattr(Stopwatch, "predictor_ms", lambda self, _, call: predictor.get(call.policy[0], 0.1))
    monkeypatch.setattr(Stopwatch, "attention_ms", lambda self, _, call: attention.get(call.shape, 1.0))
    found, _ = contenders(runs_of(model or Toy()), TuneSettings(shapes=shapes), Stopwatch(), lambda: None)
    return [(call.policy[0], call.shape) for call in (next(iter(each.family.calls.values())) for each in found)]


def test_each_policy_contends_with_its_fastest_shape(monkeypatch):
    assert {shape for _, shape in contending(monkeypatch, attention={SHAPES[0]: 2.0})} == {SHAPES[1]}
    assert {shape for _, shape in contending(monkeypatch, attention={SHAPES[1]: 2.0})} == {SHAPES[0]}
    policies = [policy for policy, _ in contending(monkeypatch)]
    assert len(set(policies)) == len(policies) <= MOST


def test_heads_share_a_selection_where_they_share_a_key_head_and_an_engine_gains_by_it(monkeypatch):
    pair = BlockShape(64, 64, heads=2)
    shapes, fast = (*SHAPES, pair), {pair: 0.1}
    grouped = contending(monkeypatch, attention=fast, shapes=shapes, model=Grouped())
    assert pair not in {shape for _, shape in grouped}
    monkeypatch.setattr(Flex, "shapes", shapes)
    assert pair not in {shape for _, shape in contending(monkeypatch, attention=fast, shapes=shapes)}
    grouped = contending(monkeypatch, attention=fast, shapes=shapes, model=Grouped())
    assert {shape for _, shape in grouped} == {pair}


def test_times_are_added_up_over_the_same_sites_for_every_shape(monkeypatch):
    """A shape that serves the first site only is measured at the second as well, by whatever computes it there."""
    answers = iter([True, True] + [False] * 2)
    monkeypatch.setattr(family, "_serves", lambda *_: next(answers))
    found, _ = contenders(runs_of(Toy()), TuneSettings(shapes=SHAPES), Stopwatch(), lambda: None)
    assert {len(each.sites) for each in found} == {2}
    assert list(answers) == [False] * 2, "asked once for the graph"


def test_slow_ones_do_not_and_the_fastest_comes_first(monkeypatch):
    everything = [policy for policy, _ in contending(monkeypatch)]
    slow = dict.fromkeys(everything[:1], 10 * BEHIND)
    assert everything[0] not in [policy for policy, _ in contending(monkeypatch, predictor=slow)]
    last = dict.fromkeys(everything, 0.3) | {everything[-1]: 0.0}
    assert contending(monkeypatch, predictor=last)[0][0] == everything[-1]


def test_times_that_are_about_equal_leave_the_first():
    assert fastest([1.01, 1.0, 5.0]) == 0
    assert fastest([1.05, 1.0, 1.0]) == 1


def made(policy, live, predictor_ms=0.0):
    """A contender whose blocks live at a share that falls with the threshold."""
    family = Family({"site": SparseCall.uniform(1, 0.0, policy=policy, shape=SHAPES[0])})
    return Contender(family, (SiteTimes(1 - live(tau_grid()), 10.0, predictor_ms, 0.5),))


def test_its_time_at_a_threshold_is_read_off_the_curve():
    one = made("cumulant", lambda tau: tau, predictor_ms=1.0)
    for threshold in (0.01, 0.1, 0.5):
        assert one.ms(threshold) == pytest.approx(1.0 + 10.0 / (1 + threshold), rel=0.02)
    assert one.ms(0.0) == pytest.approx(11.0, rel=0.01)
    assert one.ms_at_equal_error() == 6.0


def test_the_output_decides_among_contenders(monkeypatch):
    """Either policy keeps half at its own threshold, which costs the output four times as much with the one."""
    cheap = made("meanshare", lambda tau: torch.full_like(tau, 0.5), predictor_ms=0.1)
    good = made("cumulant", lambda tau: (tau > 0.98).float().clamp_min(0.3), predictor_ms=0.5)
    costs = {"meanshare": 0.4, "cumulant": 0.1}
    judge = SimpleNamespace(is_quick=True, budget=SimpleNamespace(limit=0.01))
    judge.quickly = lambda calls: costs[calls["site"].policy[0]] * (1 / calls["site"].tau[0] - 1)
    passes = []
    chosen, start = budgeted._fastest_within(judge, [cheap, good], lambda: passes.append(1))
    assert chosen is good.family
    assert start == pytest.approx(0.0925, rel=0.02)
    assert len(passes) <= 4
    assert budgeted._fastest_within(judge, [cheap], lambda: None) == (cheap.family, None)
