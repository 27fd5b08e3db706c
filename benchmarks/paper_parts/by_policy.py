"""Methods that are policies of this package: their calls run on its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from afbs_compile import Recipe
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.operands import Operands
from paper_parts.head import BLOCK
from paper_parts.setting import SHAPE

Calls = Callable[[str, Operands, float], SparseCall]
"""The constants of a site, given its name, its operands and a knob from 0 (all is kept) to 1."""

THETA = 0.6
"""SpargeAttn's own, below which a block is always kept."""

DIVERGENCE = 0.1
"""FlexPrefill's tau: heads whose pooled estimate is nearer than this to their last queries' weights trust it."""

STEEPNESS = 12.0
"""Doublings of ``1 - tau`` from one end of the knob to the other."""


def one_threshold(policy: str, *, theta: float = -1.0, shape: BlockShape = SHAPE) -> Calls:
    """All heads alike, as a method without calibration has it.

    Args:
        policy: by name; theta: below which blocks are always kept; shape: of the blocks.
    """

    def call(_: str, operands: Operands, t: float) -> SparseCall:
        return SparseCall.uniform(operands.heads, 1 - t, policy=policy, theta=theta, shape=shape)

    return call


def flex_prefill(_: str, operands: Operands, t: float) -> SparseCall:
    """Each head by pooled weights or by columns and diagonals, as its last queries say (Lai et al. 2025)."""
    pooled = SparseCall.uniform(operands.heads, 1 - t, policy="meansim", shape=SHAPE)
    lines = SparseCall.uniform(operands.heads, 1 - t, policy="vertical_slash", shape=SHAPE)
    return pooled.where(_trusts_pooling(operands), lines)


def _trusts_pooling(operands: Operands) -> list[bool]:
    """Whether the Jensen-Shannon distance of the pooled estimate to the weights of the last 64 queries is small."""
    q = operands.q[0, :, -BLOCK:].float()
    k = operands.k[0].float().repeat_interleave(operands.groups, 0)
    seen = torch.ones(BLOCK, k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - BLOCK)
    weights = (q @ k.mT * operands.scale).masked_fill(~seen, -torch.inf).softmax(-1)
    true = weights.unflatten(-1, (-1, BLOCK)).sum(-1).mean(1)
    means = k.unflatten(1, (-1, BLOCK)).mean(2)
    estimated = (q.mean(1, keepdim=True) @ means.mT * operands.scale).softmax(-1)[:, 0]
    middle = (true + estimated) / 2
    parts = [(p * (p / middle).clamp_min(1e-30).log()).sum(-1) / 2 for p in (true, estimated)]
    return [math.sqrt(max(float(x), 0.0)) < DIVERGENCE for x in parts[0] + parts[1]]


def of_recipe(recipe: Recipe) -> Calls:
    """A calibrated recipe, as it is in the middle; the knob moves ``1 - tau`` of every head by one factor.

    Beyond the middle theta falls to 0. Heads that calibration made DENSE stay so.
    """
    calls: Mapping[str, SparseCall] = {site.name: site.calibrated for site in recipe.sites if site.heads}

    def call(name: str, operands: Operands, t: float) -> SparseCall:
        if name not in calls:
            return SparseCall.uniform(operands.heads, KEEP_ALL)
        factor = 2 ** (STEEPNESS * (t - 0.5))
        tau = tuple(max(0.0, 1 - (1 - x) * factor) for x in calls[name].tau)
        theta = tuple(x * min(1.0, 2 * (1 - t)) if x > 0 else x for x in calls[name].theta)
        return replace(calls[name], tau=tau, theta=theta, min_length=0)

    return call
