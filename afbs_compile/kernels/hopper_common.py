# ruff: noqa: N803 (Triton writes compile-time constants in capitals)
# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""What the warp groups of the Hopper kernel share: rings of barriers, the order of tiles, notes to each other."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

STEP = gl.constexpr(128)
"""Keys of a step."""

CHUNK = gl.constexpr(64)
"""Columns of a copy: 128 bytes, the widest swizzle. The chunks of a step lie column by column, as wgmma reads them."""


@gluon.jit
def ring(DEPTH: gl.constexpr, COUNT: gl.constexpr):
    """``DEPTH`` barriers that ``COUNT`` arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(DEPTH):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def after(slot, phase, DEPTH: gl.constexpr):
    """The place after ``slot`` in a ring, and its phase."""
    slot += 1
    phase = gl.where(slot == DEPTH, phase ^ 1, phase)
    slot = gl.where(slot == DEPTH, 0, slot)
    return slot, phase


@gluon.jit
def locate(tile, planes, section, count_q, CAUSAL: gl.constexpr):
    """Plane (batch and head) and query block of a tile.

    ``section`` planes, whose keys and values fit the cache together, take turns; under causality longest rows first,
    for the short ones fill the end.
    """
    first = tile // (section * count_q) * section
    width = gl.minimum(section, planes - first)
    place = tile - first * count_q
    block = place // width
    if CAUSAL:
        block = count_q - 1 - block
    return first + place % width, block


@gluon.jit
def tell(notes, place, value):
    """Write one number for the consumers."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    notes.index(place).store(gl.full([1], value, gl.int32, layout=layout))


@gluon.jit
def read(notes, place):
    """Read what :func:`tell` wrote."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(notes.index(place).load(layout), 0)
