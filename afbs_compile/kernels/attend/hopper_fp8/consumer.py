# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The warp groups of the FP8 kernel that multiply: products with K and V, and the softmax between them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from afbs_compile.kernels.attend.hopper.common import QUERY_STAGES, STEP, after, read, read_tile
from afbs_compile.kernels.attend.hopper.consumer import place_of, store
from afbs_compile.kernels.attend.hopper.softmax import decayed, halves, part_sums, row_maxima, row_sums
from afbs_compile.kernels.attend.hopper.unseen import hide
from afbs_compile.kernels.spec.fp8 import WEIGHT_EXPONENT

SHIFT = gl.constexpr(float(WEIGHT_EXPONENT))


@gluon.jit
def _maxima(scores, peak, factor):
    """The running maxima, what is subtracted from the scores, and the factor of what came before.

    ``scores * factor`` are in log2 units; factors are powers of two, so nothing but the difference is rounded.
    """
    rows_of: gl.constexpr = peak.type.layout
    new_peak = gl.maximum(peak, row_maxima(scores, rows_of) * factor)
    # A row that has seen no key yet has no maximum to subtract.
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    return new_peak, SHIFT - base, gl.exp2(peak - base)


@gluon.jit
def _partial_sums(x, layout: gl.constexpr):
    """Sums of every eighth column: of those that one thread holds."""
    return gl.convert_layout(part_sums(x), layout, assert_trivial=True)


@gluon.jit
def _add_up(sums, decay, left, right):
    """The running sums of the weights, each thread its own: they are added to each other at the end of a tile."""
    layout: gl.constexpr = sums.type.layout
    # l <- l * 2^(m_old - m) + rowsum(2^(s - m))
    return decayed(sums, decay) + (_partial_sums(left, layout) + _partial_sums(right, layout))


@gluon.jit
def _weights(scores, factor, shift):
    """2^(s - m), times 2^SHIFT."""
    rows_of: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    factor = gl.convert_layout(factor, rows_of, assert_trivial=True)
    shift = gl.convert_layout(shift, rows_of, assert_trivial=True)
    return gl.exp2(scores * factor[:, None] + shift[:, None])


@gluon.jit
def _halves(scores, layout: gl.constexpr):
    """The first and the second half of the columns."""
    left, right = halves(scores)
    return gl.convert_layout(left, layout, assert_trivial=True), gl.convert_layout(right, layout, assert_trivial=True)


