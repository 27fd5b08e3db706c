# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The warp of the FP8 kernel that draws tiles and starts the copies of what they need."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from afbs_compile.kernels.attend.hopper.common import QUERY_STAGES, STEP, after, locate, tell, tell_tile
from afbs_compile.kernels.attend.hopper.producer import ends

# Newer Triton releases have another name for it.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def producer(
    descriptors, lists, scales, counter, rings, notes, sizes,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """Draw tiles and copy what they need, as far ahead as the rings allow."""
    query_desc, key_desc, value_desc = descriptors
    _, _, indices = lists
    key_scales, value_scales = scales
    query_smem, query_ready, query_free = rings[0]
    key_smem, key_ready = rings[1]
    value_smem, value_ready = rings[2]
    free = rings[3]
    numbers, step_scales, told = notes
    _, _, _, heads, groups, planes, section, count_q, count_k = sizes

    slot = 0
    phase = 1
    query_slot = 0
    query_phase = 1
    tile = gl.program_id(0)
    count, partial, last, _ = ends(tile, lists, planes, section, count_q, count_k, BOUNDED, 1, 1, False)
    while tile < planes * count_q:
        plane, block = locate(tile, planes, section, count_q, BOUNDED)
        batch = plane // heads
        head = plane % heads
        head_k = head // groups
        entries = indices + (plane * count_q + block).to(gl.int64) * count_k
        # The scales of a key head's blocks lie one after the other.
        first_scale = (batch * (heads // groups) + head_k) * count_k
        entry = count - 1
        block_k = last

        mbarrier.wait(query_free.index(query_slot), query_phase)
        tell_tile(numbers, query_slot, batch, head, block, count, partial, last * STEP, last * STEP)
        mbarrier.arrive(told.index(query_slot), count=1)
        ready = query_ready.index(query_slot)
        mbarrier.expect(ready, STEP * HEAD_DIM)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                query_desc,
                [batch, head, block * STEP + half * (STEP // 2), 0],
                ready,
                query_smem.index(2 * query_slot + half),
            )
        query_slot, query_phase = after(query_slot, query_phase, QUERY_STAGES)
        for step in range(count):
            # The next entry is on its way while this one waits for its place.
            key_scale = gl.load(key_scales + first_scale + block_k)
            value_scale = gl.load(value_scales + first_scale + block_k)
            entry -= 1
            next_block = gl.load(entries + gl.maximum(entry, 0))
            # These keys' place was freed by the step that freed the place of the values before. Their scales are told
            # before the barrier is armed, so whoever passes it can read them.
            tell(step_scales, 2 * slot, key_scale)
            tell(step_scales, 2 * slot + 1, value_scale)
            barrier()
            mbarrier.expect(key_ready.index(slot), STEP * HEAD_DIM)
            tma.async_copy_global_to_shared(
                key_desc, [batch, head_k, block_k * STEP, 0], key_ready.index(slot), key_smem.index(slot)
            )
            value_slot = slot
            slot, phase = after(slot, phase, STAGES)
            mbarrier.wait(free.index(slot), phase)
            mbarrier.expect(value_ready.index(value_slot), STEP * HEAD_DIM)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    value_desc,
                    [batch, head_k, 0, block_k * STEP + half * (STEP // 2)],
                    value_ready.index(value_slot),
                    value_smem.index(2 * value_slot + half),
                )
            block_k = next_block
            if step == 0:
                # The rings are filling: time to find out what comes after this tile.
                tile = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
                count, partial, last, _ = ends(tile, lists, planes, section, count_q, count_k, BOUNDED, 1, 1, False)

    mbarrier.wait(query_free.index(query_slot), query_phase)
    tell_tile(numbers, query_slot, -1, 0, 0, 0, 0, 0, 0)
    mbarrier.arrive(told.index(query_slot), count=1)
