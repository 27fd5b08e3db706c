"""``method="paper"``: Algorithm 1 (AFBS-BO) as it is printed, for every head of a site at once.

It is kept as the paper has it, with the weaknesses that docs/limits.md lists: expected improvement minimises the error,
a head that is better than the band keeps s = 0, and the one fallback step is not checked. What is measured at the
thresholds it ends with is recorded all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.call import SparseCall
from afbs_compile.recipe import Stage
from afbs_compile.tuner import gp
from afbs_compile.tuner.measure import Measurement, Meter
from afbs_compile.tuner.space import Parameterization, at_latent

INITIAL = (0.2, 0.5, 0.8)


class Steps(NamedTuple):
    """How many evaluations a site takes: by expected improvement after the initial ones, and by binary search."""

    improvement: int
    binary: int


COLD, WARM = Steps(12, 4), Steps(5, 3)
"""15 and 8 evaluations with the three initial ones."""

AGAIN = Steps(5, 2)
"""The "reduced search budget (8 BO iterations, 2 binary iterations)" of a re-tuning cycle, section III-D."""

REGIONS = 2
BAND_SHARE = 0.045 / 0.055
"""eps_low as a share of eps_high: the printed band is [0.045, 0.055]."""

FALLBACK = 0.9
CONFIDENCE = 1.0
"""Standard deviations above the mean that a promising region's error must stay under (the paper's UCB, unnamed)."""

GRID = torch.linspace(0, 1, 201)


@dataclass(frozen=True)
class Trial:
    """One evaluation: the stage it belongs to, tokens, ``s [H]``, and what all heads measured there."""

    stage: Stage
    length: int
    s: Tensor
    call: SparseCall
    measured: Measurement


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        call: policy, block shape and what is kept, which the search leaves alone.
        tolerance: eps_high; eps_low is 45/55 of it.
        parameterization: which reading of Eq. 2.
    """

    call: SparseCall
    tolerance: float
    parameterization: Parameterization


class _Logged:
    """A meter of a stage that keeps every trial."""

    def __init__(self, meter: Meter, stage: Stage, space: Space, trials: list[Trial]) -> None:
        self.meter, self.stage, self.space, self.trials = meter, stage, space, trials

    def __call__(self, s: Tensor) -> Measurement:
        call = at_latent(self.space.call, s, self.space.parameterization)
        measured = self.meter(call)
        self.trials.append(Trial(self.stage, self.meter.length, s.clone(), call, measured))
        return measured


@dataclass(frozen=True)
class PaperResult:
    """Where Algorithm 1 ended.

    Attributes:
        call: with its thresholds; measured: on every validation input.
        posterior: the landscape to start the next site from.
        trials: everything that was evaluated, in order.
    """

    call: SparseCall
    measured: Measurement
    posterior: gp.Posterior
    trials: tuple[Trial, ...]


def algorithm_1(
    low: Meter, high: Meter, space: Space, earlier: gp.Posterior | None, steps: Steps | None = None
) -> PaperResult:
    """Stages 1 to 3.

    Args:
        low, high: meters at low and high fidelity; ``high`` holds the validation inputs, its first sample is searched.
        space: what is searched.
        earlier: the previous site's landscape; with it, fewer steps are made (warm start).
        steps: how many are made, if not so many.
    """
    trials: list[Trial] = []
    steps = steps or (COLD if earlier is None else WARM)
    posterior = stage_1(low.heads, _Logged(low, "explore", space, trials), steps.improvement, earlier)
    search = high.prefix(high.length, samples=1, windows=1)
    s = stage_2(_Logged(search, "refine", space, trials), posterior, space.tolerance, steps.binary)
    high.calls += search.calls
    high.evaluations += search.evaluations
    s, measured = stage_3(_Logged(high, "validate", space, trials), s, space.tolerance)
    return PaperResult(at_latent(space.call, s, space.parameterization), measured, posterior, tuple(trials))


def stage_1(
    heads: int, measure: Callable[[Tensor], Measurement], steps: int, earlier: gp.Posterior | None
) -> gp.Posterior:
    """Bayesian optimisation of the error at low fidelity (lines 1 to 14); ``measure`` takes ``s [H]``."""
    prior = torch.zeros(heads, len(GRID), dtype=torch.float64)
    if earlier is not None:
        prior = earlier.mean if earlier.mean.shape[0] == heads else earlier.mean.mean(0).expand(heads, -1)
    points = [torch.full((heads,), s) for s in INITIAL]
    errors = [measure(s).worst for s in points]
    for _ in range(steps):
        posterior = gp.fit(torch.stack(points, -1), torch.stack(errors, -1), GRID, prior)
        improvement = gp.expected_improvement(posterior, torch.stack(errors, -1).amin(-1))
        points.append(GRID[improvement.argmax(-1)])
        errors.append(measure(points[-1]).worst)
    return gp.fit(torch.stack(points, -1), torch.stack(errors, -1), GRID, prior)


def low_ucb_regions(posterior: gp.Posterior, tolerance: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """At most two intervals of s whose upper confidence bound is within the tolerance (line 15).

    Returns:
        ``(low, high, exists)``, each ``[H]``, the interval of largest s first: it is the one with most to skip.
    """
    below = posterior.mean + CONFIDENCE * posterior.deviation <= tolerance
    starts = below & ~torch.nn.functional.pad(below, (1, 0))[:, :-1]
    # Number the runs of `below` from the right, 1 first.
    runs_from_left = starts.cumsum(-1)
    number = runs_from_left[:, -1:] - runs_from_left + 1
    regions = []
    for wanted in range(1, REGIONS + 1):
        member = below & (number == wanted)
        low = torch.where(member, GRID, torch.inf).amin(-1)
        high = torch.where(member, GRID, -torch.inf).amax(-1)
        exists = member.any(-1)
        regions.append((torch.where(exists, low, 0.0), torch.where(exists, high, 0.0), exists))
    return regions


def stage_2(measure: Callable[[Tensor], Measurement], posterior: gp.Posterior, tolerance: float, steps: int) -> Tensor:
    """Binary search at high fidelity in each region (lines 16 to 36): ``s [H]``, 0 where nothing was accepted."""
    best_s = torch.zeros(len(posterior.mean))
    best_sparsity = torch.zeros_like(best_s)
    for low, high, exists in low_ucb_regions(posterior, tolerance):
        if not exists.any():
            continue
        for _ in range(steps):
            middle = (low + high) / 2
            measured = measure(middle)
            within = measured.worst <= tolerance
            in_band = within & (measured.worst >= BAND_SHARE * tolerance) & exists
            sparser = in_band & (measured.sparsity > best_sparsity)
            best_s = torch.where(sparser, middle, best_s)
            best_sparsity = torch.where(sparser, measured.sparsity, best_sparsity)
            low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return best_s


def stage_3(measure: Callable[[Tensor], Measurement], s: Tensor, tolerance: float) -> tuple[Tensor, Measurement]:
    """Validate on every input; where the worst fails, one step back to 0.9 s that is not judged (lines 37 to 48)."""
    measured = measure(s)
    failing = ~(measured.worst <= tolerance)
    if not failing.any():
        return s, measured
    s = torch.where(failing, FALLBACK * s, s)
    return s, measure(s)
