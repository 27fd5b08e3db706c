# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Bands (:class:`afbs_compile.kernels.masks.base.Band`) as Triton kernels compute them.

A kernel is told ``BOUNDED`` and ``upper`` (:class:`afbs_compile.kernels.masks.base.Band`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visible_blocks(
    blocks, query_block, q_len, k_len, upper, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr
):
    """Which of some key blocks hold a key that some row of a query block sees."""
    visible = blocks * BLOCK_K < k_len
    if BOUNDED:
        last_row = tl.minimum(query_block * BLOCK_Q + BLOCK_Q, q_len) - 1
        visible = visible & (blocks * BLOCK_K <= last_row + upper)
    return visible


@triton.jit
def whole_blocks(
    blocks, query_block, k_len, upper, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr
):
    """Which of some key blocks hold nothing but keys that every row of a query block sees."""
    end = blocks * BLOCK_K + BLOCK_K
    whole = end <= k_len
    if BOUNDED:
        whole = whole & (end - 1 <= query_block * BLOCK_Q + upper)
    return whole


@triton.jit
def sees(rows, keys, k_len, upper, BOUNDED: tl.constexpr):
    """Which keys each row sees, ``[rows, keys]``."""
    seen = (keys < k_len)[None, :]
    if BOUNDED:
        seen = seen & (keys[None, :] <= rows[:, None] + upper)
    return seen
