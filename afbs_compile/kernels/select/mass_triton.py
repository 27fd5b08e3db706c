# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Selection by mass on the GPU: one kernel, fp32. The rule is :func:`policies.rules.select_by_mass`, with a theta.

Scores lie in the memory of ``BlockLists.indices`` and are replaced there by the indices, row by row: at 128K tokens
they would otherwise cost another half gigabyte for 32 heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.blocks import BlockLists
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.launcher import Launcher, device_constants, layout
from afbs_compile.kernels.masks.band_triton import visible_blocks, whole_blocks
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.select.lists_triton import Limits, near_blocks, selection_shape, write_lists

SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _live_of_head(
    lists, similarity, thresholds, head, block, cols, visible, heads, groups, count_q, count_k, programs_q, first_whole
):  # fmt: skip
    """The blocks that one head keeps, beside those near the query block."""
    program = head * count_q + block
    head_k = head // heads * (heads // groups) + head % heads // groups
    tau_head = tl.load(thresholds + head % heads)
    theta_head = tl.load(thresholds + heads + head % heads)
    row = lists + program.to(tl.int64) * count_k
    scores = tl.load(row + cols, mask=visible, other=0).to(tl.float32, bitcast=True)
    of_keys = similarity + programs_q + head_k.to(tl.int64) * count_k
    coherent = tl.load(of_keys + cols, mask=visible, other=0.0) >= theta_head
    coherent_row = tl.load(similarity + program) >= theta_head

    # p = softmax over the visible coherent blocks. tl.max passes over NaN, but the sum does not.
    scores = tl.where(visible & coherent, scores, float("-inf"))
    peak = tl.max(scores, 0)
    weights = tl.exp(scores - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights, 0)
    probability = tl.math.div_rn(weights, tl.maximum(total, SMALLEST_NORMAL) + tl.zeros_like(weights))

    # Keep j when sum(p_i for p_i > p_j) < tau: the smallest t with sum(p_i for p_i > t) < tau is the least probability
    # kept. Probabilities are not negative, so they order as their bits do, and t is found bit by bit.
    bits = probability.to(tl.int32, bitcast=True)
    threshold = 0
    for shift in range(30):
        half = 0x20000000 >> shift
        above = tl.sum(tl.where(bits > threshold + half - 1, probability, 0.0), 0)
        threshold = tl.where(above < tau_head, threshold, threshold + half)
    keep_all = (tau_head >= 1.0) | (coherent_row == 0) | (total != total) | (block >= first_whole)
    threshold = tl.where(keep_all, -0x80000000, threshold)
    return visible & ((bits >= threshold) | (coherent == 0))


# One compilation for most sizes and limits: it takes half a second, and a calibration meets many.
@triton.jit(
    do_not_specialize=["heads", "groups", "q_len", "k_len", "upper", "position", "count_q", "programs_q", "local_keys",
                       "first_whole"]
)  # fmt: skip
def _select_kernel(
    lists, whole_counts, partial_counts, similarity, thresholds, heads, groups, q_len, k_len, upper, position, count_q,
    count_k, programs_q, local_keys, first_whole,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEADS: tl.constexpr, BOUNDED: tl.constexpr, COUNT_PAD: tl.constexpr,
):  # fmt: skip
    """One query block of ``HEADS`` heads: read scores from ``lists``, decide, and write the live blocks over them."""
    block = tl.program_id(0) % count_q
    first = tl.program_id(0) // count_q * HEADS
    cols = tl.arange(0, COUNT_PAD)
    visible = visible_blocks(cols, block, q_len, k_len, upper, BLOCK_Q, BLOCK_K, BOUNDED)
    live = visible & near_blocks(cols, block, position, local_keys, BLOCK_Q, BLOCK_K)
    for head in tl.static_range(HEADS):
        live = live | _live_of_head(
            lists, similarity, thresholds, first + head, block, cols, visible, heads, groups, count_q, count_k,
            programs_q, first_whole,
        )  # fmt: skip
    whole = whole_blocks(cols, block, k_len, upper, BLOCK_Q, BLOCK_K, BOUNDED)
    write_lists(
        lists, whole_counts, partial_counts, first, block, cols, count_q, count_k, live, whole, HEADS
    )  # fmt: skip


_selection = Launcher(_select_kernel)


def select_by_mass(lists: BlockLists, similarity: Tensor, operands: Operands, call: SparseCall) -> None:
    """Replace the scores in ``lists.indices`` by the live blocks and fill the counts.

    Args:
        lists: contiguous; their indices hold the bits of fp32 scores.
        similarity: what :func:`afbs_compile.kernels.policies.triton.means.pooled_scores` returns, or ones.
        operands: of the call; call: its constants.
    """
    limits = Limits.of(operands, call)
    batch, heads, count_q, count_k = lists.indices.shape
    columns, warps = selection_shape(count_k)
    with torch.cuda.device_of(lists.indices):
        thresholds = device_constants((*call.tau, *call.theta), lists.indices.device)
        _selection(
            (layout(lists.indices), operands.groups, call.shape, limits),
            batch * heads * count_q // call.shape.heads,
            *(lists.indices, lists.whole, lists.partial, similarity, thresholds),
            *(heads, operands.groups, limits.q_len, limits.k_len, limits.band.upper, limits.position),
            *(count_q, count_k, batch * heads * count_q, limits.local_keys, limits.first_whole),
            *(*call.shape, limits.band.bounded, columns),
            warps=warps,
        )
