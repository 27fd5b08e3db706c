"""Stage 1 of ``method="afbs"``: choose policy and theta for each head, on a part of one input's rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.one_pass import PassSums
from afbs_compile.kernels.reference import LAMBDA_OFF, THETA_OFF, block_count
from afbs_compile.recipe import Policy
from afbs_compile.tuner.curves import SMALLEST, Crossing, Curves, crossing
from afbs_compile.tuner.inputs import BlockShape, Inputs
from afbs_compile.tuner.space import Thresholds
from afbs_compile.tuner.speed import Stopwatch

POINTS = 20
"""Thresholds per curve, from ``tau = 0`` to ``1 - SMALLEST``, evenly in the log of ``1 - tau``."""

UNIT = 128
"""Rows that are drawn together: a multiple of every block, so that all shapes are compared on the same rows."""

EXPLORED_ROWS = 1024
"""Rows of the input that are measured, spread over its length: enough to rank the choices, not to place tau."""


CANDIDATES: tuple[tuple[Policy, float], ...] = (
    ("meansim", THETA_OFF),
    ("meansim", 0.45),
    ("meanshare", THETA_OFF),
    ("cumulant", THETA_OFF),
)
"""Policies and thetas that are explored, the cheapest predictor first. The other policies won on no head of ours."""

OWN_CHOICE = 0.03
"""What a head must save more, in sparsity, to leave the choice of its site: each policy is a predictor call more."""


EQUAL = 0.005
"""Choices for a site whose savings differ by less are equal: times are noisy, the choice should not be."""


@dataclass(frozen=True)
class Explored:
    """The best choice per head for one block shape.

    Attributes:
        policy: a name per head; theta, tau, sparsity: ``[H]``; tau is 1 where no threshold holds the tolerance.
        curves: everything that was measured.
    """

    policy: tuple[Policy, ...]
    theta: Tensor
    tau: Tensor
    sparsity: Tensor
    curves: tuple[Curves, ...]


def explore(
    inputs: Inputs, tolerance: float, shapes: Sequence[BlockShape], stopwatch: Stopwatch
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
    heads = inputs.heads
    shapes = stopwatch.contenders(inputs.elements[inputs.first], shapes)
    found: dict[BlockShape, Explored] = {}
    choices: list[tuple[tuple[Policy, ...], Tensor]] = [
        ((policy,) * heads, torch.full((heads,), theta)) for policy, theta in CANDIDATES
    ]
    for shape in shapes:
        passes = [_pass(inputs, policy, theta, shape) for policy, theta in choices]  # all started before one is read
        errors, sparsities = _measured(passes)
        points = crossing(_taus(heads).expand_as(errors), errors, sparsities, tolerance)
        measured = torch.ones(heads, dtype=torch.bool)
        curves = [
            Curves("explore", inputs.length, shape, theta, policy, _taus(heads), error, sparsity, measured)
            for (policy, theta), error, sparsity in zip(choices, errors, sparsities, strict=True)
        ]
        costs = [0.0] * len(curves)
        if len(curves) > 1:
            costs = _predictor_costs(inputs, curves, points, stopwatch)
        found[shape] = _best(curves, points, costs)
        choices = [(found[shape].policy, found[shape].theta)]
    return found


def _predictor_costs(inputs: Inputs, curves: Sequence[Curves], points: Crossing, stopwatch: Stopwatch) -> list[float]:
    """What each choice's predictor costs, as the share of the attention with every block live that takes as long."""
    element, shape = inputs.elements[inputs.first], curves[0].shape
    sparsest = int(points.sparsity.mean(1).argmax())
    curve, tau = curves[sparsest], points.tau[sparsest]
    thresholds = Thresholds(tau, curve.theta, torch.full_like(tau, LAMBDA_OFF))
    if thresholds.is_dense.all():
        return [0.0] * len(curves)
    everything = stopwatch.attention_ms(element, thresholds, curve.policy, *shape)
    if everything == 0:  # lost in the noise of two short timings
        return [0.0] * len(curves)
    return [
        stopwatch.predictor_ms(element, thresholds.tau, choice.theta, choice.policy, *shape) / everything
        for choice in curves
    ]


def _best(curves: Sequence[Curves], points: Crossing, costs: Sequence[float]) -> Explored:
    # What is saved: the blocks that are not computed, less the time that finding them takes.
    saved = points.sparsity - torch.tensor(costs)[:, None]
    mean = saved.mean(1)
    common = int((mean >= mean.max() - EQUAL).nonzero()[0])  # the first of about equals: the cheapest
    own = saved.argmax(0)
    gain = saved.gather(0, own[None])[0] - saved[common]
    choice = torch.where(gain > OWN_CHOICE, own, common)

    def chosen(columns: Tensor) -> Tensor:
        return columns.gather(0, choice[None])[0]

    return Explored(
        tuple(curves[index].policy[head] for head, index in enumerate(choice.tolist())),
        chosen(torch.stack([curve.theta for curve in curves])),
        chosen(points.tau),
        chosen(points.sparsity),
        tuple(curves),
    )


@functools.cache
def _taus(heads: int) -> Tensor:
    x = torch.linspace(0, math.log(SMALLEST), POINTS)
    return (1 - torch.exp(x)).expand(heads, -1).contiguous()


def _pass(inputs: Inputs, policy: tuple[Policy, ...], theta: Tensor, shape: BlockShape) -> PassSums:
    rows = sampled_blocks(inputs.length, shape.block_q)
    return inputs.sums(inputs.first, _taus(inputs.heads), theta, policy, shape, rows=rows)


def _measured(passes: Sequence[PassSums]) -> tuple[Tensor, Tensor]:
    """Error and sparsity ``[C, H, P]`` of passes over the same rows, on the CPU."""
    difference = torch.stack([sums.difference.sum(1) for sums in passes])
    live = torch.stack([sums.live.sum(1) for sums in passes])
    magnitude = passes[0].magnitude.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference / magnitude).float().cpu(), (1 - live.float() / passes[0].visible.sum()).cpu()


@functools.cache
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
