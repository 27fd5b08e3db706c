"""Stage 2 of ``method="afbs"``: place tau, then lambda, at full length on every sample."""

from __future__ import annotations

import torch

from afbs_compile.tuner.bracket import Operating, bracket_tau
from afbs_compile.tuner.measure import Meter
from afbs_compile.tuner.space import LAMBDAS, Thresholds

REFINE_STEPS = 8


def refine_tau(meter: Meter, explored: Operating, tolerance: float) -> Operating:
    """Bracket tau at full length from where the exploration left it, at the theta it chose."""
    chosen = explored.thresholds
    return bracket_tau(meter, chosen.theta, tolerance, steps=REFINE_STEPS, start=chosen.tau)


def refine_lambda(meter: Meter, found: Operating, tolerance: float) -> Operating:
    """The most eager lambda of :data:`LAMBDAS` per head that stays within the tolerance, else off."""
    thresholds, error = found.thresholds, found.error
    open_heads = ~thresholds.is_dense
    for lam in LAMBDAS:
        if not open_heads.any():
            break
        eager = torch.where(open_heads, lam, thresholds.lam)
        worst = meter(Thresholds(thresholds.tau, thresholds.theta, eager)).worst
        accepted = open_heads & (worst <= tolerance)
        thresholds = Thresholds(thresholds.tau, thresholds.theta, torch.where(accepted, lam, thresholds.lam))
        error = torch.where(accepted, worst, error)
        open_heads &= ~accepted
    return Operating(thresholds, found.sparsity, error)
