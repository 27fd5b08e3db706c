# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Keys that rows do not see, in the Hopper kernel: scores of them become -inf, and values of them 0.

A weight of 0 does not undo a value that is infinite or NaN. Values of keys that no row of a tile sees are overwritten
where they lie, in partial blocks only. Both consumers write the same, each before it reads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from afbs_compile.kernels.attend.hopper.common import STEP

PIECE = gl.constexpr(16)
"""Rows of values that are looked at at a time: more would take registers that the product needs."""


@gluon.jit
def _keys(left, right, BLOCK_K: gl.constexpr, first: gl.constexpr, COUNT: gl.constexpr, layout: gl.constexpr):
    """The keys of some places of a step."""
    places = first + gl.arange(0, COUNT, layout=layout)
    return gl.where(places < BLOCK_K, left + places, right + places - BLOCK_K)


@gluon.jit
def hide(
    scores, rows, left, right, k_len, upper, width, valid, BLOCK_K: gl.constexpr, FORM: gl.constexpr,
    VALID: gl.constexpr,
):  # fmt: skip
    """Hide keys past the end, those that a row does not see and those that are not valid."""
    keys = _keys(left, right, BLOCK_K, 0, STEP, gl.SliceLayout(0, scores.type.layout))
    exists = keys < k_len
    if VALID:
        exists = exists & (gl.load(valid + keys, mask=exists, other=0) != 0)
    allowed = exists[None, :]
    if FORM > 0:
        allowed = allowed & ((rows + upper)[:, None] >= keys[None, :])
        if FORM == 2:
            allowed = allowed & ((rows + upper - width)[:, None] < keys[None, :])
        if FORM == 3:  # of rows whose own key is before the first one nothing is left
            allowed = allowed & (((rows + upper) // width)[:, None] == (keys // width)[None, :])
    return gl.where(allowed, scores, float("-inf"))


@gluon.jit
def holds_unseen(
    first_row, last_row, left, right, upper, width, BLOCK_K: gl.constexpr, FORM: gl.constexpr, VALID: gl.constexpr
):
    """Whether a step may hold keys that no row from ``first_row`` to ``last_row`` sees."""
    found = left < 0
    if VALID:
        found = left >= 0
    if FORM > 0:
        found = found | (gl.maximum(left, right) + BLOCK_K > last_row + upper + 1)
        first = gl.minimum(left, right)
        if FORM == 2:
            found = found | (first <= first_row + upper - width)
        if FORM == 3:
            found = found | (first < gl.maximum(first_row + upper, 0) // width * width)
    return found


@gluon.jit
def clean(
    tile, first_row, last_row, left, right, k_len, upper, width, valid,
    HEAD_DIM: gl.constexpr, BLOCK_K: gl.constexpr, FORM: gl.constexpr, VALID: gl.constexpr,
):  # fmt: skip
    """Overwrite with 0 the values in shared memory of keys that no row from ``first_row`` to ``last_row`` sees."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    for part in gl.static_range(STEP // PIECE):
        keys = _keys(left, right, BLOCK_K, part * PIECE, PIECE, gl.SliceLayout(1, layout))
        seen = keys < k_len
        if VALID:
            seen = seen & (gl.load(valid + keys, mask=seen, other=0) != 0)
        if FORM > 0:
            seen = seen & (keys <= last_row + upper)
            if FORM == 2:
                seen = seen & (keys > first_row + upper - width)
            if FORM == 3:
                seen = seen & (keys >= gl.maximum(first_row + upper, 0) // width * width)
        piece = tile.slice(part * PIECE, PIECE)
        values = piece.load(layout)
        piece.store(gl.where(seen[:, None], values, gl.zeros_like(values)))
    fence_async_shared()  # the tensor cores read by another way than threads write
