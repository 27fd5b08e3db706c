# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Selection by share or strength on the GPU: one kernel, fp32. The rule is :func:`policies.rules.levels`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from afbs_compile.kernels.blocks import BlockLists
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.launcher import Launcher, device_constants, layout
from afbs_compile.kernels.masks.band_triton import visible_blocks, whole_blocks
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.select.lists_triton import Limits, near_blocks, selection_shape, write_lists


@triton.jit(do_not_specialize=["heads", "q_len", "k_len", "upper", "position", "count_q", "local_keys", "first_whole"])
def _select_kernel(
    lists, whole_counts, partial_counts, odds, heads, q_len, k_len, upper, position, count_q, count_k, local_keys,
    first_whole,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEADS: tl.constexpr, BOUNDED: tl.constexpr, SHARE: tl.constexpr,
    COUNT_PAD: tl.constexpr,
):  # fmt: skip
    """One query block of ``HEADS`` heads: read scores from ``lists``, decide, and write the live blocks over them."""
    block = tl.program_id(0) % count_q
    first = tl.program_id(0) // count_q * HEADS
    cols = tl.arange(0, COUNT_PAD)
    visible = visible_blocks(cols, block, q_len, k_len, upper, BLOCK_Q, BLOCK_K, BOUNDED)
    kept = near_blocks(cols, block, position, local_keys, BLOCK_Q, BLOCK_K)
    for head in tl.static_range(HEADS):
        row = lists + ((first + head) * count_q + block).to(tl.int64) * count_k
        scores = tl.load(row + cols, mask=visible, other=0).to(tl.float32, bitcast=True)
        scores = tl.where(visible, scores, float("-inf"))
        if SHARE:
            # strength_j = p_j * n ** (1/4), p the softmax over the n visible blocks
            peak = tl.max(scores, 0)
            weights = tl.exp(scores - peak)
            total = tl.sum(weights, 0)
            count = tl.sum(visible.to(tl.int32), 0).to(tl.float32)
            strength = weights * (tl.sqrt(tl.sqrt(count)) / total)
        else:
            strength = tl.exp(scores)
        # Any NaN among the strengths reaches their sum. Infinite ones are no NaN.
        flaws = tl.sum(tl.where(strength == strength, 0.0, strength), 0)
        kept = kept | (strength > tl.load(odds + (first + head) % heads))
        kept = tl.where((flaws != flaws) | (block >= first_whole), visible, kept)
    whole = whole_blocks(cols, block, k_len, upper, BLOCK_Q, BLOCK_K, BOUNDED)
    write_lists(
        lists, whole_counts, partial_counts, first, block, cols, count_q, count_k, visible & kept, whole, HEADS
    )  # fmt: skip


_selection = Launcher(_select_kernel)


def select_by_strength(lists: BlockLists, operands: Operands, call: SparseCall, *, share: bool) -> None:
    """Replace the scores in ``lists.indices`` by the live blocks and fill the counts.

    Args:
        lists: contiguous; their indices hold the bits of fp32 scores.
        operands: of the call; call: its constants.
        share: whether the rule is ``"share"``, else ``"strength"``.
    """
    limits = Limits.of(operands, call)
    batch, heads, count_q, count_k = lists.indices.shape
    columns, warps = selection_shape(count_k)
    with torch.cuda.device_of(lists.indices):
        constants = device_constants(tuple(map(odds_of, call.tau)), lists.indices.device)
        _selection(
            (layout(lists.indices), call.shape, limits, share),
            batch * heads * count_q // call.shape.heads,
            *(lists.indices, lists.whole, lists.partial, constants),
            *(heads, limits.q_len, limits.k_len, limits.band.upper, limits.position),
            *(count_q, count_k, limits.local_keys, limits.first_whole),
            *(*call.shape, limits.band.bounded, share, columns),
            warps=warps,
        )


def odds_of(tau: float) -> float:
    """``(1 - tau) / tau``: what a strength must exceed; negative, so that all do, for tau >= 1."""
    if tau >= 1.0:
        return -1.0
    return (1.0 - tau) / tau if tau > 0.0 else math.inf
