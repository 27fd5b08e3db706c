# ruff: noqa: N803 (Triton writes compile-time constants in capitals)
# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Selection by share or strength on the GPU: one kernel, fp32. The rule is :func:`policies.base.levels`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from afbs_compile.kernels.launch import Launcher, device_constants, layout
from afbs_compile.kernels.predict import BlockLists
from afbs_compile.kernels.predict_triton import selection_shape
from afbs_compile.kernels.reference import Kept, kept_limits


@triton.jit(do_not_specialize=["heads", "count_q", "local_keys", "first_whole"])
def _select_kernel(
    lists,
    counts,
    odds,
    heads,
    count_q,
    count_k,
    local_keys,
    first_whole,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARE: tl.constexpr,
    COUNT_PAD: tl.constexpr,
):
    """One query block: read its scores from ``lists``, decide, and overwrite them with the live blocks."""
    program = tl.program_id(0)
    block = program % count_q
    cols = tl.arange(0, COUNT_PAD)
    exists = cols < count_k
    visible = exists
    if CAUSAL:
        visible = exists & (cols * BLOCK_K <= block * BLOCK_Q + (BLOCK_Q - 1))
    row = lists + program.to(tl.int64) * count_k
    scores = tl.load(row + cols, mask=visible, other=0).to(tl.float32, bitcast=True)
    scores = tl.where(visible, scores, float("-inf"))
    if SHARE:
        # strength_j = p_j * sqrt(n), p the softmax over the n visible blocks
        peak = tl.max(scores, 0)
        weights = tl.exp(scores - peak)
        total = tl.sum(weights, 0)
        count = tl.sum(visible.to(tl.int32), 0).to(tl.float32)
        strength = weights * (tl.sqrt(count) / total)
    else:
        strength = tl.exp(scores)
    # Any NaN among the strengths reaches their sum. Infinite ones are no NaN.
    flaws = tl.sum(tl.where(strength == strength, 0.0, strength), 0)
    first_q = block * BLOCK_Q
    near = (cols * BLOCK_K < first_q + BLOCK_Q) & (first_q < cols * BLOCK_K + BLOCK_K + local_keys)
    kept = near | (strength > tl.load(odds + program // count_q % heads))
    kept = tl.where((flaws != flaws) | (block >= first_whole), exists, kept)
    live = visible & kept

    # Every store below depends on a sum over the whole row, so no score is overwritten before it is read.
    flags = live.to(tl.int32)
    count = tl.sum(flags, 0)
    tl.store(row + tl.cumsum(flags, 0) - flags, cols, mask=live)
    tl.store(row + cols, tl.zeros_like(cols), mask=exists & (cols >= count))
    tl.store(counts + program, count)


_selection = Launcher(_select_kernel)


def select_by_strength(
    lists: BlockLists,
    tau: Sequence[float],
    *,
    share: bool,
    causal: bool,
    block_q: int,
    block_k: int,
    length: int,
    kept: Kept,
) -> None:
    """Replace the scores in ``lists.indices`` by the live blocks and fill ``lists.counts``.

    Args:
        lists: contiguous; their indices hold the bits of fp32 scores.
        tau: one number per head.
        share: whether the rule is ``"share"``, else ``"strength"``.
        causal: whether row r attends keys 0..r only.
        block_q, block_k: rows per block.
        length: N.
        kept: which blocks every tau keeps, beside those on the diagonal.
    """
    local_keys, first_whole = kept_limits(length, block_q, kept)
    batch, heads, count_q, count_k = lists.indices.shape
    columns, warps = selection_shape(count_k)
    with torch.cuda.device_of(lists.indices):
        constants = device_constants(tuple(map(odds_of, tau)), lists.indices.device)
        _selection(
            (layout(lists.indices), block_q, block_k, causal, share, local_keys, first_whole),
            batch * heads * count_q,
            *(lists.indices, lists.counts, constants, heads, count_q, count_k, local_keys, first_whole),
            *(block_q, block_k, causal, share, columns),
            warps=warps,
        )


def odds_of(tau: float) -> float:
    """``(1 - tau) / tau``: what a strength must exceed; negative, so that all do, for tau >= 1."""
    if tau >= 1.0:
        return -1.0
    return (1.0 - tau) / tau if tau > 0.0 else math.inf
