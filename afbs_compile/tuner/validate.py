"""Stages 2 and 3 of ``method="afbs"``: place tau on curves that every input measures, all rows of it.

Refine measures the input that was explored, at thresholds close about what the exploration found; validate measures the
others at the boldest of them that holds there and at some that keep more. A head gets the boldest one that holds the
tolerance on every input, as must all that keep more: stepping back costs no evaluation, and what is chosen was
measured, not interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.recipe import Stage
from afbs_compile.tuner.curves import SMALLEST, Curves, boldest_safe
from afbs_compile.tuner.explore import POINTS
from afbs_compile.tuner.inputs import InputCurve, SiteInputs

FACTORS = (0.52 * 1.0535 ** torch.arange(POINTS)).flip(0)
"""Thresholds tried, as shares of the explored ``1 - tau``, the boldest first: 0.52 to 1.4, a twentieth apart. As many
as are explored with: a pass is compiled for a number of them."""

VALIDATED_AT = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8])
"""Thresholds that the other inputs are measured at, counted from the boldest that holds on the explored one. More would
visit more blocks; a head that fails at all of them is measured again, further on."""

DECIMALS = 6
"""Thresholds are rounded to what the recipe and the graph show before they are measured."""

SAFE_SHARE = 0.998
"""Share of the tolerance that a threshold may use: the kernel that will run rounds in another order than the pass."""

ROUNDS = 4
HIGHER = 3.0
"""Where even the boldest threshold holds, ``1 - tau`` is scaled by this and measured again, for that head."""


@dataclass(frozen=True)
class Validated:
    """The thresholds of every head and what they measure.

    Attributes:
        tau: fp32 ``[H]``, 1 for DENSE heads; sparsity: fp32 ``[H]``, mean of the inputs.
        error: fp32 ``[pieces, H]``, of every input or window.
        prefixes: fp32 ``[inputs, H]`` by length, for causal prefixes.
        deciding: bool ``[inputs]``: inputs that kept a head from a bolder threshold.
        curves: what the stages measured.
    """

    tau: Tensor
    sparsity: Tensor
    error: Tensor
    prefixes: dict[int, Tensor]
    deciding: Tensor
    curves: tuple[Curves, ...]


def validate(inputs: SiteInputs, call: SparseCall, tolerance: float) -> Validated:
    """Refine and validate.

    Args:
        inputs: of the site.
        call: what the exploration found; heads with tau 1 are left DENSE.
        tolerance: relative L1 on every input or window.
    """
    tau = torch.tensor(call.tau)
    best = _Best(inputs.heads)
    centre = 1 - tau
    heads = (tau < KEEP_ALL).nonzero()[:, 0]
    limit = SAFE_SHARE * tolerance
    curves: list[Curves] = []
    for _ in range(ROUNDS):
        if not len(heads):
            break
        mine = call.taken(heads.tolist(), inputs.explored.k.shape[1])
        fine = _grid(centre[heads])
        refined = inputs.curve(inputs.first, fine, mine, heads=heads).cpu()
        start = boldest_safe(refined.error.nan_to_num(nan=torch.inf).amax(0), limit)
        steps = (start[:, None] + VALIDATED_AT).clamp_max(fine.shape[1] - 1)
        grid = fine.gather(1, steps)
        measured = [
            refined.at(steps) if i == inputs.first else inputs.curve(i, grid, mine, heads=heads)
            for i in range(len(inputs.elements))
        ]
        measured = [curve.cpu() for curve in measured]
        index = best.take(heads, grid, measured, limit, inputs.first)
        site = _Part(inputs, heads, call)
        curves.append(site.curves("refine", fine, refined.overall, refined.sparsity))
        if len(measured) > 1:
            others = [curve for i, curve in enumerate(measured) if i != inputs.first]
            curves.append(site.curves("validate", grid, *_worst(others)))
        else:
            curves.append(site.curves("validate", fine, *_worst([refined])))
        lower = (index == grid.shape[1]) & (grid[:, -1] < 1 - SMALLEST)
        higher = (index == 0) & (start == 0) & (fine[:, 0] > 0)
        # Where no threshold held, the next ones begin where these ended.
        further = (1 - grid[:, -1]) / FACTORS[0]
        centre[heads] = torch.where(lower, further, centre[heads] * torch.where(higher, HIGHER, 1.0))
        heads = heads[lower | higher]
    return best.result(curves)


def _grid(centre: Tensor) -> Tensor:
    """``[h, P]``, ascending taus about ``1 - centre``."""
    return torch.round(1 - (centre[:, None] * FACTORS).clamp(SMALLEST, 1.0), decimals=DECIMALS)


class _Best:
    """The boldest safe threshold of each head over the rounds, and what it measured."""

    def __init__(self, heads: int) -> None:
        self.tau, self.sparsity = torch.full((heads,), KEEP_ALL), torch.zeros(heads)
        self.error: Tensor | None = None
        self.prefixes: dict[int, dict[int, Tensor]] = {}
        self.deciding = torch.zeros(0, dtype=torch.bool)

    def take(self, heads: Tensor, grid: Tensor, measured: list[InputCurve], limit: float, first: int) -> Tensor:
        """Choose for the given heads; returns the index of the choice in the grid, ``[h]``."""
        total = len(self.tau)
        if self.error is None:
            self.error = torch.zeros(sum(len(curve.error) for curve in measured), total)
            self.deciding = torch.zeros(len(measured), dtype=torch.bool)
        worst = torch.cat([curve.error for curve in measured]).nan_to_num(nan=torch.inf).amax(0)
        index = boldest_safe(worst, limit)
        place = index.clamp_max(grid.shape[1] - 1)[:, None]
        sparsity = torch.stack([curve.sparsity for curve in measured]).mean(0)
        # A head with nothing to skip is better DENSE: it needs no predictor.
        found = (index < grid.shape[1]) & (sparsity.gather(-1, place)[:, 0] > 0)
        chosen = heads[found]

        def at(values: Tensor) -> Tensor:
            """``[.., h, P]`` at each head's choice, for the heads that have one."""
            return values.gather(-1, place.expand(*values.shape[:-1], 1))[..., 0][..., found]

        self.tau[chosen] = at(grid)
        self.sparsity[chosen] = at(sparsity)
        self.error[:, chosen] = at(torch.cat([curve.error for curve in measured]))
        for i, curve in enumerate(measured):
            for length, values in curve.prefixes.items():
                self.prefixes.setdefault(length, {}).setdefault(i, torch.zeros(total))[chosen] = at(values)
        # The input that fails at the next bolder threshold decides, unless the explored one fails there as well.
        bolder = (index - 1).clamp_min(0)[:, None]
        per_input = torch.stack([curve.error.amax(0).gather(-1, bolder)[:, 0] for curve in measured])
        per_input = per_input.nan_to_num(nan=torch.inf)
        decided = (index > 0) & (per_input[first] <= limit)
        self.deciding[per_input.argmax(0)[decided]] = True
        return index

    def result(self, curves: list[Curves]) -> Validated:
        error = torch.zeros(1, len(self.tau)) if self.error is None else self.error
        prefixes = {length: torch.stack(list(values.values())) for length, values in self.prefixes.items()}
        return Validated(self.tau, self.sparsity, error, prefixes, self.deciding, tuple(curves))


def _worst(measured: list[InputCurve]) -> tuple[Tensor, Tensor]:
    """The worst error of the inputs or windows, and their mean sparsity."""
    return torch.cat([curve.error for curve in measured]).amax(0), torch.stack([c.sparsity for c in measured]).mean(0)


@dataclass(frozen=True)
class _Part:
    """Some heads of a site, which one round measures."""

    inputs: SiteInputs
    heads: Tensor
    call: SparseCall

    def curves(self, stage: Stage, tau: Tensor, error: Tensor, sparsity: Tensor) -> Curves:
        """What a stage measured of these heads, ``[h, P]`` each, for all heads of the site."""
        measured = torch.zeros(self.inputs.heads, dtype=torch.bool)
        measured[self.heads] = True

        def everywhere(values: Tensor) -> Tensor:
            full = torch.zeros(self.inputs.heads, values.shape[1])
            full[self.heads] = values
            return full

        columns = everywhere(tau), everywhere(error), everywhere(sparsity)
        return Curves(stage, self.inputs.length, self.call, *columns, measured)
