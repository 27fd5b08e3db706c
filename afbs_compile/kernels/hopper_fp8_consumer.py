# ruff: noqa: N803, N806 (Triton writes compile-time constants in capitals)
# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The warp groups of the FP8 kernel that multiply: products with K and V, and the softmax between them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from afbs_compile.kernels.fp8 import WEIGHT_EXPONENT
from afbs_compile.kernels.hopper_common import STEP, after, read
from afbs_compile.kernels.hopper_consumer import _mask, _row_maxima, _row_sums, _store
from afbs_compile.kernels.hopper_fp8_common import NOTE, QUERY_STAGES, locate

SHIFT = gl.constexpr(float(WEIGHT_EXPONENT))


@gluon.jit
def _softmax(scores, peak, total, factor):
    """One step of the running softmax: weights times 2^SHIFT, maxima, sums, and the factor of what came before.

    ``scores * factor`` are in log2 units; factors are powers of two, so nothing but the sum is rounded.
    """
    rows_of: gl.constexpr = peak.type.layout
    new_peak = gl.maximum(peak, _row_maxima(scores, rows_of) * factor)
    # A row that has seen no key yet has no maximum to subtract.
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    # l <- l * 2^(m_old - m) + rowsum(2^(s - m))
    weights = gl.exp2(scores * factor[:, None] + (SHIFT - base)[:, None])
    decay = gl.exp2(peak - base)
    return weights, new_peak, total * decay + _row_sums(weights, rows_of), decay


@gluon.jit
def _operand(weights, layout: gl.constexpr):
    """Weights as the product with V takes them, without a move between threads.

    A thread holds columns 2t, 2t + 1, 2t + 8 and 2t + 9 of every 16, and its part of an FP8 operand is four in a row:
    the values' keys are stored in that order (:func:`afbs_compile.kernels.fp8.key_order`).
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
    PART: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Half ``PART`` of the rows of every tile that the producer tells of."""
    query_smem, query_ready, query_free = rings[0]
    key_smem, key_ready, key_free = rings[1]
    value_smem, value_ready, value_free = rings[2]
    numbers, step_scales, told = notes
    length, heads, _, count_q, _, _ = sizes
    ROWS: gl.constexpr = STEP // 2
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 32])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 32])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 4)
    rows_of: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows_of: gl.constexpr = gl.SliceLayout(1, out_layout)
    key_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STEP, HEAD_DIM], gl.float8e4nv)
    value_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEAD_DIM, STEP], gl.float8e4nv)
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], gl.float8e4nv)
    keys = key_smem._reinterpret(gl.float8e4nv, [STAGES, STEP, HEAD_DIM], key_layout)
    values = value_smem._reinterpret(gl.float8e4nv, [STAGES, HEAD_DIM, STEP], value_layout)
    queries = query_smem._reinterpret(gl.float8e4nv, [2 * QUERY_STAGES, ROWS, HEAD_DIM], half_layout)
    lines = PART * ROWS + gl.arange(0, ROWS, layout=rows_of)
    no_scores = gl.zeros([ROWS, STEP], gl.float32, layout=score_layout)
    no_values = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=out_layout)

    slot = 0
    phase = 0
    query_slot = 0
    query_phase = 0
    mbarrier.wait(told.index(0), 0)
    tile = read(numbers, 0)
    mbarrier.wait(query_ready.index(0), 0)
    mbarrier.wait(key_ready.index(0), 0)
    scores = warpgroup_mma(queries.index(PART), keys.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    while tile >= 0:
        # ``scores`` are those of the tile's first step, the only one that may need a mask.
        key_scale = _power(read(step_scales, 2 * slot))
        value_bits = read(step_scales, 2 * slot + 1)
        mbarrier.arrive(key_free.index(slot), count=1)
        steps = read(numbers, NOTE * query_slot + 1)
        first_key = read(numbers, NOTE * query_slot + 2)
        _, _, block = locate(tile, heads, count_q, CAUSAL)
        rows = block * STEP + lines
        query_scale = gl.load(query_scales + (tile // count_q * count_q + block).to(gl.int64) * STEP + lines)
        scores = _mask(scores, rows, first_key, first_key, length, STEP, CAUSAL)
        peak = gl.full([ROWS], float("-inf"), gl.float32, layout=rows_of)
        total = gl.zeros([ROWS], gl.float32, layout=rows_of)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=out_layout)
        unit = 1.0
        for _ in range(1, steps):
            weights, peak, total, decay = _softmax(scores, peak, total, query_scale * key_scale)
            weight = _operand(weights, weight_layout)
            mbarrier.wait(value_ready.index(slot), phase)
            added = warpgroup_mma(weight, values.index(slot).permute((1, 0)), no_values, use_acc=False, is_async=True)
            near, near_phase = after(slot, phase, STAGES)
            mbarrier.wait(key_ready.index(near), near_phase)
            query = queries.index(2 * query_slot + PART)
            scores = warpgroup_mma(query, keys.index(near).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            added = warpgroup_mma_wait(1, deps=[added])
            mbarrier.arrive(value_free.index(slot), count=1)
            # The tensor cores add FP8 products with 14 bits, so only a step's own are left to them. The sum is in
            # units of the latest step's values: o <- o * 2^(m_old - m) * u_old / u + P V
            acc = acc * gl.convert_layout(decay * unit, out_rows_of)[:, None] + added
            scores = warpgroup_mma_wait(0, deps=[scores])
            key_scale = _power(read(step_scales, 2 * near))
            near_bits = read(step_scales, 2 * near + 1)
            unit = _power(value_bits) * _inverse(near_bits)
            value_bits = near_bits
            mbarrier.arrive(key_free.index(near), count=1)
            slot, phase = near, near_phase

        # The last product with V, and the first with K of the next tile.
        weights, peak, total, decay = _softmax(scores, peak, total, query_scale * key_scale)
        weight = _operand(weights, weight_layout)
        mbarrier.wait(value_ready.index(slot), phase)
        added = warpgroup_mma(weight, values.index(slot).permute((1, 0)), no_values, use_acc=False, is_async=True)
        mbarrier.arrive(query_free.index(query_slot), count=1)
        last_slot = slot
        last_tile = tile
        query_slot, query_phase = after(query_slot, query_phase, QUERY_STAGES)
        slot, phase = after(slot, phase, STAGES)
        mbarrier.wait(told.index(query_slot), query_phase)
        tile = read(numbers, NOTE * query_slot)
        mbarrier.wait(query_ready.index(query_slot), query_phase, pred=tile >= 0)
        mbarrier.wait(key_ready.index(slot), phase, pred=tile >= 0)
        # After the last tile there is no next one: a product of what lies there, which nobody reads.
        query = queries.index(2 * query_slot + PART)
        scores = warpgroup_mma(query, keys.index(slot).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        added = warpgroup_mma_wait(1, deps=[added])
        mbarrier.arrive(value_free.index(last_slot), count=1)
        acc = acc * gl.convert_layout(decay * unit, out_rows_of)[:, None] + added
        batch, head, block = locate(last_tile, heads, count_q, CAUSAL)
        _store(out, strides, acc, total * _inverse(value_bits), batch, head, block * STEP + PART * ROWS, length)
        scores = warpgroup_mma_wait(0, deps=[scores])
