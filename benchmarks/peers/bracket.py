"""Find tau for one theta: a bracketing search on the level crossing error(tau) = tolerance, all heads at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.reference import LAMBDA_OFF
from afbs_compile.tuner.measure import Meter
from afbs_compile.tuner.space import Thresholds

# The search runs in x = log(1 - tau), where the log of the error is close to a straight line. The smallest 1 - tau
# tried is 5e-4: a head that needs more than 99.95 % of its block mass has next to nothing to skip.
X_MIN, X_MAX = math.log(5e-4), 0.0
X_START = math.log(0.08)

CLOSE_ENOUGH = 0.97
"""An error in [CLOSE_ENOUGH, 1] x tolerance ends a head's search: eps_low of the paper, used only to stop."""

NARROW = 0.02
"""A bracket on x narrower than this is not worth another evaluation."""


@dataclass(frozen=True)
class Operating:
    """The best thresholds found so far for each head and what they measured.

    Attributes:
        thresholds: feasible for every head (DENSE where nothing else was).
        sparsity: ``[H]``; error: ``[H]``, worst of the inputs.
    """

    thresholds: Thresholds
    sparsity: Tensor
    error: Tensor

    @staticmethod
    def dense(heads: int) -> Operating:
        """Nothing skipped, no error."""
        return Operating(Thresholds.dense(heads), torch.zeros(heads), torch.zeros(heads))

    def better_of(self, other: Operating) -> Operating:
        """Per head whichever is sparser."""
        take = other.sparsity > self.sparsity
        return Operating(
            other.thresholds.where(take, self.thresholds),
            torch.where(take, other.sparsity, self.sparsity),
            torch.where(take, other.error, self.error),
        )


def bracket_tau(
    meter: Meter,
    theta: Tensor,
    tolerance: float,
    *,
    steps: int,
    start: Tensor | None = None,
    active: Tensor | None = None,
) -> Operating:
    """Largest sparsity with ``error <= tolerance`` on every input of the meter, over tau.

    Safeguarded regula falsi on ``log(error / tolerance)`` against ``x = log(1 - tau)``; while only one side of the
    crossing is known, the step assumes that the error is proportional to ``1 - tau``.

    Args:
        meter: measures one site.
        theta: ``[H]``, fixed.
        tolerance: relative L1 per head and input.
        steps: evaluations at most; a head stops early when it is close enough.
        start: ``[H]`` first guess of tau.
        active: ``[H]`` bool, heads to search; the others come back DENSE. All by default.
    """
    heads = meter.heads
    best = Operating.dense(heads)
    x = torch.full((heads,), X_START) if start is None else torch.log(1 - start).clamp(X_MIN, X_MAX)
    good, bad = torch.full((heads,), -math.inf), torch.full((heads,), math.inf)
    good_y, bad_y = torch.full((heads,), -math.inf), torch.full((heads,), math.inf)
    done = torch.zeros(heads, dtype=torch.bool) if active is None else ~active
    for _ in range(steps):
        # A finished head is parked at tau = 0, where it costs least.
        tried = Thresholds(torch.where(done, 0.0, 1 - torch.exp(x)), theta, torch.full((heads,), LAMBDA_OFF))
        measured = meter(tried)
        error = measured.worst
        feasible = (error <= tolerance) & ~done  # a NaN error is not feasible
        best = best.better_of(Operating(tried, torch.where(feasible, measured.sparsity, -1.0), error))
        y = torch.log(error / tolerance).nan_to_num(nan=math.inf).clamp(-8.0, 8.0)
        infeasible = ~feasible & ~done
        good, good_y = torch.where(feasible, x, good), torch.where(feasible, y, good_y)
        bad, bad_y = torch.where(infeasible, x, bad), torch.where(infeasible, y, bad_y)
        done |= feasible & ((error >= CLOSE_ENOUGH * tolerance) | (x >= X_MAX))
        done |= (infeasible & (x <= X_MIN)) | (bad - good < NARROW)
        if done.all():
            break
        x = torch.where(done, x, _next_x(good, good_y, bad, bad_y))
    return best


def _next_x(good: Tensor, good_y: Tensor, bad: Tensor, bad_y: Tensor) -> Tensor:
    """Next point of each head: inside the bracket if it has both ends, else a step beyond the end it has."""
    aim = math.log((1 + CLOSE_ENOUGH) / 2)
    # y is linear in x between the ends: x = good + (bad - good) (aim - y_good) / (y_bad - y_good)
    fraction = ((aim - good_y) / (bad_y - good_y)).nan_to_num(0.5).clamp(0.1, 0.9)
    inside = good + (bad - good) * fraction
    # error ~ (1 - tau), so y falls as fast as x does
    beyond_good = good + (aim - good_y).clamp(0.15, 2.0)
    beyond_bad = bad - (bad_y - aim).clamp(0.15, 2.0)
    x = torch.where(torch.isinf(bad), beyond_good, torch.where(torch.isinf(good), beyond_bad, inside))
    return x.clamp(X_MIN, X_MAX)
