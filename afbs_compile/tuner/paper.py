"""``method="paper"``: Algorithm 1 (AFBS-BO) as it is printed, for every head of a site at once.

It is kept as the paper has it, with the weaknesses that README.md lists: expected improvement minimises the error,
a head that is better than the band keeps s = 0, and the one fallback step is not checked. What is measured at the
thresholds it ends with is recorded all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.tuner import gp
from afbs_compile.tuner.measure import Measurement, Meter
from afbs_compile.tuner.space import Parameterization, Thresholds, latent_to_thresholds

INITIAL = (0.2, 0.5, 0.8)
EI_STEPS, WARM_EI_STEPS = 12, 5  # 15 and 8 evaluations with the three initial ones
BINARY_STEPS, WARM_BINARY_STEPS = 4, 3
REGIONS = 2
BAND_SHARE = 0.045 / 0.055
"""eps_low as a share of eps_high: the printed band is [0.045, 0.055]."""

FALLBACK = 0.9
CONFIDENCE = 1.0
"""Standard deviations above the mean that a promising region's error must stay under (the paper's UCB, unnamed)."""

GRID = torch.linspace(0, 1, 201)


@dataclass(frozen=True)
class PaperResult:
    """Where Algorithm 1 ended: thresholds, what they measure on every input, and the landscape to start from next."""

    thresholds: Thresholds
    measured: Measurement
    posterior: gp.Posterior


def algorithm_1(
    low: Meter,
    high: Meter,
    tolerance: float,
    parameterization: Parameterization,
    earlier: gp.Posterior | None,
) -> PaperResult:
    """Stages 1 to 3.

    Args:
        low, high: meters at low and high fidelity; ``high`` holds the validation inputs, its first sample is searched.
        tolerance: eps_high; eps_low is 45/55 of it.
        parameterization: which reading of Eq. 2.
        earlier: the previous site's landscape; with it, fewer steps are made (warm start).
    """
    posterior = stage_1(low, tolerance, parameterization, earlier)
    steps = BINARY_STEPS if earlier is None else WARM_BINARY_STEPS
    search = high.prefix(high.length, samples=1, windows=1)
    s = stage_2(search, posterior, tolerance, parameterization, steps)
    high.evaluations += search.evaluations
    thresholds, measured = stage_3(high, s, tolerance, parameterization)
    return PaperResult(thresholds, measured, posterior)


def stage_1(
    meter: Meter, tolerance: float, parameterization: Parameterization, earlier: gp.Posterior | None
) -> gp.Posterior:
    """Bayesian optimisation of the error at low fidelity (lines 1 to 14)."""
    heads = meter.heads
    prior = torch.zeros(heads, len(GRID), dtype=torch.float64)
    if earlier is not None:
        prior = earlier.mean if earlier.mean.shape[0] == heads else earlier.mean.mean(0).expand(heads, -1)
    points = [torch.full((heads,), s) for s in INITIAL]
    errors = [meter(latent_to_thresholds(s, parameterization)).worst for s in points]
    for _ in range(EI_STEPS if earlier is None else WARM_EI_STEPS):
        posterior = gp.fit(torch.stack(points, -1), torch.stack(errors, -1), GRID, prior)
        improvement = gp.expected_improvement(posterior, torch.stack(errors, -1).amin(-1))
        points.append(GRID[improvement.argmax(-1)])
        errors.append(meter(latent_to_thresholds(points[-1], parameterization)).worst)
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


def stage_2(
    meter: Meter, posterior: gp.Posterior, tolerance: float, parameterization: Parameterization, steps: int
) -> Tensor:
    """Binary search at high fidelity in each region (lines 16 to 36): ``s [H]``, 0 where nothing was accepted."""
    best_s = torch.zeros(meter.heads)
    best_sparsity = torch.zeros(meter.heads)
    for low, high, exists in low_ucb_regions(posterior, tolerance):
        if not exists.any():
            continue
        for _ in range(steps):
            middle = (low + high) / 2
            measured = meter(latent_to_thresholds(middle, parameterization))
            within = measured.worst <= tolerance
            in_band = within & (measured.worst >= BAND_SHARE * tolerance) & exists
            sparser = in_band & (measured.sparsity > best_sparsity)
            best_s = torch.where(sparser, middle, best_s)
            best_sparsity = torch.where(sparser, measured.sparsity, best_sparsity)
            low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return best_s


def stage_3(
    meter: Meter, s: Tensor, tolerance: float, parameterization: Parameterization
) -> tuple[Thresholds, Measurement]:
    """Validate on every input; where the worst fails, one step back to 0.9 s that is not judged (lines 37 to 48)."""
    thresholds = latent_to_thresholds(s, parameterization)
    measured = meter(thresholds)
    failing = ~(measured.worst <= tolerance)
    if not failing.any():
        return thresholds, measured
    thresholds = latent_to_thresholds(torch.where(failing, FALLBACK * s, s), parameterization)
    return thresholds, meter(thresholds)
