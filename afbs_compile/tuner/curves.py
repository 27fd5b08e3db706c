"""Curves: error and sparsity of every head over tau, as measured. Measuring makes them, deciding reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.call import KEEP_ALL, LAMBDA_OFF, SparseCall
from afbs_compile.recipe import LARGEST_TAU_EXPONENT, SearchPath, Stage

SMALLEST = 5e-4
"""The smallest ``1 - tau`` tried: a head that needs more than 99.95 % of its block mass has next to nothing to skip."""


@dataclass(frozen=True)
class Curves:
    """What one stage measured on the heads of one site.

    Attributes:
        stage, length: as in :class:`SearchPath`.
        call: what was measured but for its taus.
        tau: fp32 ``[H, P]``, ascending: the boldest threshold first.
        error: fp32 ``[H, P]``, relative L1, worst of the inputs; sparsity: fp32 ``[H, P]``, their mean.
        measured: bool ``[H]``, heads that were measured; the rest holds no meaning.
    """

    stage: Stage
    length: int
    call: SparseCall
    tau: Tensor
    error: Tensor
    sparsity: Tensor
    measured: Tensor

    def path(self, head: int) -> SearchPath:
        """One head's curve as the recipe records it."""
        points = self.tau.shape[1]
        error = self.error[head].nan_to_num(nan=-1.0, posinf=-1.0)
        return SearchPath(
            stage=self.stage,
            length=self.length,
            policy=self.call.policy[head],
            shape=self.call.shape,
            s=(),
            tau=_rounded(self.tau[head]),
            theta=(round(self.call.theta[head], 6),) * points,
            lam=(LAMBDA_OFF,) * points,
            sparsity=_rounded(self.sparsity[head]),
            error=_rounded(error),
        )


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values.tolist())


def boldest_safe(error: Tensor, tolerance: float) -> Tensor:
    """Index of the boldest threshold that holds the tolerance, as do all that keep more.

    Args:
        error: ``[H, P]``, thresholds in ascending order of tau; NaN never holds.

    Returns:
        int64 ``[H]``; P where the last one fails.
    """
    holds = (error <= tolerance).int().flip(-1).cumprod(-1)
    return error.shape[-1] - holds.sum(-1)


@dataclass(frozen=True)
class Crossing:
    """Where curves cross the tolerance: ``tau``, 1 where even the last point fails, and ``sparsity``, ``[.., H]``."""

    tau: Tensor
    sparsity: Tensor


def crossing(tau: Tensor, error: Tensor, sparsity: Tensor, tolerance: float) -> Crossing:
    """Interpolate between the last point that fails and the first that holds: log error over log(1 - tau).

    Args:
        tau, error, sparsity: ``[.., H, P]``, as in :class:`Curves`.
    """
    index = boldest_safe(error, tolerance)
    last = error.shape[-1] - 1
    around = torch.stack([index.clamp_max(last), (index - 1).clamp(0, last)], -1)
    y = torch.log(error.clamp_min(1e-12) / tolerance).nan_to_num(nan=20.0, posinf=20.0)
    good, bad = y.gather(-1, around).unbind(-1)
    share = torch.where(index > 0, (-good / (bad - good)).nan_to_num(0.0).clamp(0, 1), 0.0)

    def between(values: Tensor) -> Tensor:
        good, bad = values.gather(-1, around).unbind(-1)
        return good + share * (bad - good)

    x = between(torch.log((1 - tau).clamp_min(1e-9)))
    none = index > last
    return Crossing(torch.where(none, KEEP_ALL, 1 - torch.exp(x)), torch.where(none, 0.0, between(sparsity)))


def tau_exponent(curves: Curves, tolerance: float) -> Tensor:
    """``a [H]`` of ``error ~ (1 - tau) ** a`` about the tolerance: least squares on the points within a factor of 3.

    About the largest error of a head where that is smaller than the tolerance.
    """
    x = torch.log((1 - curves.tau).clamp_min(1e-9))
    y = torch.log(curves.error.clamp_min(1e-12))
    largest = y.masked_fill(~y.isfinite(), -math.inf).amax(-1, keepdim=True)
    near = ((y - largest.clamp_max(math.log(tolerance))).abs() <= math.log(3)).float()
    count = near.sum(-1).clamp_min(1)
    dx = (x - ((near * x).sum(-1) / count)[:, None]) * near
    slope = (dx * y.nan_to_num(0.0)).sum(-1) / dx.square().sum(-1).clamp_min(1e-12)
    return slope.clamp(0.1, LARGEST_TAU_EXPONENT)


def one_back(curves: Sequence[Curves], tau: Tensor) -> Tensor:
    """The next more careful threshold of each head that every input was measured at, else DENSE."""
    grid = torch.cat([torch.where(c.measured[:, None], c.tau, KEEP_ALL) for c in curves if c.stage == "validate"], 1)
    return torch.where(grid > tau[:, None], grid, KEEP_ALL).amin(1)
