# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""What the warp groups of the Hopper kernels share: rings of barriers, the order of tiles, notes to each other."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

STEP = gl.constexpr(128)
"""Keys of a step."""

CHUNK = gl.constexpr(64)
"""Columns of a copy: 128 bytes, the widest swizzle. The chunks of a step lie column by column, as wgmma reads them."""

ROWS = gl.constexpr(64)
"""Query rows of a consumer."""

QUERY_STAGES = gl.constexpr(2)
"""Tiles of which the FP8 kernel keeps queries and notes: they stay in shared memory there, for want of registers."""

NOTE = gl.constexpr(8)
"""Room of a note on a tile, in numbers: :func:`tell_tile` writes seven."""


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
def locate(tile, planes, section, count_q, BOUNDED: gl.constexpr):
    """Plane (batch and head) and query block of a tile.

    ``section`` planes, whose keys and values fit the cache together, take turns; where later rows see more, these come
    first, for the short ones fill the end. The last block of every plane comes before everything: its rows may attend
    everything, and then it takes several times as long as any other.
    """
    ahead = 0
    count = count_q
    if BOUNDED:
        ahead = planes
        count = gl.maximum(count_q - 1, 1)
    first = (tile - ahead) // (section * count) * section
    width = gl.minimum(section, planes - first)
    place = tile - ahead - first * count
    block = place // width
    plane = first + place % width
    if BOUNDED:
        plane = gl.where(tile < ahead, tile, plane)
        block = gl.where(tile < ahead, count_q - 1, count_q - 2 - block)
    return plane, block


@gluon.jit
def rows_of(head, block, PART: gl.constexpr, HEADS: gl.constexpr):
    """Head and first row of a consumer's part of a tile: half of one head's rows, or those of one of two heads."""
    return head * HEADS + PART % HEADS, (block * (2 // HEADS) + PART // HEADS) * ROWS


@gluon.jit
def tell(notes, place, value):
    """Write one number for the consumers.

    Every thread does. Before an arrival that speaks for all of them the compiler puts a ``bar.warp.sync``, but not
    before bytes are expected at a barrier.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    notes.index(place).store(gl.full([1], value, gl.int32, layout=layout))


@gluon.jit
def tell_tile(notes, note, batch, head, block, count, partial, left, right):
    """What the consumers know of a tile: where it lies, its list's length and partial blocks, its first step's keys.

    Batch -1 says that there are no more.
    """
    tell(notes, NOTE * note, batch)
    tell(notes, NOTE * note + 1, head)
    tell(notes, NOTE * note + 2, block)
    tell(notes, NOTE * note + 3, count)
    tell(notes, NOTE * note + 4, partial)
    tell(notes, NOTE * note + 5, left)
    tell(notes, NOTE * note + 6, right)


@gluon.jit
def read(notes, place):
    """Read what :func:`tell` wrote."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(notes.index(place).load(layout), 0)


@gluon.jit
def read_tile(notes, note):
    """Read what :func:`tell_tile` wrote."""
    return (
        read(notes, NOTE * note),
        read(notes, NOTE * note + 1),
        read(notes, NOTE * note + 2),
        read(notes, NOTE * note + 3),
        read(notes, NOTE * note + 4),
        read(notes, NOTE * note + 5),
        read(notes, NOTE * note + 6),
    )
