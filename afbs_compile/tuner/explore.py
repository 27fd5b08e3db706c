"""Stage 1 of ``method="afbs"``: choose policy and theta for each head, on a part of one input's rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape, block_count
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.measure.one_pass import PassSums
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.tuner.curves import SMALLEST, Crossing, Curves, crossing
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.speed import Stopwatch

POINTS = 20
"""Thresholds per curve, from ``tau = 0`` to ``1 - SMALLEST``, evenly in the log of ``1 - tau``."""

UNIT = 128
"""Rows that are drawn together: a multiple of every block, so that all shapes are compared on the same rows."""

EXPLORED_ROWS = 1024
"""Rows of the input that are measured, spread over its length: enough to rank the choices, not to place tau."""


SAVES_MORE = 0.03
"""What a head must save more, in sparsity, to leave the choice of its site: each policy is a predictor call more."""


EQUAL = 0.005
"""Choices for a site whose savings differ by less are equal: times are noisy, the choice should not be."""


@dataclass(frozen=True)
class Explored:
    """The best choice per head for one block shape.

    Attributes:
        call: policy and theta of each head, its tau where it crosses the tolerance; 1 where no threshold holds it.
        sparsity: ``[H]``, at the crossing.
        curves: everything that was measured.
    """

    call: SparseCall
    sparsity: Tensor
    curves: tuple[Curves, ...]


def candidates(inputs: SiteInputs, shape: BlockShape) -> list[SparseCall]:
    """The policies and thetas that calibration explores, the cheapest predictor first, all heads alike."""
    return [
        SparseCall.uniform(inputs.heads, KEEP_ALL, policy=policy.name, theta=theta, shape=shape, kept=inputs.kept)
        for policy in POLICIES.values()
        for theta in policy.explored
    ]


def explore(
    inputs: SiteInputs, tolerance: float, shapes: Sequence[BlockShape], stopwatch: Stopwatch
) -> dict[BlockShape, Explored]:
    """Per block shape and head, the policy and theta that are fastest within the tolerance.

    The first shape decides about them; the others are measured with what it chose. Shapes that lost clearly at the
    earlier sites of a calibration are left out.

    Args:
        inputs: of the site; one of them is measured.
        tolerance: relative L1 over the measured rows.
        shapes: to compare.
        stopwatch: what timing earlier sites has shown.
    """
    # A threshold of its own for each head says nothing of what a head gets from those it shares a selection with.
    shapes = stopwatch.contenders(inputs.explored, [shape for shape in shapes if shape.heads == 1])
    found: dict[BlockShape, Explored] = {}
    choices = candidates(inputs, shapes[0])
    for shape in shapes:
        choices = [replace(call, shape=shape) for call in choices]
        passes = [_pass(inputs, call) for call in choices]  # all started before one is read
        errors, sparsities = _measured(passes)
        points = crossing(_taus(inputs.heads).expand_as(errors), errors, sparsities, tolerance)
        measured = torch.ones(inputs.heads, dtype=torch.bool)
        curves = [
            Curves("explore", inputs.length, call, _taus(inputs.heads), error, sparsity, measured)
            for call, error, sparsity in zip(choices, errors, sparsities, strict=True)
        ]
        costs = [0.0] * len(curves)
        if len(curves) > 1:
            costs = _predictor_costs(inputs.explored, choices, points, stopwatch)
        found[shape] = _best(curves, points, costs)
        choices = [found[shape].call]
    return found


@dataclass(frozen=True)
class ExploredCurve:
    """What a call does on some rows of the input.

    Attributes:
        sparsity: ``[H, P]`` at :func:`tau_grid`; crossing: where the heads cross an error, ``[1, H]`` each.
    """

    sparsity: Tensor
    crossing: Crossing


def explored_curve(inputs: SiteInputs, call: SparseCall, tolerance: float) -> ExploredCurve:
    """Measure one call on some rows of the input, at all thresholds."""
    errors, sparsities = _measured([_pass(inputs, call)])
    points = crossing(_taus(inputs.heads).expand_as(errors), errors, sparsities, tolerance)
    return ExploredCurve(sparsities[0], points)


def tau_grid() -> Tensor:
    """The thresholds that are explored, ``[POINTS]``, ascending from 0."""
    return 1 - torch.exp(torch.linspace(0, math.log(SMALLEST), POINTS))


def _predictor_costs(
    element: Operands, choices: Sequence[SparseCall], points: Crossing, stopwatch: Stopwatch
) -> list[float]:
    """What each choice's predictor costs, as the share of the attention with every block live that takes as long."""
    sparsest = int(points.sparsity.mean(1).argmax())
    tau = points.tau[sparsest]
    call = choices[sparsest].with_tau(tau)
    if call.is_dense:
        return [0.0] * len(choices)
    everything = stopwatch.attention_ms(element, call)
    if everything == 0:  # lost in the noise of two short timings
        return [0.0] * len(choices)
    return [stopwatch.predictor_ms(element, choice.with_tau(tau)) / everything for choice in choices]


