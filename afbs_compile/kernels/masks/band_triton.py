# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Bands (:class:`afbs_compile.kernels.masks.base.Band`) as Triton kernels compute them.

Kernels that select blocks are told ``BOUNDED`` and ``upper``, those that attend ``FORM`` (:func:`form`), ``upper`` and
``width``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from afbs_compile.kernels.masks.base import Band

UNBOUNDED, BOUNDED, WINDOW, CHUNK = range(4)


def form(band: Band) -> int:
    """Which of the bands it is, as attending kernels are told."""
    if not band.bounded:
        return UNBOUNDED
    return CHUNK if band.chunked else WINDOW if band.width else BOUNDED


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
def sees(rows, keys, k_len, upper, width, FORM: tl.constexpr):
    """Which keys each row sees, ``[rows, keys]``."""
    seen = (keys < k_len)[None, :]
    if FORM > 0:
        last = rows[:, None] + upper
        seen = seen & (keys[None, :] <= last)
        if FORM == 2:
            seen = seen & (keys[None, :] > last - width)
        if FORM == 3:  # of rows whose own key is before the first one nothing is left
            seen = seen & (keys[None, :] // width == last // width)
    return seen
