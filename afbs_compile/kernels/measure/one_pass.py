"""Error and sparsity of many thresholds in one pass over the key blocks.

For a fixed policy and theta, a larger tau keeps every block that a smaller one keeps. A query block that visits its
key blocks in the order in which tau lets them in therefore holds, after each step, the output of one threshold: its
running maximum, sum and accumulator are what block-sparse attention over the blocks seen so far computes. Comparing it
with the dense output whenever a threshold's last block has been folded in gives the error of every threshold for the
work of the largest alone: blocks that it leaves out are never visited.

Each threshold's result is the one that :func:`afbs_compile.kernels.spec.attention.masked_attention` gives on
:func:`afbs_compile.kernels.spec.selection.live_blocks`: those two are the specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.attend.machine import runs_triton
from afbs_compile.kernels.blocks import BlockShape, Grid, block_count, chunks
from afbs_compile.kernels.call import Kept
from afbs_compile.kernels.masks.band import band_refusal
from afbs_compile.kernels.measure.levels import Places, levels_of
from afbs_compile.kernels.measure.pass_plain import plain_pass
from afbs_compile.kernels.measure.visit import visit_order
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import policy_named
from afbs_compile.kernels.sight import resolved, sight_of
from afbs_compile.kernels.spec.selection import kept_blocks

WORKING_BYTES = 384 * 2**20
"""Memory that a pass may take for itself, about; it goes through the heads in groups that fit."""

VISIT_BYTES = 64
"""Bytes per (query block, key block) that ordering them takes at its peak."""


class PassSums(NamedTuple):
    """What one pass over one input measures, for ``m`` query blocks and ``T`` thresholds.

    Attributes:
        difference: fp32 ``[H, m, T]``, ``sum|O - O_dense|`` over the rows of the query block.
        magnitude: fp32 ``[H, m]``, ``sum|O_dense|`` of the same rows.
        live: int32 ``[H, m, T]``, key blocks that the threshold keeps.
        visible: int32 ``[H or 1, m]``, key blocks that hold a key which some row sees.
    """

    difference: Tensor
    magnitude: Tensor
    live: Tensor
    visible: Tensor


class PassPlan(NamedTuple):
    """How one pass looks at its input.

    Attributes:
        policy: what scores the blocks, one name for all heads.
        shape: rows per block.
        kept: which blocks every tau keeps.
        rows: the m query blocks to measure, ascending; ``None`` for all. Each is measured exactly.
    """

    policy: str
    shape: BlockShape
    kept: Kept = Kept()
    rows: tuple[int, ...] | None = None


class _Look(NamedTuple):
    """Of the query blocks ``rows``, int64 ``[m]``: visible, always kept, blurred and partial blocks.

    Bool ``[1, H or 1, m, n_k]`` each; ``in_sight`` is int32 ``[H or 1, m]``, the number of visible ones.
    """

    rows: Tensor
    visible: Tensor
    always: Tensor
    blurred: Tensor
    partial: Tensor
    in_sight: Tensor

    def of_heads(self, some: slice) -> _Look:
        """Of some query heads."""
        visible, always, blurred, partial = (x if x.shape[1] == 1 else x[:, some] for x in self[1:5])
        in_sight = self.in_sight if len(self.in_sight) == 1 else self.in_sight[some]
        return _Look(self.rows, visible, always, blurred, partial, in_sight)


def _look(operands: Operands, plan: PassPlan) -> _Look:
    """Where a query block's key blocks lie. A calibration asks for the same again and again."""
    key = (plan.shape, plan.kept, plan.rows)
    if key not in operands.derived:
        device, count_q = operands.device, operands.grid(plan.shape).count_q
        rows = torch.arange(count_q, device=device) if plan.rows is None else torch.tensor(plan.rows, device=device)
        sight = sight_of(operands, plan.shape)
        always = kept_blocks(operands, plan.shape, plan.kept)
        visible, whole, always, blurred = (x[:, :, rows] for x in (sight.visible, sight.whole, always, sight.blurred))
        in_sight = visible[0].sum(-1, dtype=torch.int32)
        operands.derived[key] = _Look(rows, visible, always, blurred, visible & ~whole, in_sight)
    found: _Look = operands.derived[key]
    return found


def one_pass(operands: Operands, dense: Tensor, tau: Tensor, theta: Tensor, plan: PassPlan) -> PassSums:
    """Measure every threshold of every head on one input.

    Args:
        operands: one input, batch size 1, fp16, bf16, fp32 or, on the CPU, fp64.
        dense: ``[1, H, q_len, D]``, the dense output in the dtype of ``q``.
        tau: fp32 ``[H, T]``, ascending, alike in heads that share a selection; theta: fp32 ``[H]``; on any device.
        plan: how to look at it.

    Returns:
        Sums per query block, on the device of ``q``. A row whose output overflows measures NaN or infinity.
    """
    operands = resolved(operands, plan.shape)
    device, grid = operands.device, operands.grid(plan.shape)
    tau = tau.to(device, non_blocking=True)
    look = _look(operands, plan)
    has_theta = policy_named(plan.policy).has_theta
    parts = []
    for some in _head_groups(operands, grid):
        part, mine, sight = operands.grouped(some.start, some.stop), dense[:, some], look.of_heads(some)
        places = Places(sight.visible, sight.always, sight.blurred, None if plan.rows is None else sight.rows)
        level = levels_of(part, plan.shape, plan.policy, places, theta[some].tolist() if has_theta else None)[0]
        if plan.shape.heads > 1:  # live for one is live for all, at a tau that they share
            together = level.unflatten(0, (-1, plan.shape.heads)).amin(1)
            level = together.repeat_interleave(plan.shape.heads, 0)
        visit = visit_order(level, sight.partial[0], sight.always[0])
        # A block is live at tau when its level lies below tau: the levels ascend, so a count says which.
        limits = tau[some, None].expand(-1, len(sight.rows), -1).contiguous()
        live = torch.searchsorted(visit.level, limits, out_int32=True)
        if runs_triton(device) and band_refusal(operands) is None:
            from afbs_compile.kernels.measure.pass_triton import triton_pass  # Triton is not installed everywhere.

            sums = triton_pass(part, mine, plan.shape, visit, live, sight.rows)
        else:
            sums = plain_pass(part, mine, plan.shape, visit, live, sight.rows)
        parts.append((*sums, live))
    difference, magnitude, live = (torch.cat(x) for x in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
    return PassSums(difference, magnitude, live, look.in_sight)


def _head_groups(operands: Operands, grid: Grid) -> Iterator[slice]:
    """Query heads, whole groups, as many at a time as :data:`WORKING_BYTES` allows."""
    kv_heads = operands.k.shape[1]
    parts = block_count(grid.count_q * grid.count_k * VISIT_BYTES * operands.heads, WORKING_BYTES)
    for keys in chunks(kv_heads, max(1, kv_heads // parts)):
        yield slice(keys.start * operands.groups, keys.stop * operands.groups)
