# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The warp groups of the Hopper kernel that multiply: products with K and V, and the softmax between them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from afbs_compile.kernels.attend.hopper.common import ROWS, STEP, after, read_tile, rows_of
from afbs_compile.kernels.attend.hopper.softmax import (
    decayed,
    exponents,
    follow,
    halves,
    join,
    lowest,
    part_sums,
    rescale,
    row_sums,
)
from afbs_compile.kernels.attend.hopper.unseen import clean, hide, holds_unseen


@gluon.jit
def place_of(out, strides, batch, head, row):
    """Where a row of the output begins."""
    stride_batch, stride_head, stride_row = strides
    return out + (batch.to(gl.int64) * stride_batch + head.to(gl.int64) * stride_head + row.to(gl.int64) * stride_row)


@gluon.constexpr_function
def _exchanged(rows, columns, exchanges):
    """Layout of a product after 0, 1 or 2 ``exchanges``, each of which doubles the neighbours of a row in a thread.

    A product leaves two of every eight columns in each thread of a group of four. An exchange swaps a bit of a thread's
    place in its group with one of the column's.
    """
    near, far = [[0, 2], [0, 4]], [[0, 8], [0, 16]]
    held = near[:exchanges] + far[exchanges:]
    shared = far[:exchanges] + near[exchanges:]
    beyond = [[0, 1 << bit] for bit in range(5, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], *held, *beyond, [8, 0]], [*shared, [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [rows, columns]
    )


@gluon.jit
def store(place, stride_row, acc, total, rows_left):
    """Divide a consumer's rows of a tile by their sums and write them, 16 bytes a thread at a time.

    A product leaves four: the 16 bytes of a row that four threads would write together are half a sector of memory, and
    a long queue of stores holds up what follows.
    """
    inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc.type.layout))
    result = (acc * inverse[:, None]).to(place.dtype.element_ty)
    # Two exchanges of one bit each stay in registers; at once they would go through shared memory, which is full. What
    # stands between them keeps the compiler from merging them.
    result = gl.convert_layout(result, _exchanged(acc.shape[0], acc.shape[1], 1))
    result = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [result], dtype=result.dtype, is_pure=False, pack=2)
    layout: gl.constexpr = _exchanged(acc.shape[0], acc.shape[1], 2)
    result = gl.convert_layout(result, layout)
    rows = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
    places = rows.to(gl.int64)[:, None] * stride_row + columns[None, :]
    gl.store(place + places, result, mask=(rows < rows_left)[:, None])


