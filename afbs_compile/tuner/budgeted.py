"""Calibration with a budget on the output: measure every head's curve, choose for all together, measure what runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from afbs_compile.errors import OptionError
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.recipe import BudgetRecord
from afbs_compile.tuner.budget import REFERENCE_ERROR, Budget, SitePoints, spend
from afbs_compile.tuner.curves import SMALLEST, Curves
from afbs_compile.tuner.end_to_end import EndToEnd
from afbs_compile.tuner.explore import explore
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.measure import Meter, attend_sparsely, nothing_to_skip
from afbs_compile.tuner.progress import budget_progress
from afbs_compile.tuner.result import SiteResult
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.site import fastest_shape, with_speed
from afbs_compile.tuner.space import dense_heads
from afbs_compile.tuner.speed import Stopwatch
from afbs_compile.tuner.validate import DECIMALS

POINTS = 24
"""Thresholds on the curve of each head, from ``tau = 0`` to ``1 - SMALLEST``, evenly in the log of ``1 - tau``."""


@dataclass(frozen=True)
class MeasuredSite:
    """One site before anything is decided: its operating points, the curves they come from, and what that cost."""

    points: SitePoints
    curves: tuple[Curves, ...]
    evaluations: float


def tune_with_budget(
    runs: Sequence[SampleRun], settings: TuneSettings, budget: Budget
) -> tuple[dict[str, SiteResult], list[int], BudgetRecord]:
    """Choose the thresholds of all sites of a graph under one budget.

    The first half of the samples chooses, the second half checks. What is chosen then runs site by site, each on what
    the sparse sites before it make, to record its errors and its speed; a site that is not faster stays dense, and its
    part of the budget stays unspent.

    Args:
        runs: samples.
        settings: how to tune; budget: of the output.

    Returns:
        Results by site, the lengths at the sites, and how the budget was spent.

    Raises:
        OptionError: the graph returns no logits, or no tokens are known to compute a perplexity on.
    """
    half = (len(runs) + 1) // 2
    choosing, checking = _end_to_end(runs[:half], budget), _end_to_end(runs[half:], budget)
    assert choosing is not None  # there is at least one sample
    stopwatch = Stopwatch()
    names = [site.name for site in runs[0].sites]
    heads = sum(site.heads for site in runs[0].sites)
    results: dict[str, SiteResult] = {}
    lengths: set[int] = set()
    with budget_progress(2 * len(names) + heads) as advance:
        measured = {}
        with closing(capture(runs[:half])) as walk:
            for name, operands in walk:
                measured[name] = measure(name, operands, settings, stopwatch)
                advance()
        sites = [measured[name].points for name in names]
        spending = spend(sites, choosing, checking, budget, advance)
        chosen = {site.name: site.at(spending.points[site.name]) for site in sites}
        with closing(capture(runs, lambda name, operands: attend_sparsely(operands, chosen[name]))) as walk:
            for name, operands in walk:
                results[name] = _settled(operands, chosen[name], measured[name], stopwatch)
                lengths |= {sample.k_len for sample in operands}
                advance()
    record = BudgetRecord(
        quantity=budget.quantity,
        limit=budget.limit,
        measured=round(spending.measured, 6),
        chosen_on=half,
        checked=None if spending.checked is None else round(spending.checked, 6),
        checked_on=len(runs) - half,
        steps_back=spending.steps_back,
        forward_passes=choosing.evaluations + (0 if checking is None else checking.evaluations),
    )
    return results, sorted(lengths), record


def _end_to_end(runs: Sequence[SampleRun], budget: Budget) -> EndToEnd | None:
    if not runs:
        return None
    model = EndToEnd(runs)
    if budget.quantity == "perplexity" and not model.knows_next_tokens:
        raise OptionError(
            "tolerance: a budget on perplexity needs the tokens, and no integer input is shaped like the positions of "
            "the logits; accepted: a model of input_ids that returns the logits of every position, or {'kl': nats}"
        )
    return model


def measure(name: str, samples: Sequence[Operands], settings: TuneSettings, stopwatch: Stopwatch) -> MeasuredSite:
    """Error and live work of every head of a site over tau, at the policy, theta and block shape that suit it best.

    Args:
        name: of the site; samples: its operands.
        settings: block shapes to compare.
        stopwatch: what timing earlier sites has shown.
    """
    inputs = SiteInputs(samples)
    explored = explore(inputs, REFERENCE_ERROR, settings.shapes_on(samples[0].device), stopwatch)
    choice = explored[fastest_shape(inputs, explored, stopwatch)]
    x = torch.linspace(0, math.log(SMALLEST), POINTS)
    tau = torch.round((1 - torch.exp(x)).expand(inputs.heads, -1), decimals=DECIMALS)
    passes = [inputs.curve(i, tau, choice.call) for i in range(len(inputs.elements))]
    found = [curve.cpu() for curve in passes]
    # What several inputs do to the output is averaged, and grows with the square of the error.
    error = torch.stack([curve.overall for curve in found]).square().mean(0).sqrt()
    sparsity = torch.stack([curve.sparsity for curve in found]).mean(0)
    everything = torch.ones(inputs.heads, dtype=torch.bool)
    curve = Curves("refine", inputs.length, choice.call, tau, error, sparsity, everything)
    curves = (*(c for each in explored.values() for c in each.curves), curve)
    return MeasuredSite(_points(name, curve), curves, inputs.evaluations)


def _points(name: str, curve: Curves) -> SitePoints:
    def after(dense: float, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full((len(values), 1), dense), values], 1)

    return SitePoints(
        name,
        curve.call,
        tau=after(KEEP_ALL, curve.tau),
        error=after(0.0, torch.where(curve.error.isfinite(), curve.error, torch.nan)),
        live=after(1.0, 1 - curve.sparsity),
    )


def _settled(
    samples: Sequence[Operands], chosen: SparseCall, measured: MeasuredSite, stopwatch: Stopwatch
) -> SiteResult:
    """What the chosen thresholds of a site do to its heads on every sample, and how fast they are."""
    meter = Meter(samples)
    found = meter(chosen).only(~dense_heads(chosen))
    result = SiteResult(chosen, found, None, None, measured.evaluations + meter.evaluations, curves=measured.curves)
    longest = max(samples, key=lambda sample: sample.q_len * sample.k_len)
    nothing = (
        nothing_to_skip(samples, chosen.kept, [chosen.shape])
        or "the budget on the output leaves every head of it dense"
    )
    return with_speed(result, longest.element(0), stopwatch, nothing)
