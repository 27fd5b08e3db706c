"""The methods of the paper's Table I: what each keeps, that nothing sees the future, and how much is left out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
N, D = 2048, 32

pytest.importorskip("transformers")


@pytest.fixture
def parts(monkeypatch):
    """The benchmark's modules."""
    before = set(sys.modules)
    kernels = sys.modules.get("kernels", "absent")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_parts.dynamic
    import paper_parts.fixed
    import paper_parts.head
    import paper_parts.methods

    yield paper_parts
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("paper_parts", "common", "timing"):
            del sys.modules[name]
    if kernels == "absent":
        sys.modules.pop("kernels", None)


def head(parts, seed=0, change=None):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, N, D, generator=generator)
    if change is not None:
        q[change:], k[change:] = torch.randn(2, N - change, D, generator=generator)
    return parts.head.Head(q, k, D**-0.5, torch.Generator().manual_seed(seed))


def pairs(parts, method, t, **given):
    """Row sees key, as the benchmark computes it."""
    one = head(parts, **given)
    kept = method.keep(one, t)
    if len(kept) < N:
        kept = kept.repeat_interleave(64, 0).repeat_interleave(64, 1)
    return (kept | (one.distance == 0)) & one.visible


def simulated(parts):
    return [method for method in parts.methods.METHODS if method.keep is not None]


def test_the_more_the_knob_is_turned_the_less_is_kept(parts):
    for method in simulated(parts)[1:]:
        shares = [float(pairs(parts, method, t).float().mean()) for t in (0.3, 0.6, 0.9)]
        assert shares == sorted(shares, reverse=True), method.name
        assert shares[0] > shares[-1] > 0 or method.name == "AnchorAttention", method.name  # nothing here is far off


@pytest.mark.parametrize("t", [0.6, 0.7, 0.8, 0.9])
def test_budgets_of_keys_leave_out_what_they_say(parts, t):
    exact = ("window", "Longformer", "Sparse Transformer", "StreamingLLM", "H2O, as a mask", "top-k tokens, oracle")
    for method in simulated(parts):
        if method.name in exact:
            left_out = 1 - float(pairs(parts, method, t).sum()) / (N * (N + 1) / 2)
            assert left_out == pytest.approx(t, abs=0.03), method.name


def test_blocks_by_rank_leave_out_what_they_say(parts):
    scores = torch.randn(64, 64)
    for t in (0.6, 0.7, 0.8, 0.9):
        kept = parts.head.largest(scores, t)
        assert not kept.triu(1).any()
        assert 1 - float(kept.sum()) / (64 * 65 / 2) == pytest.approx(t, abs=0.012)
    row = parts.head.largest(scores, 0.5)[40]
    assert scores[40, :41][row[:41]].min() >= scores[40, :41][~row[:41]].max()


def test_what_comes_later_decides_nothing_where_a_row_knows_only_what_was(parts):
    """Hashing and clustering look at the whole text, as their authors' do; the others must not."""
    change = 1280
    for method in simulated(parts):
        if method.name in ("Reformer", "Routing Transformer"):
            continue
        before, after = (pairs(parts, method, 0.7, change=c)[:change] for c in (None, change))
        assert torch.equal(before, after), method.name


def test_the_oracle_keeps_the_most_weight_of_all(parts):
    one = head(parts)
    weight = {
        method.name: float((one.probability * pairs(parts, method, 0.8)).sum())
        for method in simulated(parts)
        if method.name not in ("dense", "Reformer", "Routing Transformer", "AnchorAttention", "sink + random")
    }
    assert max(weight, key=weight.get) == "top-k tokens, oracle"
    assert weight["top-k blocks, oracle"] > weight["random blocks"]


def test_what_left_the_cache_does_not_come_back(parts):
    method = next(m for m in simulated(parts) if m.name == "H2O, evicting")
    kept = pairs(parts, method, 0.8)
    steps = kept.unflatten(0, (-1, 64)).any(1)  # which keys any row of a step sees
    for key in range(N):
        mine = steps[key // 64 + 1 :, key]
        assert not (mine[1:] & ~mine[:-1]).any()


def test_a_width_for_every_share(parts):
    for t in (0.0, 0.3, 0.6, 0.9):
        width = parts.head.width_for(N, t)
        kept = sum(min(row + 1, width) for row in range(N))
        assert 1 - kept / (N * (N + 1) / 2) == pytest.approx(t, abs=0.005)


@pytest.mark.slow
def test_a_sparsity_is_matched_on_the_shipped_model(parts, fresh_dynamo):
    import argparse

    from paper_parts.bench import EXACT, Matcher, at
    from paper_parts.setting import Setting

    given = {"model": BENCHMARKS.parent / "examples" / "model-7m", "dtype": "float32", "texts": ["topics"]}
    given |= {"length": 1024, "samples": 2, "windows": 1, "seed": 0}
    setting = Setting(argparse.Namespace(**given))
    runs = setting.tested("topics", 1024)
    by_name = {method.name: method for method in parts.methods.METHODS}
    dense = at(by_name["dense"], setting, runs, 0.0)
    assert dense.sparsity == 0.0
    for name in ("window", "top-k tokens, oracle", "XAttention", "Reformer"):
        point = Matcher(by_name[name], setting, runs).matched(0.7)
        assert abs(point.sparsity - 0.7) <= EXACT, name
        assert point.perplexity == Matcher(by_name[name], setting, runs).matched(0.7).perplexity, name


@pytest.mark.parametrize("power", [1.0, 4.0, 0.05])
def test_a_knob_is_found_whatever_its_scale(parts, monkeypatch, power):
    from paper_parts import bench

    asked = []

    def at(method, setting, runs, t):
        asked.append(t)
        return bench.Point(t, 0.95 * t**power, 1.0)

    monkeypatch.setattr(bench, "at", at)
    matcher = bench.Matcher(None, None, ())
    for sparsity in (0.6, 0.7, 0.8, 0.9):
        assert abs(matcher.matched(sparsity).sparsity - sparsity) <= bench.EXACT
    found = matcher.matched(0.7).t
    asked.clear()
    assert bench.Matcher(None, None, (), {0.7: found}).matched(0.7).t == found
    assert asked == [found]


def test_a_sparsity_out_of_reach_is_told_by_the_nearest(parts, monkeypatch):
    from paper_parts import bench

    monkeypatch.setattr(bench, "at", lambda method, setting, runs, t: bench.Point(t, 0.5 * t, 1.0))
    assert bench.Matcher(None, None, ()).matched(0.9).sparsity == 0.5
