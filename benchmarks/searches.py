"""The searches that one-pass calibration is compared with, every head of a site at once, on the same evaluations.

Each takes a :class:`Search`, tries thresholds through it, and leaves the best feasible ones of every head there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from afbs_compile.kernels.call import KEEP_ALL, LAMBDA_OFF, THETA_OFF, Kept, SparseCall
from afbs_compile.tuner import gp
from afbs_compile.tuner.measure import Measurement, Meter, low_fidelity
from afbs_compile.tuner.paper import COLD, GRID, Space, algorithm_1, stage_1
from afbs_compile.tuner.space import LAMBDA_RANGE, TAU_RANGE, THETA_RANGE, at_latent

X_MIN = math.log(5e-4)
"""Searches over tau run in x = log(1 - tau), from here to 0."""

SPARGE_THETAS, SPARGE_STEPS = 32, 10


class Search:
    """Evaluates thresholds on a site and keeps each head's sparsest that hold the tolerance.

    Attributes:
        best: the call with the best thresholds, DENSE where none held; sparsity: ``[H]``, what they skip.
        path: (sparse calls, dense equivalents, mean best sparsity, mean error tried) after each evaluation.
    """

    def __init__(self, meter: Meter, kept: Kept, tolerance: float) -> None:
        self.meter, self.tolerance = meter, tolerance
        self.best, self.sparsity = SparseCall.uniform(meter.heads, KEEP_ALL, kept=kept), torch.zeros(meter.heads)
        self.path: list[tuple[float, float, float, float]] = []

    def at(self, tau: Tensor, theta: Tensor | float = THETA_OFF, lam: Tensor | float = LAMBDA_OFF) -> SparseCall:
        """The call at some thresholds, ``[H]`` or one number."""
        columns = (torch.as_tensor(values).expand(self.meter.heads).tolist() for values in (tau, theta, lam))
        tau, theta, lam = map(tuple, columns)
        return replace(self.best, tau=tau, theta=theta, lam=lam)

    def __call__(self, call: SparseCall) -> Measurement:
        """Measure on every input."""
        measured = self.meter(call)
        self.keep(call, measured)
        return measured

    def keep(self, call: SparseCall, measured: Measurement) -> None:
        """Count an evaluation and take it over where it is feasible and sparser."""
        better = (measured.worst <= self.tolerance) & (measured.sparsity > self.sparsity)
        self.best = call.where(better.tolist(), self.best)
        self.sparsity = torch.where(better, measured.sparsity, self.sparsity)
        self.path.append(
            (self.meter.calls, self.meter.evaluations, float(self.sparsity.mean()), float(measured.worst.mean()))
        )


def exhaustive(search: Search, points: int = 64) -> None:
    """Every tau of a fine grid, theta and lambda off: what a search over tau could reach."""
    for x in torch.linspace(X_MIN, 0, points):
        search(search.at(1 - torch.exp(x)))


def _bisect(search: Search, theta: float, tolerance: float, steps: int) -> Tensor:
    """Bisection on x for one theta: the largest feasible x found, ``[H]``."""
    low = torch.full((search.meter.heads,), X_MIN)
    high = torch.zeros_like(low)
    for _ in range(steps):
        x = (low + high) / 2
        good = search(search.at(1 - torch.exp(x), theta)).worst <= tolerance
        low, high = torch.where(good, x, low), torch.where(good, high, x)
    return low


def bisection(search: Search) -> None:
    """Plain bisection on tau, theta and lambda off."""
    _bisect(search, THETA_OFF, search.tolerance, 12)


def sparge_grid(search: Search) -> None:
    """SpargeAttn's tuner: 32 similarity thresholds; for each, bisection on tau, then on lambda within what is left.

    Its two bounds l1 < l2 for the two filters are taken as 5/6 of the tolerance and the tolerance (0.05 and 0.06).
    """
    for theta in torch.linspace(-1, 1, SPARGE_THETAS).tolist():
        x = _bisect(search, theta, search.tolerance * 5 / 6, SPARGE_STEPS)
        low, high = torch.full_like(x, LAMBDA_RANGE[0]), torch.zeros_like(x)
        for _ in range(SPARGE_STEPS):
            lam = (low + high) / 2
            good = search(search.at(1 - torch.exp(x), theta, lam)).worst <= search.tolerance
            low, high = torch.where(good, lam, low), torch.where(good, high, lam)


def grid_175(search: Search) -> None:
    """The paper's grid of 175. It prints no axes: 7 tau x 5 theta x 5 lambda over the ranges of Eq. 2."""
    axes = zip((TAU_RANGE, THETA_RANGE, LAMBDA_RANGE), (7, 5, 5), strict=True)
    for values in itertools.product(*(torch.linspace(*bounds, count).tolist() for bounds, count in axes)):
        search(search.at(*values))


