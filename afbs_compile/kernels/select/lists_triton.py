# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""What the kernels that select share: which blocks are always kept, and how lists are written."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.launcher import padded
from afbs_compile.kernels.masks.band import told
from afbs_compile.kernels.masks.base import Band
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.selection import first_whole_block

FEWEST_COLUMNS = 128
"""Key blocks that a selection is compiled for at least: they cost a warp nothing, and short calls share one kernel."""


class Limits(NamedTuple):
    """What a kernel that selects is told of lengths, of the mask and of the blocks that are always kept.

    Attributes:
        q_len, k_len, band: of the operands; position: of row 0 among the keys.
        local_keys: at most the number of keys; first_whole: the first query block that keeps every block.
    """

    q_len: int
    k_len: int
    band: Band
    position: int
    local_keys: int
    first_whole: int

    @classmethod
    def of(cls, operands: Operands, call: SparseCall) -> Limits:
        """The limits of a call."""
        q_len, k_len = operands.q_len, operands.k_len
        whole = first_whole_block(q_len, call.shape.q, call.kept.last_rows)
        position = operands.mask.offset(q_len, k_len)
        return cls(q_len, k_len, told(operands), position, min(call.kept.local_keys, k_len), whole)


def selection_shape(count_k: int) -> tuple[int, int]:
    """Columns that a program which selects among ``count_k`` key blocks takes, and its warps.

    16 numbers a thread keep the row in registers; one warp needs no barrier for its sums.
    """
    columns = max(padded(count_k), FEWEST_COLUMNS)
    return columns, min(max(columns // 512, 1), 16)


@triton.jit
def near_blocks(blocks, query_block, position, local_keys, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which of some key blocks hold positions of the query block, or the keys right before them."""
    first = query_block * BLOCK_Q + position
    return (blocks * BLOCK_K < first + BLOCK_Q) & (first < blocks * BLOCK_K + BLOCK_K + local_keys)


@triton.jit
def write_lists(
    lists, whole_counts, partial_counts, first_head, block, blocks, count_q, count_k, live, whole, HEADS: tl.constexpr
):
    """Overwrite the scores of ``HEADS`` heads with their live blocks, whole ones first, and store how many of either.

    Every store depends on a sum over whole rows, so no score is overwritten before it is read.
    """
    first = (live & whole).to(tl.int32)
    rest = (live & (whole == 0)).to(tl.int32)
    count = tl.sum(first, 0)
    others = tl.sum(rest, 0)
    place = tl.where(whole, tl.cumsum(first, 0) - first, count + tl.cumsum(rest, 0) - rest)
    for head in tl.static_range(HEADS):
        program = (first_head + head) * count_q + block
        row = lists + program.to(tl.int64) * count_k
        tl.store(row + place, blocks, mask=live)
        tl.store(row + blocks, tl.zeros_like(blocks), mask=(blocks < count_k) & (blocks >= count + others))
        tl.store(whole_counts + program, count)
        tl.store(partial_counts + program, others)
