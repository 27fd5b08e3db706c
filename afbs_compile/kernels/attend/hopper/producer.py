# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The warp of the Hopper kernel that draws tiles and starts the copies of what they need."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from afbs_compile.kernels.attend.hopper.common import CHUNK, ROWS, STEP, after, locate, rows_of, tell_tile


@gluon.jit
def ends(
    tile, lists, planes, section, count_q, count_k, BOUNDED: gl.constexpr, HEADS: gl.constexpr, PARTS: gl.constexpr,
    EMPTY: gl.constexpr,
):  # fmt: skip
    """Length of a tile's list, its partial blocks, its last two entries.

    Two where two make a step; one entry twice where there is one. ``EMPTY``: whether lists may be empty. Every tile has
    a step, so an empty list becomes one of a block past the end: zeros, which the mask hides. Of ``HEADS`` heads of a
    tile the first one's list is read; the others' are the same.
    """
    whole, partials, indices = lists
    plane, block = locate(gl.minimum(tile, planes * count_q - 1), planes, section, count_q, BOUNDED)
    row = plane * HEADS * count_q + block
    partial = gl.load(partials + row)
    count = gl.load(whole + row) + partial
    empty = count == 0
    if EMPTY:
        count = gl.where(empty, 1, count)
        partial = gl.where(empty, 1, partial)
    end = indices + row.to(gl.int64) * count_k + count
    last = gl.load(end - 1)
    if EMPTY:
        last = gl.where(empty, count_k, last)
    before = last
    if PARTS == 2:
        before = gl.load(end - 1 - gl.minimum(count - 1, 1))
    return count, partial, last, before


@gluon.jit
def _copy(desc, batch, head, left, right, ring, slot, PARTS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Start the copy of a step: ``STEP`` rows from ``left``, or half from ``left`` and half from ``right``."""
    smem, ready = ring
    mbarrier.expect(ready.index(slot), STEP * HEAD_DIM * 2)
    for column in gl.static_range(HEAD_DIM // CHUNK):
        chunk = (slot * (HEAD_DIM // CHUNK) + column) * PARTS
        tma.async_copy_global_to_shared(desc, [batch, head, left, CHUNK * column], ready.index(slot), smem.index(chunk))
        if PARTS == 2:
            tma.async_copy_global_to_shared(
                desc, [batch, head, right, CHUNK * column], ready.index(slot), smem.index(chunk + 1)
            )


@gluon.jit
def producer(
    descriptors, lists, counter, rings, notes, sizes,
    HEAD_DIM: gl.constexpr, HEADS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BOUNDED: gl.constexpr,
    EMPTY: gl.constexpr,
):  # fmt: skip
    """Draw tiles and copy what they need, as far ahead as the rings allow."""
    query_desc, key_desc, value_desc = descriptors
    _, _, indices = lists
    query_ring, key_ring, value_ring, free = rings
    query_smem, query_ready, query_free = query_ring
    numbers, told = notes
    _, _, _, _, heads, groups, planes, section, count_q, count_k = sizes
    PARTS: gl.constexpr = STEP // BLOCK_K

    slot = 0
    phase = 1
    query_phase = 1
    tile = gl.program_id(0)
    count, partial, last, before = ends(tile, lists, planes, section, count_q, count_k, BOUNDED, HEADS, PARTS, EMPTY)
    while tile < planes * count_q:
        plane, block = locate(tile, planes, section, count_q, BOUNDED)
        batch = plane // heads
        head = plane % heads
        head_k = head // groups
        entries = indices + (plane * HEADS * count_q + block).to(gl.int64) * count_k
        steps = (count + PARTS - 1) // PARTS
        left = last * BLOCK_K
        right = left
        entry = count - 1
        if PARTS == 2:
            # The last block of an odd list is paired with one past the end: zeros, which the mask hides.
            odd = count % 2
            left = gl.where(odd == 1, last, before) * BLOCK_K
            right = gl.where(odd == 1, count_k, last) * BLOCK_K
            entry = count - 2 + odd

        mbarrier.wait(query_free.index(0), query_phase)
        tell_tile(numbers, 0, batch, head, block, count, partial, left, right)
        mbarrier.arrive(told.index(0), count=1)
        ready = query_ready.index(0)
        mbarrier.expect(ready, 2 * ROWS * HEAD_DIM * 2)
        for part in gl.static_range(2):
            place = rows_of(head, block, part, HEADS)
            tma.async_copy_global_to_shared(query_desc, [batch, place[0], place[1], 0], ready, query_smem.index(part))
        query_phase ^= 1
        for step in range(steps):
            # The next entry is on its way while this one waits for its place.
            entry -= PARTS
            next_left = gl.load(entries + gl.maximum(entry, 0)) * BLOCK_K
            next_right = next_left
            if PARTS == 2:
                next_right = gl.load(entries + gl.maximum(entry + 1, 0)) * BLOCK_K
            # These keys' place was freed by the step that freed the place of the values before.
            _copy(key_desc, batch, head_k, left, right, key_ring, slot, PARTS, HEAD_DIM)
            value_slot = slot
            slot, phase = after(slot, phase, STAGES)
            mbarrier.wait(free.index(slot), phase)
            _copy(value_desc, batch, head_k, left, right, value_ring, value_slot, PARTS, HEAD_DIM)
            left, right = next_left, next_right
            if step == 0:
                # The rings are filling: time to find out what comes after this tile.
                tile = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
                count, partial, last, before = ends(
                    tile, lists, planes, section, count_q, count_k, BOUNDED, HEADS, PARTS, EMPTY
                )

    mbarrier.wait(query_free.index(0), query_phase)
    tell_tile(numbers, 0, -1, 0, 0, 0, 0, 0, 0)
    mbarrier.arrive(told.index(0), count=1)
