"""Calibration with a budget on the output: one threshold for all heads, found and checked on what the model returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.recipe import BudgetRecord
from afbs_compile.tuner.budget import Budget
from afbs_compile.tuner.family import MOST, Contender, Family, contenders, fastest
from afbs_compile.tuner.measure import Meter, attend_sparsely, nothing_to_skip
from afbs_compile.tuner.progress import budget_progress
from afbs_compile.tuner.result import SiteResult
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.site import with_speed
from afbs_compile.tuner.space import all_dense, dense_heads
from afbs_compile.tuner.speed import Stopwatch
from afbs_compile.tuner.threshold import MOST_STEPS_BACK, TRIES, TRIES_OF_CONTENDER, Judge, about, spend


def tune_with_budget(
    runs: Sequence[SampleRun], settings: TuneSettings, budget: Budget
) -> tuple[dict[str, SiteResult], list[int], BudgetRecord]:
    """Choose one threshold for all sites of a graph under a budget.

    What is chosen then runs site by site, each on what the sparse sites before it make, to record its errors and its
    speed; a site that is not faster stays dense, and its part of the budget stays unspent.

    Args:
        runs: samples.
        settings: how to tune; budget: of the output.

    Returns:
        Results by site, the lengths at the sites, and how the budget was spent.

    Raises:
        OptionError: the graph returns no such output, or no tokens are known to compute a perplexity on.
    """
    stopwatch, judge = Stopwatch(), Judge(runs, budget)
    sites = runs[0].sites
    results: dict[str, SiteResult] = {}
    lengths: set[int] = set()
    passes = TRIES_OF_CONTENDER * MOST + TRIES + MOST_STEPS_BACK + 2
    with budget_progress(2 * len(sites) + passes) as advance:
        among, kept = contenders(runs, settings, stopwatch, advance)
        family, start = _fastest_within(judge, among, advance)
        spending = spend(judge, family.at, advance, start)
        calls = family.at(spending.threshold)
        with closing(capture(runs, lambda name, operands: attend_sparsely(operands, calls[name]))) as walk:
            for name, operands in walk:
                result = _settled(operands, calls[name], stopwatch)
                results[name] = replace(result, kept_tried=kept[name].tried)
                lengths |= {sample.k_len for sample in operands}
                advance()
    stopwatch.remember()
    record = BudgetRecord(
        quantity=budget.quantity,
        limit=budget.limit,
        measured=_significant(spending.measured),
        chosen_on=judge.chosen_on,
        checked=None if spending.checked is None else _significant(spending.checked),
        checked_on=judge.checked_on,
        steps_back=spending.steps_back,
        forward_passes=judge.evaluations + 1,
        checked_upper=None if spending.upper is None else _significant(spending.upper),
        unit=judge.unit,
        threshold=_significant(spending.threshold),
    )
    return results, sorted(lengths), record


def _fastest_within(
    judge: Judge, among: Sequence[Contender], progress: Callable[[], None]
) -> tuple[Family, float | None]:
    """The family that is fastest where each spends the budget, and about the threshold where it does."""
    if len(among) == 1:
        return among[0].family, None
    starts = [about(judge, each.family.at, progress, tries=TRIES_OF_CONTENDER) for each in among]
    chosen = fastest([each.ms(start) for each, start in zip(among, starts, strict=True)])
    return among[chosen].family, starts[chosen]


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def _settled(samples: Sequence[Operands], chosen: SparseCall, stopwatch: Stopwatch) -> SiteResult:
    """What the chosen threshold of a site does to its heads on every sample, and how fast it is."""
    meter = Meter(samples)
    found = meter(chosen)
    works = (found.error.isfinite().all(0) & (found.sparsity > 0)).tolist()
    call = chosen.where(works, all_dense(chosen))
    result = SiteResult(call, found.only(~dense_heads(call)), None, None, meter.evaluations)
    longest = max(samples, key=lambda sample: sample.q_len * sample.k_len)
    nothing = (
        nothing_to_skip(samples, chosen.kept, [chosen.shape])
        or "the budget on the output leaves every head of it dense"
    )
    return with_speed(result, longest.element(0), stopwatch, nothing)