@gluon.jit
def consumer(
    out, strides, indices, valid, stride_valid, rings, notes, scale, steep, sizes,
    PART: gl.constexpr, DTYPE: gl.constexpr, HEAD_DIM: gl.constexpr, HEADS: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, FORM: gl.constexpr, MORE_MASKS: gl.constexpr, VALID: gl.constexpr,
    CLEAN: gl.constexpr,
):  # fmt: skip
    """Half ``PART`` of the rows of every tile that the producer tells of, which has those of ``HEADS`` heads.

    ``FORM`` as in :mod:`afbs_compile.kernels.masks.band_triton`; ``VALID``: whether ``valid`` says which keys are
    valid; ``CLEAN``: whether there may be keys that no row of a tile sees, or rows that see nothing.
    """
    query_ring, key_ring, value_ring, free = rings
    query_smem, query_ready, query_free = query_ring
    key_smem, key_ready = key_ring
    value_smem, value_ready = value_ring
    numbers, told = notes
    q_len, k_len, upper, width, heads, _, _, _, count_q, count_k = sizes
    PARTS: gl.constexpr = STEP // BLOCK_K
    BLOCK_Q: gl.constexpr = 2 * ROWS // HEADS
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    query_layout: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STEP, HEAD_DIM], DTYPE)
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], DTYPE)
    keys = key_smem._reinterpret(DTYPE, [STAGES, STEP, HEAD_DIM], tile_layout)
    values = value_smem._reinterpret(DTYPE, [STAGES, STEP, HEAD_DIM], tile_layout)
    queries = query_smem._reinterpret(DTYPE, [2, ROWS, HEAD_DIM], half_layout).index(PART)
    nothing = gl.zeros([ROWS, STEP], gl.float32, layout=score_layout)

    slot = 0
    phase = 0
    query_phase = 0
    mbarrier.wait(told.index(0), 0)
    batch, head, block, count, partial, left, right = read_tile(numbers, 0)
    mbarrier.wait(query_ready.index(0), 0)
    mbarrier.wait(key_ready.index(0), 0)
    scores = warpgroup_mma(queries, keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    while batch >= 0:
        # ``scores`` are those of the tile's first step, the one that may need a mask. Its keys are free now, and so
        # are the values of the step before, the end of the last tile.
        mbarrier.arrive(free.index(slot), count=1)
        # In registers, or wgmma would read the queries from shared memory again for every step.
        query = queries.load(query_layout)
        mbarrier.arrive(query_free.index(0), count=1)
        own_head, first_row = rows_of(head, block, PART, HEADS)
        place = place_of(out, strides, batch, own_head, first_row)
        rows = first_row + gl.arange(0, ROWS, layout=row_layout)
        steps = (count + PARTS - 1) // PARTS
        of_batch = valid
        if VALID:
            of_batch = valid + batch.to(gl.int64) * stride_valid
        scores = hide(scores, rows, left, right, k_len, upper, width, of_batch, BLOCK_K, FORM, VALID)
        if CLEAN:
            # Of the step whose values come next: whether it has keys that nobody sees.
            top, bottom = block * BLOCK_Q, gl.minimum(block * BLOCK_Q + BLOCK_Q, q_len) - 1
            dirty = (partial > 0) & holds_unseen(top, bottom, left, right, upper, width, BLOCK_K, FORM, VALID)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=out_layout)
        peak, c, shift, decay = follow(scores, lowest(steep, ROWS, row_layout), scale, steep)
        left_half, right_half = halves(gl.exp2(exponents(scores, c, shift)))
        sums = part_sums(left_half) + part_sums(right_half)
        weight = gl.convert_layout(join(left_half, right_half).to(DTYPE), weight_layout)
        # An odd list has one entry in its first step, the others two a step.
        odd = count % PARTS
        entries = indices + ((batch * heads + head) * HEADS * count_q + block).to(gl.int64) * count_k
        near, near_phase = after(slot, phase, STAGES)
        mbarrier.wait(key_ready.index(near), near_phase, pred=steps > 1)
        for step in range(1, steps):
            # Until the scores are there the tensor cores are busy: whatever is done up to then costs no time.
            near, near_phase = after(slot, phase, STAGES)
            scores = warpgroup_mma(query, keys.index(near).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(value_ready.index(slot), phase)
            # A wait for nothing: it keeps the compiler from rescaling before the product is issued.
            decay = warpgroup_mma_wait(1, deps=[decay])
            acc = rescale(acc, decay)
            if CLEAN:  # noqa: SIM102 (one is known to the compiler, the other is not)
                if dirty:
                    clean(
                        values.index(slot), top, bottom, left, right, k_len, upper, width, of_batch,
                        HEAD_DIM, BLOCK_K, FORM, VALID,
                    )  # fmt: skip
            acc = warpgroup_mma(weight, values.index(slot), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            if MORE_MASKS:  # noqa: SIM102 (one is known to the compiler, the other is not)
                if PARTS * step - odd < partial:
                    entry = count + odd - PARTS * (step + 1)
                    left = gl.load(entries + entry) * BLOCK_K
                    right = gl.load(entries + entry + PARTS - 1) * BLOCK_K
                    scores = hide(scores, rows, left, right, k_len, upper, width, of_batch, BLOCK_K, FORM, VALID)
            if CLEAN:
                dirty = (PARTS * step - odd < partial) & holds_unseen(
                    top, bottom, left, right, upper, width, BLOCK_K, FORM, VALID
                )
            peak, c, shift, decay = follow(scores, peak, scale, steep)
            left_half, right_half = halves(exponents(scores, c, shift))
            left_half = gl.exp2(left_half)
            sums = decayed(sums, decay) + part_sums(left_half)
            # Halfway through the powers the product with V is done with the weights' registers, and the next weights
            # are packed there while the other half is made. The first wait is for nothing; the second, a branch,
            # keeps the compiler from moving the third above all powers.
            left_half, right_half, sums = warpgroup_mma_wait(1, deps=[left_half, right_half, sums])
            far, far_phase = after(near, near_phase, STAGES)
            mbarrier.wait(key_ready.index(far), far_phase, pred=step + 1 < steps)
            acc, weight, right_half = warpgroup_mma_wait(0, deps=[acc, weight, right_half])
            mbarrier.arrive(free.index(near), count=1)
            right_half = gl.exp2(right_half)
            sums += part_sums(right_half)
            weight = gl.convert_layout(join(left_half, right_half).to(DTYPE), weight_layout)
            slot, phase = near, near_phase

        # The last product with V, and the first with K of the next tile.
        acc = rescale(acc, decay)
        mbarrier.wait(value_ready.index(slot), phase)
        if CLEAN:  # noqa: SIM102
            if dirty:
                clean(
                    values.index(slot), top, bottom, left, right, k_len, upper, width, of_batch,
                    HEAD_DIM, BLOCK_K, FORM, VALID,
                )  # fmt: skip
        acc = warpgroup_mma(weight, values.index(slot), acc, is_async=True)
        query_phase ^= 1
        slot, phase = after(slot, phase, STAGES)
        mbarrier.wait(told.index(0), query_phase)
        batch, head, block, count, partial, left, right = read_tile(numbers, 0)
        mbarrier.wait(query_ready.index(0), query_phase, pred=batch >= 0)
        mbarrier.wait(key_ready.index(slot), phase, pred=batch >= 0)
        # After the last tile there is no next one: a product of what lies there, which nobody reads.
        scores = warpgroup_mma(queries, keys.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc, weight = warpgroup_mma_wait(1, deps=[acc, weight])
        total = row_sums(sums, row_layout)
        if CLEAN:  # a row that sees nothing is 0, and so is its accumulator
            total = gl.where(total == 0.0, 1.0, total)
        store(place, strides[2], acc, total, q_len - first_row)
        scores = warpgroup_mma_wait(0, deps=[scores])
