"""Spend one budget on the model's output over all heads: sparse where it costs the output least.

The rise of KL that a head causes alone is measured once, at one error, and taken to grow with the square of the
error: KL has its minimum at the dense output, so its first-order term vanishes there. Rises of several heads add up for
the same reason, as long as their errors are not correlated. What the sum misses is measured: the chosen points run
together, and the budget that the allocation may spend is corrected by what they really cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afbs_compile.kernels.call import KEEP_ALL, THETA_OFF, SparseCall
from afbs_compile.tuner.allocate import allocate
from afbs_compile.tuner.end_to_end import EndToEnd, OutputChange

Quantity = Literal["kl", "perplexity"]
QUANTITIES: tuple[str, ...] = get_args(Quantity)

REFERENCE_ERROR = 0.1
"""Error at which a head's effect on the output is measured: well above what rounding alone does to the output."""

CORRECTIONS = 5
"""Times that the allocation is corrected by what it was measured to cost."""

SPENT = 0.9
"""A measured cost in [SPENT, 1] x budget ends the corrections."""

REVISION = 0.7
"""Share of the allocation's budget that is left after a failed check."""

MOST_REVISIONS = 6


@dataclass(frozen=True)
class Budget:
    """What the output may change by.

    Attributes:
        quantity: ``"kl"``: mean KL(dense || sparse) of the next-token distributions, nats. ``"perplexity"``: relative
            rise of the perplexity.
        limit: largest accepted value, e.g. 0.01.
    """

    quantity: Quantity
    limit: float

    def cost(self, changes: Sequence[OutputChange]) -> float:
        """The quantity over several samples, which have the same number of tokens each."""
        if self.quantity == "kl":
            return float(np.mean([change.kl for change in changes]))
        return float(np.expm1(np.mean([change.loss for change in changes])))


@dataclass(frozen=True)
class SitePoints:
    """The operating points of every head of one site; the first point of each head is DENSE.

    Attributes:
        name: of the site.
        call: policy, theta, block shape and what is kept, of all points; its taus mean nothing.
        tau: ``[H, points]``; error: relative L1 of the head's output; live: share of the visible blocks that is
            computed. Points that must not be used have a NaN error.
    """

    name: str
    call: SparseCall
    tau: Tensor
    error: Tensor
    live: Tensor

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.tau.shape[0]

    def at(self, points: Tensor) -> SparseCall:
        """The call at one point of each head, ``[H]``."""
        call = self.call.with_tau(self.tau.gather(1, points[:, None])[:, 0])
        theta = (THETA_OFF if dense else mine for dense, mine in zip(call.dense_heads, call.theta, strict=True))
        return replace(call, theta=tuple(theta))

    def reference_points(self) -> Tensor:
        """``[H]``: the sparsest point of each head with at most :data:`REFERENCE_ERROR`; 0 where there is none."""
        usable = (self.error <= REFERENCE_ERROR) & (self.tau < KEEP_ALL) & (self.error > 0)
        live = torch.where(usable, self.live, torch.inf)
        return torch.where(usable.any(1), live.argmin(1), 0)


@dataclass(frozen=True)
class Spending:
    """How a budget was spent.

    Attributes:
        points: chosen point of each head, by site.
        measured: cost on the samples that it was chosen on; checked: on the samples that it was checked on, ``None``
            where there were none.
        steps_back: times that the check failed.
    """

    points: Mapping[str, Tensor]
    measured: float
    checked: float | None
    steps_back: int


def spend(
    sites: Sequence[SitePoints],
    choosing: EndToEnd,
    checking: EndToEnd | None,
    budget: Budget,
    progress: Callable[[], None] = lambda: None,
) -> Spending:
    """Choose a point of every head so that least is computed while the output stays inside the budget.

    Args:
        sites: every site's operating points.
        choosing: the model on the samples to choose on; checking: on samples not used to choose, if there are any.
        budget: of the output.
        progress: called after each head whose effect was measured.
    """
    work = np.concatenate([_floats(site.live) for site in sites])
    cost = np.concatenate([_floats(_output_cost(site, choosing, progress)) for site in sites])

    def chosen(limit: float) -> dict[str, Tensor]:
        points = torch.from_numpy(allocate(work, cost, limit))
        return dict(zip((site.name for site in sites), points.split([site.heads for site in sites]), strict=True))

    def measured(points: Mapping[str, Tensor], on: EndToEnd) -> float:
        return budget.cost(on({site.name: site.at(points[site.name]) for site in sites}))

    limit, best, best_cost = _corrected(budget, chosen, lambda points: measured(points, choosing))
    for step in range(MOST_REVISIONS):
        checked = None if checking is None else measured(best, checking)
        if checked is None or checked <= budget.limit:
            return Spending(best, best_cost, checked, step)
        limit *= REVISION
        best = chosen(limit)
        best_cost = measured(best, choosing)
    nothing = {site.name: torch.zeros(site.heads, dtype=torch.long) for site in sites}
    return Spending(nothing, 0.0, 0.0, MOST_REVISIONS)


def _corrected(
    budget: Budget, chosen: Callable[[float], dict[str, Tensor]], measured: Callable[[dict[str, Tensor]], float]
) -> tuple[float, dict[str, Tensor], float]:
    """The largest allocation found whose measured cost is inside the budget: its limit, its points, its cost."""
    inside, outside, limit = 0.0, np.inf, budget.limit
    best, best_cost = chosen(0.0), 0.0
    for _ in range(CORRECTIONS):
        points = chosen(limit)
        cost = measured(points)
        if cost <= budget.limit:
            inside, best, best_cost = limit, points, cost
            if cost >= SPENT * budget.limit:
                break
        else:
            outside = limit
        # The cost is about proportional to what the allocation may spend; aim inside the accepted range.
        aim = limit * (1 + SPENT) / 2 * budget.limit / max(cost, budget.limit / 8)
        between = (inside + outside) / 2 if np.isfinite(outside) else 4 * limit
        limit = aim if inside < aim < min(outside, 8 * limit) else between
    return inside, best, best_cost


def _output_cost(site: SitePoints, model: EndToEnd, progress: Callable[[], None]) -> Tensor:
    """``[H, points]``: KL that each point of each head is expected to cause on its own; infinite where not usable."""
    reference = site.reference_points()
    sensitivity = torch.full((site.heads,), torch.inf)
    for head in range(site.heads):
        if reference[head] > 0:
            alone = torch.zeros_like(reference)
            alone[head] = reference[head]
            changes = model({site.name: site.at(alone)})
            # KL = sensitivity * error^2
            sensitivity[head] = float(np.mean([c.kl for c in changes])) / float(site.error[head, reference[head]]) ** 2
        progress()
    cost = sensitivity[:, None] * site.error**2
    return torch.where(site.tau >= KEEP_ALL, 0.0, cost.nan_to_num(nan=torch.inf))


def _floats(values: Tensor) -> NDArray[np.float64]:
    return values.double().numpy()