@gluon.jit
def _operand(weights, layout: gl.constexpr):
    """Weights as the product with V takes them, without a move between threads.

    A thread holds columns 2t, 2t + 1, 2t + 8 and 2t + 9 of every 16, and its part of an FP8 operand is four in a row:
    the values' keys are stored in that order (:func:`afbs_compile.kernels.spec.fp8.key_order`).
    """
    rows: gl.constexpr = weights.shape[0]
    columns: gl.constexpr = weights.shape[1]
    weights = weights.reshape([rows, columns // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([rows, columns])
    weights = gl.convert_layout(weights, layout, assert_trivial=True)
    # Four at a time, for the compiler would give every byte a register.
    packed = gl.inline_asm_elementwise(
        "{ .reg .b16 a, b;\n"
        "cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;\n"
        "mov.b32 $0, {a, b}; }",
        "=r,r,r,r,r",
        [weights],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )
    return packed


@gluon.jit
def _softmax(scores, peak, sums, factor, part_layout: gl.constexpr, weight_layout: gl.constexpr):
    """One step of the running softmax: both halves of the weights, maxima, sums, and the factor of what came before."""
    peak, shift, decay = _maxima(scores, peak, factor)
    left, right = _halves(scores, part_layout)
    left = _weights(left, factor, shift)
    weight = _operand(left, weight_layout)
    right = _weights(right, factor, shift)
    other = _operand(right, weight_layout)
    return weight, other, peak, _add_up(sums, decay, left, right), decay


@gluon.jit
def _power(bits):
    """The power of two that has these bits."""
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _inverse(bits):
    """The inverse of that power, exactly: bits of 2^e are (e + 127) << 23."""
    return (0x7F000000 - bits).to(gl.float32, bitcast=True)


@gluon.jit
def consumer(
    out, strides, query_scales, rings, notes, sizes,
    PART: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """Half ``PART`` of the rows of every tile that the producer tells of."""
    query_smem, query_ready, query_free = rings[0]
    key_smem, key_ready = rings[1]
    value_smem, value_ready = rings[2]
    free = rings[3]
    numbers, step_scales, told = notes
    q_len, k_len, upper, heads, _, _, _, count_q, _ = sizes
    ROWS: gl.constexpr = STEP // 2
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 32])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 32])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 4)
    rows_of: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows_of: gl.constexpr = gl.SliceLayout(1, out_layout)
    key_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STEP, HEAD_DIM], gl.float8e4nv)
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    part_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP // 2, 32])
    value_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEAD_DIM, STEP // 2], gl.float8e4nv)
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], gl.float8e4nv)
    keys = key_smem._reinterpret(gl.float8e4nv, [STAGES, STEP, HEAD_DIM], key_layout)
    values = value_smem._reinterpret(gl.float8e4nv, [2 * STAGES, HEAD_DIM, STEP // 2], value_layout)
    queries = query_smem._reinterpret(gl.float8e4nv, [2 * QUERY_STAGES, ROWS, HEAD_DIM], half_layout)
    lines = PART * ROWS + gl.arange(0, ROWS, layout=rows_of)
    no_scores = gl.zeros([ROWS, STEP], gl.float32, layout=score_layout)
    no_values = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=out_layout)

    slot = 0
    phase = 0
    query_slot = 0
    query_phase = 0
    mbarrier.wait(told.index(0), 0)
    batch, head, block, steps, _, first_key, _ = read_tile(numbers, 0)
    mbarrier.wait(query_ready.index(0), 0)
    mbarrier.wait(key_ready.index(0), 0)
    key_bits = read(step_scales, 0)
    value_bits = read(step_scales, 1)
    scores = warpgroup_mma(queries.index(PART), keys.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    while batch >= 0:
        # ``scores`` are those of the tile's first step, the only one that may need a mask.
        first_row = block * STEP + PART * ROWS
        place = place_of(out, strides, batch, head, first_row)
        query_scale = gl.load(query_scales + ((batch * heads + head) * count_q + block).to(gl.int64) * STEP + lines)
        scores = hide(
            scores, block * STEP + lines, first_key, first_key, k_len, upper, 1, query_scales, STEP, BOUNDED, False
        )
        peak = gl.full([ROWS], float("-inf"), gl.float32, layout=rows_of)
        sums = gl.zeros([ROWS, 8], gl.float32, layout=sums_layout)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=out_layout)
        unit = 1.0
        near, near_phase = after(slot, phase, STAGES)
        mbarrier.wait(value_ready.index(slot), phase)
        mbarrier.wait(key_ready.index(near), near_phase, pred=steps > 1)
        for step in range(1, steps):
            near, near_phase = after(slot, phase, STAGES)
            near_key_bits = read(step_scales, 2 * near)
            near_value_bits = read(step_scales, 2 * near + 1)
            factor = query_scale * _power(key_bits)
            weight, other, peak, sums, decay = _softmax(scores, peak, sums, factor, part_layout, weight_layout)
            # This step's keys are free, and so are the values of the step before.
            mbarrier.arrive(free.index(slot), count=1)
            added = warpgroup_mma(
                weight, values.index(2 * slot).permute((1, 0)), no_values, use_acc=False, is_async=True
            )
            added = warpgroup_mma(other, values.index(2 * slot + 1).permute((1, 0)), added, is_async=True)
            query = queries.index(2 * query_slot + PART)
            scores = warpgroup_mma(query, keys.index(near).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            # What the next step needs is waited for while the tensor cores are busy.
            far, far_phase = after(near, near_phase, STAGES)
            mbarrier.wait(value_ready.index(near), near_phase)
            mbarrier.wait(key_ready.index(far), far_phase, pred=step + 1 < steps)
            added = warpgroup_mma_wait(1, deps=[added])
            # The tensor cores add FP8 products with 14 bits, so only a step's own are left to them. The sum is in
            # units of the latest step's values: o <- o * 2^(m_old - m) * u_old / u + P V
            acc = acc * gl.convert_layout(decay * unit, out_rows_of)[:, None] + added
            scores = warpgroup_mma_wait(0, deps=[scores])
            unit = _power(value_bits) * _inverse(near_value_bits)
            key_bits, value_bits = near_key_bits, near_value_bits
            slot, phase = near, near_phase

        # The last product with V, and the first with K of the next tile.
        factor = query_scale * _power(key_bits)
        weight, other, peak, sums, decay = _softmax(scores, peak, sums, factor, part_layout, weight_layout)
        mbarrier.arrive(free.index(slot), count=1)
        mbarrier.arrive(query_free.index(query_slot), count=1)
        last_slot = slot
        last_bits = value_bits
        query_slot, query_phase = after(query_slot, query_phase, QUERY_STAGES)
        slot, phase = after(slot, phase, STAGES)
        mbarrier.wait(told.index(query_slot), query_phase)
        batch, head, block, steps, _, first_key, _ = read_tile(numbers, query_slot)
        mbarrier.wait(query_ready.index(query_slot), query_phase, pred=batch >= 0)
        mbarrier.wait(key_ready.index(slot), phase, pred=batch >= 0)
        key_bits = read(step_scales, 2 * slot)
        value_bits = read(step_scales, 2 * slot + 1)
        added = warpgroup_mma(
            weight, values.index(2 * last_slot).permute((1, 0)), no_values, use_acc=False, is_async=True
        )
        added = warpgroup_mma(other, values.index(2 * last_slot + 1).permute((1, 0)), added, is_async=True)
        # After the last tile there is no next one: a product of what lies there, which nobody reads.
        query = queries.index(2 * query_slot + PART)
        scores = warpgroup_mma(query, keys.index(slot).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        added = warpgroup_mma_wait(1, deps=[added])
        acc = acc * gl.convert_layout(decay * unit, out_rows_of)[:, None] + added
        total = row_sums(sums, rows_of)
        store(place, strides[2], acc, total * _inverse(last_bits), q_len - first_row)
        scores = warpgroup_mma_wait(0, deps=[scores])