def _best(curves: Sequence[Curves], points: Crossing, costs: Sequence[float]) -> Explored:
    # What is saved: the blocks that are not computed, less the time that finding them takes.
    saved = points.sparsity - torch.tensor(costs)[:, None]
    mean = saved.mean(1)
    common = int((mean >= mean.max() - EQUAL).nonzero()[0])  # the first of about equals: the cheapest
    best = saved.argmax(0)
    gain = saved.gather(0, best[None])[0] - saved[common]
    choice = torch.where(gain > SAVES_MORE, best, common)

    def chosen(columns: Tensor) -> Tensor:
        return columns.gather(0, choice[None])[0]

    calls = [curve.call for curve in curves]
    names = tuple(calls[index].policy[head] for head, index in enumerate(choice.tolist()))
    thetas = tuple(calls[index].theta[head] for head, index in enumerate(choice.tolist()))
    call = replace(calls[0], policy=names, theta=thetas).with_tau(chosen(points.tau))
    return Explored(call, chosen(points.sparsity), tuple(curves))


@functools.lru_cache(maxsize=64)
def _taus(heads: int) -> Tensor:
    return tau_grid().expand(heads, -1).contiguous()


def _pass(inputs: SiteInputs, call: SparseCall) -> PassSums:
    rows = sampled_blocks(inputs.explored.q_len, call.shape.q)
    return inputs.sums(inputs.first, _taus(inputs.heads), call, rows=rows)


def _measured(passes: Sequence[PassSums]) -> tuple[Tensor, Tensor]:
    """Error and sparsity ``[C, H, P]`` of passes over the same rows, on the CPU."""
    difference = torch.stack([sums.difference.sum(1) for sums in passes])
    live = torch.stack([sums.live.sum(1) for sums in passes])
    visible = passes[0].visible.sum(-1).clamp_min(1)[:, None]
    magnitude = passes[0].magnitude.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference / magnitude).float().cpu(), (1 - live.float() / visible).cpu()


@functools.lru_cache(maxsize=64)
def sampled_blocks(length: int, block_q: int) -> tuple[int, ...]:
    """Query blocks to explore on, ascending: one unit from each of equal strata, the same ones for every shape."""
    units = block_count(length, UNIT)
    wanted = min(units, EXPLORED_ROWS // UNIT)
    strata = torch.arange(wanted, dtype=torch.float64)
    # The golden ratio spreads the places within the strata, so that no period of the text is met.
    place = (strata + (strata * 0.6180339887).frac()) * units / wanted
    first = place.long() * (UNIT // block_q)
    blocks = (first[:, None] + torch.arange(UNIT // block_q)).flatten()
    return tuple(blocks[blocks < block_count(length, block_q)].tolist())
