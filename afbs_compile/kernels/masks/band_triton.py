# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Bands (:class:`afbs_compile.kernels.masks.base.Band`) as Triton kernels compute them.

A kernel is told the band's ``upper``, its ``width`` and, at compile time, ``BAND``: which form it has
(:func:`afbs_compile.kernels.masks.band.form`). What a form does not need costs it nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from afbs_compile.kernels.masks import band

FREE = tl.constexpr(band.FREE)
BOUNDED = tl.constexpr(band.BOUNDED)
CHUNK = tl.constexpr(band.CHUNK)


@triton.jit
def first_keys(rows, upper, width, BAND: tl.constexpr):
    """The first key that each row sees, of a window or of chunks; 0 or less for all from the first key on."""
    last = rows + upper
    start = last - width + 1
    if BAND == CHUNK:
        # Rounded towards 0, which is wrong before the first key only: there a row sees nothing, wherever it starts.
        start = last // width * width
    return start


@triton.jit
def visible_blocks(
    blocks, query_block, q_len, k_len, upper, width,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Which of some key blocks hold a key that some row of a query block sees."""
    visible = blocks * BLOCK_K < k_len
    if BAND != FREE:
        last_row = tl.minimum(query_block * BLOCK_Q + BLOCK_Q, q_len) - 1
        visible = visible & (blocks * BLOCK_K <= last_row + upper)
        if BAND != BOUNDED:
            # Of the rows that reach a block the first looks back the furthest.
            nearest = tl.maximum(query_block * BLOCK_Q, blocks * BLOCK_K - upper)
            visible = visible & (first_keys(nearest, upper, width, BAND) < tl.minimum((blocks + 1) * BLOCK_K, k_len))
    return visible


@triton.jit
def whole_blocks(
    blocks, query_block, q_len, k_len, upper, width,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Which of some key blocks hold nothing but keys that every row of a query block sees."""
    end = blocks * BLOCK_K + BLOCK_K
    whole = end <= k_len
    if BAND != FREE:
        whole = whole & (end - 1 <= query_block * BLOCK_Q + upper)
        if BAND != BOUNDED:
            last_row = tl.minimum(query_block * BLOCK_Q + BLOCK_Q, q_len) - 1
            whole = whole & (first_keys(last_row, upper, width, BAND) <= blocks * BLOCK_K)
    return whole


@triton.jit
def covered_blocks(
    blocks, query_block, q_len, k_len, upper, width,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Which of some visible key blocks hold nothing but keys that some row of a query block sees: the others blur."""
    covered = blocks * BLOCK_K < k_len
    if BAND != FREE:
        last_row = tl.minimum(query_block * BLOCK_Q + BLOCK_Q, q_len) - 1
        covered = covered & (tl.minimum((blocks + 1) * BLOCK_K, k_len) - 1 <= last_row + upper)
        if BAND != BOUNDED:
            covered = covered & (first_keys(query_block * BLOCK_Q, upper, width, BAND) <= blocks * BLOCK_K)
    return covered


@triton.jit
def sees(rows, keys, k_len, upper, width, BAND: tl.constexpr):
    """Which keys each row sees, ``[rows, keys]``."""
    seen = (keys < k_len)[None, :]
    if BAND != FREE:
        seen = seen & (keys[None, :] <= rows[:, None] + upper)
        if BAND != BOUNDED:
            seen = seen & (keys[None, :] >= first_keys(rows, upper, width, BAND)[:, None])
    return seen
