"""Tuning one site on operands whose heads are really sparse: what is promised must hold when computed another way."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import KEEP_ALL, LAMBDA_OFF, Kept, SparseCall
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.attention import masked_attention
from afbs_compile.kernels.spec.selection import live_blocks
from afbs_compile.tuner import gp, paper, site, speed
from afbs_compile.tuner.clock import Times
from afbs_compile.tuner.explore import candidates
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.measure import LOCAL_KEPT, WINDOWS, Meter, low_fidelity, relative_l1
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.site import tune_site
from afbs_compile.tuner.space import at_latent, dense_heads
from afbs_compile.tuner.speed import SiteSpeed, Stopwatch
from tests.toy import HEAD_DIM, HEADS, drifting

pytestmark = pytest.mark.usefixtures("sparse_is_faster")

LENGTH = 1024
MEASURE = SiteSpeed.measure


SQUARE = (BlockShape(64, 64),)
CAUSAL, FULL = Causal(), Full()


def operands(seed: int = 0, length: int = LENGTH, batch: int = 1, mask: Mask = CAUSAL) -> Operands:
    """Four heads of growing sharpness over a drifting sequence."""
    x = drifting(length, batch, seed).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
    sharpness = torch.tensor([2.0, 4.0, 6.0, 9.0]).view(1, HEADS, 1, 1)
    values = torch.randn(batch, HEADS, length, HEAD_DIM, generator=torch.Generator().manual_seed(seed + 100))
    return Operands(x * sharpness, x, x + values, mask, HEAD_DIM**-0.5)


def errors_by_reference(sample: Operands, call: SparseCall) -> tuple[Tensor, Tensor]:
    """Error and sparsity of each head in blocks of 64 x 64, in float64 and without any of the tuner's code."""
    kept = LOCAL_KEPT if sample.mask == CAUSAL else Kept()
    (shape,) = SQUARE
    live = live_blocks(sample, replace(call, shape=shape, kept=kept))
    exact = replace(sample, q=sample.q.double(), k=sample.k.double(), v=sample.v.double())
    out = masked_attention(exact, live, call.lam, shape)
    everything = sample.mask.visibility(sample.grid(shape), torch.device("cpu")).visible
    dense = masked_attention(exact, everything.expand_as(live), [LAMBDA_OFF] * HEADS, shape)
    error = (out - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
    return error, 1 - live.sum((0, 2, 3)) / (everything.sum() * live.shape[0])


@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=str)
def test_every_head_holds_the_tolerance_on_every_sample(mask):
    samples = [operands(seed, mask=mask) for seed in range(3)]
    result = tune_site(samples, TuneSettings(tolerance=0.05, shapes=SQUARE))
    assert result.measured.error.shape == (3, HEADS)
    for index, sample in enumerate(samples):
        error, _ = errors_by_reference(sample, result.call)
        assert (error <= 0.05 + 1e-4).all()
        assert result.measured.error[index].tolist() == pytest.approx(error.tolist(), abs=1e-4)
    sparsity = torch.stack([errors_by_reference(sample, result.call)[1] for sample in samples]).mean(0)
    assert result.measured.sparsity.tolist() == pytest.approx(sparsity.tolist(), abs=1e-6)
    assert (result.measured.sparsity > torch.tensor([0.0, 0.2, 0.4, 0.5])).all()


def test_the_last_rows_of_causal_inputs_are_whole_and_local_keys_kept():
    results = [tune_site([operands(mask=mask)], TuneSettings(shapes=SQUARE)) for mask in (CAUSAL, FULL)]
    assert [result.call.kept for result in results] == [LOCAL_KEPT, Kept()]
    assert tune_site([operands()], TuneSettings(method="paper")).call.kept == Kept()  # Algorithm 1 as it is
    error = Meter([operands()], windows=16)(SparseCall.uniform(HEADS, 0.0, kept=LOCAL_KEPT)).error
    assert (error[-1] < 1e-5).all()
    assert (error[4:-1, 0] > 0.02).all(), "the head that is not local errs elsewhere"


@pytest.mark.parametrize(
    ("length", "reason"), [(256, "too short: every block of its 256 tokens is always kept"), (448, None)]
)
def test_short_inputs_have_nothing_to_skip(length, reason):
    result = tune_site([operands(length=length)], TuneSettings(tolerance=0.9, shapes=SQUARE))
    assert result.call.is_dense == (reason is not None)
    assert reason is None or result.dense_reason == reason