def random_50(search: Search) -> None:
    """50 draws, uniform over the ranges of Eq. 2."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        draws = torch.rand(3, search.meter.heads, generator=generator)
        bounds = (TAU_RANGE, THETA_RANGE, LAMBDA_RANGE)
        search(search.at(*(low + draw * (high - low) for draw, (low, high) in zip(draws, bounds, strict=True))))


def level_set(search: Search, steps: int = 12) -> None:
    """A Gaussian process over log(1 - tau) with the straddle acquisition for the level error = tolerance.

    Bryan et al. 2005: the next point is where ``1.96 sigma - |mu|`` is largest; theta and lambda off.
    """
    heads = search.meter.heads
    points = [torch.full((heads,), u) for u in (0.5, 0.75)]
    values: list[Tensor] = []
    prior = ((GRID - 0.7) * 6).double().expand(heads, -1)  # the log error rises with x about as x does
    for step in range(steps):
        if step >= 2:
            belief = gp.fit(torch.stack(points, -1), torch.stack(values, -1), GRID, prior)
            points.append(GRID[(1.96 * belief.deviation - belief.mean.abs()).argmax(-1)])
        error = search(search.at(1 - torch.exp(X_MIN * (1 - points[step])))).worst
        values.append(torch.log(error.clamp_min(1e-6) / search.tolerance).nan_to_num(nan=8.0).clamp(-8, 8))


def _algorithm_1(search: Search, reading: str, stages: str) -> None:
    """Algorithm 1, or its stage 1 alone with the best trial validated. Its low fidelity is not counted as feasible."""
    low = low_fidelity(search.meter, search.best.shape.q, windows=1)
    if stages == "bo":
        posterior = stage_1(low.heads, lambda s: low(at_latent(search.best, s, reading)), COLD.improvement, None)
        holds = posterior.mean <= search.tolerance
        s = torch.where(holds, GRID.double(), 0.0).amax(-1).float()
        search(at_latent(search.best, s, reading))
        search.path[-1] = (*_spent(search, low), *search.path[-1][2:])
    else:
        result = algorithm_1(low, search.meter, Space(search.best, search.tolerance, reading), None)
        for trial in result.trials:
            if trial.stage == "refine":
                search.path.append(
                    (*_spent(search, low), float(search.sparsity.mean()), float(trial.measured.worst.mean()))
                )
        # What it ends with is its answer, within the tolerance or not.
        search.best, search.sparsity = result.call, result.measured.sparsity
        search.path.append((*_spent(search, low), float(search.sparsity.mean()), float(result.measured.worst.mean())))
    search.meter.calls += low.calls * (low.length / search.meter.length) ** 2
    search.meter.evaluations += low.evaluations * (low.length / search.meter.length) ** 2


def _spent(search: Search, low: Meter) -> tuple[float, float]:
    share = (low.length / search.meter.length) ** 2
    return search.meter.calls + share * low.calls, search.meter.evaluations + share * low.evaluations


PEERS: dict[str, Callable[[Search], None]] = {
    "exhaustive tau": exhaustive,
    "SpargeAttn grid": sparge_grid,
    "grid of 175": grid_175,
    "random 50": random_50,
    "stage 1 (BO only)": lambda search: _algorithm_1(search, "corrected", "bo"),
    "Algorithm 1 literal": lambda search: _algorithm_1(search, "paper", "all"),
    "Algorithm 1 corrected": lambda search: _algorithm_1(search, "corrected", "all"),
    "GP level set": level_set,
    "bisection": bisection,
}
