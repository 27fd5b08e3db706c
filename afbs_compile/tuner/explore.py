"""Stage 1 of ``method="afbs"``: choose theta for each head on short sequences, where an evaluation is cheap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afbs_compile.kernels.reference import THETA_OFF
from afbs_compile.tuner.bracket import Operating, bracket_tau
from afbs_compile.tuner.measure import Meter
from afbs_compile.tuner.space import THETAS

EXPLORE_STEPS = 4
"""Evaluations per theta: enough to rank the thetas, not to place tau."""

LOW_FIDELITY_SHARE = 4
"""Exploration runs at a quarter of the length, a sixteenth of the work."""

MIN_LOW_BLOCKS = 16
"""Fewer blocks than this say little about a long sequence: then exploration runs at full length."""

AGREEMENT = math.log(1.5)
"""Errors at the two fidelities further apart than a factor 1.5 do not describe the same landscape."""


def low_fidelity(meter: Meter, windows: int | None = None) -> Meter:
    """The meter to explore with: a prefix of the first sample, or the first sample whole if it is short.

    Args:
        meter: the meter at full length.
        windows: as in :class:`Meter`; the full meter's by default.
    """
    length = meter.length // LOW_FIDELITY_SHARE // meter.block_q * meter.block_q
    return meter.prefix(length if length >= MIN_LOW_BLOCKS * meter.block_q else meter.length, 1, windows)


def explore(meter: Meter, tolerance: float, *, start: Tensor | None = None, active: Tensor | None = None) -> Operating:
    """Per head, the theta of :data:`THETAS` that reaches the largest sparsity within the tolerance, and its tau.

    Args:
        meter: at either fidelity.
        tolerance: relative L1 per head and input.
        start, active: as in :func:`bracket_tau`.
    """
    best = Operating.dense(meter.heads)
    for value in THETAS:
        theta = torch.full((meter.heads,), value)
        best = best.better_of(bracket_tau(meter, theta, tolerance, steps=EXPLORE_STEPS, start=start, active=active))
    return best


def explore_again(meter: Meter, low: Operating, tolerance: float) -> Operating:
    """Repeat the exploration at full length for the heads whose short sequences cannot be trusted.

    They are those whose error at full length differs from the short one's, and those that would use a theta: how
    much a theta saves changes with the length even where the error agrees.

    Args:
        meter: at full length.
        low: what the exploration on short sequences found.
        tolerance: relative L1 per head and input.
    """
    apart = torch.log(meter(low.thresholds).worst / low.error).abs()
    doubtful = ~(apart <= AGREEMENT) | (low.thresholds.theta != THETA_OFF)
    if not doubtful.any():
        return low
    full = explore(meter, tolerance, start=low.thresholds.tau, active=doubtful)
    return Operating(
        full.thresholds.where(doubtful, low.thresholds),
        torch.where(doubtful, full.sparsity, low.sparsity),
        torch.where(doubtful, full.error, low.error),
    )