def test_errors_of_prefixes_are_those_of_shorter_inputs():
    sample, call = operands(length=2 * LENGTH), SparseCall.uniform(HEADS, KEEP_ALL, kept=LOCAL_KEPT)
    tau = torch.tensor([0.3, 0.7, 0.9]).expand(HEADS, -1).contiguous()
    prefixes = SiteInputs([sample]).curve(0, tau, call).prefixes
    assert set(prefixes) == {LENGTH // 2, LENGTH}
    for length, errors in prefixes.items():
        assert errors.max() > 0.01, "there must be something to err about"
        short = replace(sample, q=sample.q[:, :, :length], k=sample.k[:, :, :length], v=sample.v[:, :, :length])
        for column, value in enumerate(tau[0].tolist()):
            (expected,) = Meter([short], windows=1)(call.with_tau(torch.full((HEADS,), value))).error
            assert errors[:, column].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(("length", "tell"), [(LENGTH, False), (2 * LENGTH, True)])
def test_prefixes_that_are_mostly_kept_say_nothing_about_growth(length, tell):
    lengths = tune_site([operands(length=length)], TuneSettings(tolerance=0.05, shapes=SQUARE)).lengths
    assert lengths is not None
    assert bool(lengths.exponent.any()) == tell
    assert lengths.validated[0] < length, "they hold the tolerance all the same"


def test_heads_use_what_the_tolerance_allows():
    result = tune_site([operands(), operands(1)], TuneSettings(tolerance=0.05, shapes=SQUARE))
    tau = torch.tensor(result.call.tau)
    could = tau > 0  # a sharp head has nothing left but what is always kept
    assert could.sum() >= 2
    for step in (0.97, 0.9):  # a step of the grid is a twentieth
        bolder = result.call.with_tau(1 - (1 - tau) / step)
        worst = torch.stack([errors_by_reference(operands(seed), bolder)[0] for seed in (0, 1)]).amax(0)
    assert (worst[could] > 0.05 * 0.93).all()


@pytest.mark.parametrize("weight", [4.0, 16.0], ids=["a little", "far"])
def test_an_input_that_is_harder_than_the_explored_one_decides(weight):
    easy, hard = operands(length=LENGTH + 64), operands(1)
    hard.v[:, :, : LENGTH // 2] *= weight  # what far blocks hold counts for more
    without = tune_site([easy, easy], TuneSettings(tolerance=0.05, shapes=SQUARE))
    result = tune_site([easy, hard], TuneSettings(tolerance=0.05, shapes=SQUARE))
    worst = errors_by_reference(hard, result.call)[0]
    assert (worst <= 0.05 + 1e-4).all()
    assert not any(result.call.dense_heads)
    stricter = torch.tensor(result.call.tau) > torch.tensor(without.call.tau)
    assert stricter.any(), "the test must make a head step back"
    assert result.deciding[1]
    assert (worst[stricter] > 0.05 / 2).all(), "no further back than the hard input asks for, in few and coarse blocks"


def test_the_time_of_the_predictor_counts_in_the_choice_of_policy(monkeypatch):
    def chosen(**milliseconds: float) -> set[str]:
        def predictor_ms(self, sample, call):
            return max(milliseconds.get(name, 0.0) for name in call.policy)

        monkeypatch.setattr(Stopwatch, "predictor_ms", predictor_ms)
        return set(tune_site([operands()], TuneSettings(tolerance=0.05, shapes=SQUARE)).call.policy)

    monkeypatch.setattr(Stopwatch, "attention_ms", lambda self, *_: 1.0)
    every = {call.policy[0] for call in candidates(SiteInputs([operands()]), SQUARE[0])}
    assert len(every) >= 3
    for name in every:
        assert chosen(**dict.fromkeys(every - {name}, 1.0)) == {name}, "all others take as long as dense attention"


@pytest.mark.parametrize("pays_from", [256, 1024, 8192, 10**9])
def test_the_crossover_is_the_shortest_halving_that_pays(monkeypatch, pays_from):
    tried = []

    def times(self, sample, *_):
        tried.append(sample.q_len)
        return 1.0, 0.5 if tried[-1] >= min(pays_from, 16384) else 2.0, False

    monkeypatch.setattr(Stopwatch, "dense_and_sparse_ms", times)
    stopwatch = Stopwatch()

    def found(sparsity):
        tried.clear()
        return measured_speed(sparsity, stopwatch).min_length

    shortest = min(pays_from, 16384)
    assert found(0.7) == shortest
    assert len(tried) <= 4
    assert (found(0.7), tried) == (shortest, [16384]), "what one site has shown is not timed again"
    assert (found(0.74), tried) == (shortest, [16384]), "nor for a little more sparsity"
    assert found(0.9) == shortest
    assert max(tried[1:], default=0) < shortest, "a sparser site pays from there at the latest"
    assert (found(0.8), tried) == (shortest, [16384]), "between two that pay from the same length"


def measured_speed(sparsity, stopwatch):
    sample = Operands(*(torch.zeros(1, 1, 16384, 16) for _ in range(3)), CAUSAL, 1.0)
    return MEASURE(sample, SparseCall.uniform(1, KEEP_ALL), sparsity, stopwatch)


def test_a_block_shape_that_loses_clearly_at_the_first_sites_is_not_explored_again():
    wide, narrow, square = BlockShape(128, 128), BlockShape(128, 64), BlockShape(64, 64)
    sample, shapes, stopwatch = operands(), [wide, narrow, square], Stopwatch()
    stopwatch.learn_shapes(sample, {wide: 1.0, narrow: 1.2, square: 1.9})
    assert stopwatch.contenders(sample, shapes) == shapes, "one site says nothing of others"
    stopwatch.learn_shapes(sample, {wide: 1.0, narrow: 1.4, square: 1.3})
    assert stopwatch.contenders(sample, shapes) == [wide, narrow], "the second was close at one site"
    stopwatch.learn_shapes(sample, {wide: 1.0, narrow: 1.1})
    assert stopwatch.contenders(sample, shapes) == [wide, narrow], "what is not explored stays out"
    assert stopwatch.contenders(operands(length=512), shapes) == shapes, "another length is another question"


def test_sites_explore_the_contenders_only(monkeypatch):
    shapes = (BlockShape(64, 64), BlockShape(128, 64))
    times = {shapes[0]: 1.0, shapes[1]: 3.0}
    monkeypatch.setattr(Stopwatch, "attention_ms", lambda self, sample, call: times[call.shape])
    monkeypatch.setattr(Stopwatch, "predictor_ms", lambda self, *_: 0.0)
    stopwatch = Stopwatch()
    results = [tune_site([operands(seed)], TuneSettings(shapes=shapes), stopwatch=stopwatch) for seed in range(3)]
    explored = [{c.call.shape for c in result.curves if c.stage == "explore"} for result in results]
    assert explored == [set(shapes), set(shapes), {shapes[0]}]


def test_a_known_dense_time_is_taken_where_sparse_is_far_from_it(monkeypatch):
    rounds = []

    def times(calls, **_):
        rounds.append(len(calls))
        return Times((10.0, sparse_ms)[-len(calls) :], busy=False)

    monkeypatch.setattr(speed, "timed", times)
    monkeypatch.setattr(speed, "SHORTEST", 16384)
    stopwatch = Stopwatch()
    for sparse_ms, timed in ((4.0, [2]), (4.9, [1]), (5.1, [1, 2]), (10.0, [1, 2])):
        rounds.clear()
        found = measured_speed(0.5, stopwatch)
        assert (found.dense_ms, found.sparse_ms) == (10.0, sparse_ms)
        assert rounds == timed
        assert (found.min_length is None) == (sparse_ms > 9.7)


def test_the_call_that_confirms_is_timed_again_only_where_it_was_slow(monkeypatch):
    monkeypatch.setattr(speed, "clocked", lambda call, device: (None, lambda: 3.0))
    monkeypatch.setattr(Stopwatch, "dense_and_sparse_ms", lambda self, *_: (10.0, 9.9, False))
    for confirmed, taken in ((4.9, 4.9), (5.1, 3.0), (None, 3.0)):
        call = SparseCall.uniform(HEADS, 0.0, theta=0.0)
        found = MEASURE(operands(), call, 0.5, Stopwatch(), dense_ms=10.0, sparse_ms=confirmed)
        assert (found.dense_ms, found.sparse_ms) == (10.0, taken)


def test_the_call_that_confirms_is_the_one_at_the_thresholds(monkeypatch):
    calls = []

    def clocked(call, device):
        calls.append(call.args[1])
        return call(), lambda: 7.0

    monkeypatch.setattr(site, "clocked", clocked)
    result = tune_site([operands()], TuneSettings(tolerance=0.05, shapes=SQUARE))
    assert result.confirmed_ms == 7.0
    assert calls[-1].tau == result.call.tau


def test_what_the_kernel_errs_is_what_is_recorded(monkeypatch):
    monkeypatch.setattr(site, "relative_l1", lambda *_: torch.full((1, HEADS), 0.0123))
    result = tune_site([operands(), operands(1)], TuneSettings(tolerance=0.05, shapes=SQUARE))
    sparse = ~dense_heads(result.call)
    assert sparse.any()
    assert result.measured.error[0, sparse].tolist() == pytest.approx([0.0123] * int(sparse.sum()))
    assert 0.03 < result.measured.error[1].max() <= 0.05


def test_one_sample_is_validated_on_disjoint_windows():
    result = tune_site([operands()], TuneSettings(tolerance=0.05, shapes=SQUARE))
    assert result.measured.error.shape == (WINDOWS, HEADS)
    assert (result.measured.error <= 0.05).all()


def test_a_batch_is_as_many_inputs():
    result = tune_site([operands(batch=3)], TuneSettings(tolerance=0.05, shapes=SQUARE))
    assert result.measured.error.shape == (3, HEADS)


def test_what_cannot_be_sparse_is_dense_and_says_why():
    sample = operands()
    flat = replace(sample, q=torch.zeros_like(sample.q))
    result = tune_site([flat], TuneSettings())
    assert result.call.is_dense
    assert result.dense_reason == "no threshold keeps any head's error within 0.055"
    assert result.measured.sparsity.tolist() == [0.0] * HEADS


def test_a_nan_in_one_head_leaves_the_others_alone():
    settings = TuneSettings(tolerance=0.07, shapes=SQUARE)
    clean = tune_site([operands()], settings).call.dense_heads
    sample = operands()
    sample.q[0, 1, 100] = torch.nan
    result = tune_site([sample], settings)
    assert not clean[1]
    assert result.call.dense_heads == (clean[0], True, *clean[2:])
    assert not all(result.call.dense_heads)
    assert result.measured.error.isfinite().all()


def test_relative_l1_over_windows_covers_every_row_once():
    out, dense = torch.randn(2, 3, 500, 8), torch.randn(2, 3, 500, 8)
    whole = (out - dense).abs().sum((2, 3)) / dense.abs().sum((2, 3))
    torch.testing.assert_close(relative_l1(out, dense), whole)
    split = relative_l1(out, dense, windows=5, block=64)
    edges = [0, 64, 192, 256, 384, 500]
    for window, (a, b) in enumerate(itertools.pairwise(edges)):
        expected = (out - dense)[:, :, a:b].abs().sum((2, 3)) / dense[:, :, a:b].abs().sum((2, 3))
        torch.testing.assert_close(split[2 * window : 2 * window + 2], expected)


def test_relative_l1_of_nothing_is_zero():
    zeros = torch.zeros(1, 2, 10, 4)
    assert relative_l1(zeros, zeros).tolist() == [[0.0, 0.0]]


def test_paper_spends_what_algorithm_1_prints_and_less_after_a_warm_start():
    samples = [operands(seed) for seed in range(5)]
    counts = []
    earlier: gp.Posterior | None = None
    for _ in range(2):
        meter = Meter(samples)
        low = low_fidelity(meter, 64, windows=1)
        space = paper.Space(SparseCall.uniform(HEADS, KEEP_ALL), 0.055, "corrected")
        earlier = paper.algorithm_1(low, meter, space, earlier).posterior
        counts.append((low.calls, meter.calls))
    (cold_low, cold_high), (warm_low, warm_high) = counts
    assert (cold_low, warm_low) == (15, 8)
    # At most two regions of 4 (3) binary steps, and 5 validations, repeated once after the fallback.
    assert cold_high in {5 + 4, 5 + 8, 10 + 4, 10 + 8, 5, 10}
    assert warm_high in {5 + 3, 5 + 6, 10 + 3, 10 + 6, 5, 10}


def test_paper_calibrates_again_with_the_budget_that_it_prints():
    samples = [operands(seed) for seed in range(5)]
    meter = Meter(samples)
    low = low_fidelity(meter, 64, windows=1)
    space = paper.Space(SparseCall.uniform(HEADS, KEEP_ALL), 0.055, "corrected")
    paper.algorithm_1(low, meter, space, None, paper.AGAIN)
    assert low.calls == 8
    assert meter.calls in {5 + 2, 5 + 4, 10 + 2, 10 + 4, 5, 10}


def test_regions_are_the_two_rightmost_runs_under_the_bound():
    mean = torch.full((2, len(paper.GRID)), 1.0).double()
    for low, high in ((20, 40), (80, 90), (120, 160)):
        mean[0, low : high + 1] = 0.0
    regions = paper.low_ucb_regions(paper.gp.Posterior(mean, torch.zeros_like(mean)), 0.055)
    found = [(low[0].item(), high[0].item(), bool(exists[0])) for low, high, exists in regions]
    assert found == [(pytest.approx(0.6), pytest.approx(0.8), True), (pytest.approx(0.4), pytest.approx(0.45), True)]
    assert [bool(exists[1]) for _, _, exists in regions] == [False, False]


@pytest.mark.parametrize("reading", ["corrected", "paper"])
def test_paper_ends_on_the_diagonal_of_eq_2(reading):
    result = tune_site([operands()], TuneSettings(method="paper", parameterization=reading))
    s = (0.85 - torch.tensor(result.call.theta)) / 1.0
    expected = at_latent(result.call, s, reading)
    assert result.call.tau == pytest.approx(expected.tau, abs=1e-5)
    assert result.call.lam == pytest.approx(expected.lam, abs=1e-4)


def test_the_default_finds_more_than_the_paper():
    samples = [operands(0), operands(1)]
    default, printed = (tune_site(samples, TuneSettings(method=method)) for method in ("afbs", "paper"))
    assert default.measured.sparsity.mean() > printed.measured.sparsity.mean()
