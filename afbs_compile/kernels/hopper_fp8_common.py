# ruff: noqa: N803 (Triton writes compile-time constants in capitals)
# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""What the warp groups of the FP8 kernel share beyond :mod:`afbs_compile.kernels.hopper_common`: tiles and notes.

Queries stay in shared memory here, two tiles of them, for there are no registers left; so there are two notes as well.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

QUERY_STAGES = gl.constexpr(2)
"""Tiles whose queries, and notes on them, are kept."""

NOTE = gl.constexpr(4)
"""Numbers of a note: the tile (-1: no more), the length of its list, and where the keys of its first step begin."""


@gluon.jit
def locate(tile, heads, count_q, CAUSAL: gl.constexpr):
    """Batch, head and query block of a tile; under causality longest rows first, for the short ones fill the end.

    Heads are outermost, so that programs that run together share keys and values in the cache.
    """
    block = tile % count_q
    plane = tile // count_q
    if CAUSAL:
        block = count_q - 1 - block
    return plane // heads, plane % heads, block


@gluon.jit
def ends(tile, counts, indices, count_q, count_k, tiles, CAUSAL: gl.constexpr):
    """Length of a tile's list and its last entry."""
    tile = gl.minimum(tile, tiles - 1)
    block = tile % count_q
    if CAUSAL:
        block = count_q - 1 - block
    row = tile // count_q * count_q + block
    count = gl.load(counts + row)
    end = indices + row.to(gl.int64) * count_k + count
    last = gl.load(end - 1)
    return count, last
