# ruff: noqa: N803, N806 (Triton writes compile-time constants in capitals)
# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Block-sparse attention forward for Hopper, in Gluon: three warp groups that run at the same time.

    producer (one warp)      TMA: the next tile's queries, then keys and values along its list, into rings
    consumers 0 and 1        64 rows each: wgmma and softmax

A tile is one block of 128 query rows of one head. Programs stay on their multiprocessor and draw tiles from a counter.
A step is 128 keys: one block, or two blocks of 64 that need not be neighbours.

A consumer issues the product of step s with K and, at once, that of step s - 1 with V, so that its softmax runs while
the tensor cores still work; across tiles, the first product of the next one runs while the last one is stored. A list
is walked from its end: only its last entries can need a mask, so the loop over the others has none.

Every wait is on an mbarrier's phase, a bit: a ring's reader waits for its own phase, and its writer for the opposite
one, which a fresh barrier has behind it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

STEP = gl.constexpr(128)
"""Keys of a step."""

CHUNK = gl.constexpr(64)
"""Columns of a copy: 128 bytes, the widest swizzle. The chunks of a step lie column by column, as wgmma reads them."""

STEEP = gl.constexpr(2.0**28)
"""Where scores (in log2 units) pass this, their rounding is no longer a small exponent; see :func:`_softmax`."""


@gluon.jit
def _ring(DEPTH: gl.constexpr, COUNT: gl.constexpr):
    """``DEPTH`` barriers that ``COUNT`` arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(DEPTH):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def _after(slot, phase, DEPTH: gl.constexpr):
    """The place after ``slot`` in a ring, and its phase."""
    slot += 1
    phase = gl.where(slot == DEPTH, phase ^ 1, phase)
    slot = gl.where(slot == DEPTH, 0, slot)
    return slot, phase


@gluon.jit
def _locate(tile, planes, section, count_q, CAUSAL: gl.constexpr):
    """Plane (batch and head) and query block of a tile.

    ``section`` planes, whose keys and values fit the cache together, take turns; under causality longest rows first.
    """
    first = tile // (section * count_q) * section
    width = gl.minimum(section, planes - first)
    place = tile - first * count_q
    block = place // width
    if CAUSAL:
        block = count_q - 1 - block
    return first + place % width, block


@gluon.jit
def _ends(tile, counts, indices, planes, section, count_q, count_k, CAUSAL: gl.constexpr):
    """Length of a tile's list and its last two entries (one entry twice where there is but one)."""
    plane, block = _locate(gl.minimum(tile, planes * count_q - 1), planes, section, count_q, CAUSAL)
    row = plane * count_q + block
    count = gl.load(counts + row)
    end = indices + row.to(gl.int64) * count_k + count
    return count, gl.load(end - 1), gl.load(end - 1 - gl.minimum(count - 1, 1))


@gluon.jit
def _tell(notes, place: gl.constexpr, value):
    """Write one number for the consumers."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    notes.index(place).store(gl.full([1], value, gl.int32, layout=layout))


@gluon.jit
def _read(notes, place: gl.constexpr):
    """Read what :func:`_tell` wrote."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(notes.index(place).load(layout), 0)


@gluon.jit
def _copy(desc, batch, head, left, right, ring, slot, PARTS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Start the copy of a step: ``STEP`` rows from ``left``, or half from ``left`` and half from ``right``."""
    smem, ready, _ = ring
    mbarrier.expect(ready.index(slot), STEP * HEAD_DIM * 2)
    for column in gl.static_range(HEAD_DIM // CHUNK):
        chunk = (slot * (HEAD_DIM // CHUNK) + column) * PARTS
        tma.async_copy_global_to_shared(desc, [batch, head, left, CHUNK * column], ready.index(slot), smem.index(chunk))
        if PARTS == 2:
            tma.async_copy_global_to_shared(
                desc, [batch, head, right, CHUNK * column], ready.index(slot), smem.index(chunk + 1)
            )


@gluon.jit
def _producer(
    descriptors, lists, counter, rings, notes, sizes,
    HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Draw tiles and copy what they need, as far ahead as the rings allow."""
    query_desc, key_desc, value_desc = descriptors
    counts, indices = lists
    query_ring, key_ring, value_ring = rings
    query_smem, query_ready, query_free = query_ring
    _, _, key_free = key_ring
    _, _, value_free = value_ring
    numbers, told = notes
    _, heads, groups, planes, section, count_q, count_k = sizes
    PARTS: gl.constexpr = STEP // BLOCK_K
    HALF: gl.constexpr = BLOCK_Q // 2

    slot = 0
    phase = 1
    query_phase = 1
    tile = gl.program_id(0)
    count, last, before = _ends(tile, counts, indices, planes, section, count_q, count_k, CAUSAL)
    while tile < planes * count_q:
        plane, block = _locate(tile, planes, section, count_q, CAUSAL)
        batch = plane // heads
        head = plane % heads
        entries = indices + (plane * count_q + block).to(gl.int64) * count_k
        steps = (count + PARTS - 1) // PARTS
        entry = count - 1
        left = last * BLOCK_K
        right = left
        if PARTS == 2:
            # The last block of an odd list is paired with one past the end: zeros, which the mask hides.
            odd = count % 2
            entry = count - 2 + odd
            left = gl.where(odd == 1, last, before) * BLOCK_K
            right = gl.where(odd == 1, count_k, last) * BLOCK_K

        mbarrier.wait(query_free.index(0), query_phase)
        query_phase ^= 1
        _tell(numbers, 0, tile)
        _tell(numbers, 1, count)
        _tell(numbers, 2, left)
        _tell(numbers, 3, right)
        mbarrier.arrive(told.index(0), count=1)
        mbarrier.expect(query_ready.index(0), BLOCK_Q * HEAD_DIM * 2)
        for half in gl.static_range(2):
            first_row = block * BLOCK_Q + half * HALF
            tma.async_copy_global_to_shared(
                query_desc, [batch, head, first_row, 0], query_ready.index(0), query_smem.index(half)
            )
        for step in range(steps):
            # The next entry is on its way while this one waits for its place.
            entry -= PARTS
            next_left = gl.load(entries + gl.maximum(entry, 0)) * BLOCK_K
            next_right = next_left
            if PARTS == 2:
                next_right = gl.load(entries + gl.maximum(entry + 1, 0)) * BLOCK_K
            mbarrier.wait(key_free.index(slot), phase)
            _copy(key_desc, batch, head // groups, left, right, key_ring, slot, PARTS, HEAD_DIM)
            mbarrier.wait(value_free.index(slot), phase)
            _copy(value_desc, batch, head // groups, left, right, value_ring, slot, PARTS, HEAD_DIM)
            left, right = next_left, next_right
            slot, phase = _after(slot, phase, STAGES)
            if step == 0:
                # The rings are filling: time to find out what comes after this tile.
                tile = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
                count, last, before = _ends(tile, counts, indices, planes, section, count_q, count_k, CAUSAL)

    mbarrier.wait(query_free.index(0), query_phase)
    _tell(numbers, 0, -1)
    _tell(numbers, 1, 0)
    mbarrier.arrive(told.index(0), count=1)


@gluon.jit
def _row_sums(x, rows_of: gl.constexpr):
    """Sum of each row: first over every eighth column, four sums a thread that do not wait for each other."""
    part = gl.sum(x.reshape([x.shape[0], x.shape[1] // 8, 8]), 1)
    return gl.convert_layout(gl.sum(part, 1), rows_of, assert_trivial=True)


@gluon.jit
def _row_maxima(x, rows_of: gl.constexpr):
    """Maximum of each row, in the order of :func:`_row_sums`."""
    part = gl.max(x.reshape([x.shape[0], x.shape[1] // 8, 8]), 1)
    return gl.convert_layout(gl.max(part, 1), rows_of, assert_trivial=True)


@gluon.jit
def _softmax(scores, peak, total, scale, steep):
    """One step of the running softmax: weights, maxima, sums, and the factor of what came before."""
    rows_of: gl.constexpr = peak.type.layout
    new_peak = gl.maximum(peak, _row_maxima(scores, rows_of))
    # A row that has seen no key yet has no maximum to subtract.
    base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    # l <- l * 2^(c (m_old - m)) + rowsum(2^(c s - c m)),   with c m rounded and c s - c m fused, in one instruction.
    # The rounding is a common factor of the row, harmless until it overflows. Beyond 2^28 neighbouring scores lie 16
    # log2 units and more apart: the largest take all, whatever the scale; the power of two above c rounds nothing.
    c = gl.where(gl.abs(base) * scale < STEEP, scale, steep)
    weights = gl.exp2(scores * c[:, None] - (base * c)[:, None])
    decay = gl.exp2((peak - base) * c)
    return weights, new_peak, total * decay + _row_sums(weights, rows_of), decay


@gluon.jit
def _mask(scores, rows, left, right, length, BLOCK_K: gl.constexpr, CAUSAL: gl.constexpr):
    """Hide keys past the end and, under causality, those after a row."""
    places = gl.arange(0, STEP, layout=gl.SliceLayout(0, scores.type.layout))
    keys = gl.where(places < BLOCK_K, left + places, right + places - BLOCK_K)
    allowed = (keys < length)[None, :]
    if CAUSAL:
        allowed = allowed & (rows[:, None] >= keys[None, :])
    return gl.where(allowed, scores, float("-inf"))


@gluon.jit
def _store(out, acc, total, plane, first_row, length, heads):
    """Write a consumer's rows; the output is [B, N, H, HEAD_DIM] in memory."""
    layout: gl.constexpr = acc.type.layout
    result = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, layout))[:, None]
    rows = first_row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
    place = ((plane // heads).to(gl.int64) * length + rows) * heads + plane % heads
    places = place[:, None] * acc.shape[1] + columns[None, :]
    gl.store(out + places, result.to(out.dtype.element_ty), mask=(rows < length)[:, None])


@gluon.jit
def _consumer(
    out, indices, rings, notes, scale, steep, sizes,
    PART: gl.constexpr, DTYPE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Half ``PART`` of the rows of every tile that the producer tells of."""
    query_ring, key_ring, value_ring = rings
    query_smem, query_ready, query_free = query_ring
    key_smem, key_ready, key_free = key_ring
    value_smem, value_ready, value_free = value_ring
    numbers, told = notes
    length, heads, _, planes, section, count_q, count_k = sizes
    PARTS: gl.constexpr = STEP // BLOCK_K
    TWO_MASKS: gl.constexpr = CAUSAL and BLOCK_Q > BLOCK_K
    ROWS: gl.constexpr = BLOCK_Q // 2
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    query_layout: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    rows_of: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows_of: gl.constexpr = gl.SliceLayout(1, out_layout)
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STEP, HEAD_DIM], DTYPE)
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], DTYPE)
    queries = query_smem._reinterpret(DTYPE, [2, ROWS, HEAD_DIM], half_layout).index(PART)
    keys = key_smem._reinterpret(DTYPE, [STAGES, STEP, HEAD_DIM], tile_layout)
    values = value_smem._reinterpret(DTYPE, [STAGES, STEP, HEAD_DIM], tile_layout)
    nothing = gl.zeros([ROWS, STEP], gl.float32, layout=score_layout)

    slot = 0
    phase = 0
    query_phase = 0
    mbarrier.wait(told.index(0), query_phase)
    tile = _read(numbers, 0)
    count = _read(numbers, 1)
    left = _read(numbers, 2)
    right = _read(numbers, 3)
    mbarrier.wait(query_ready.index(0), query_phase)
    mbarrier.wait(key_ready.index(slot), phase)
    scores = warpgroup_mma(queries, keys.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    while tile >= 0:
        # ``scores`` are those of the tile's first step, the one that may need a mask.
        mbarrier.arrive(key_free.index(slot), count=1)
        # In registers, or wgmma would read the queries from shared memory again for every step.
        query = queries.load(query_layout)
        mbarrier.arrive(query_free.index(0), count=1)
        plane, block = _locate(tile, planes, section, count_q, CAUSAL)
        first_row = block * BLOCK_Q + PART * ROWS
        rows = first_row + gl.arange(0, ROWS, layout=rows_of)
        steps = (count + PARTS - 1) // PARTS
        scores = _mask(scores, rows, left, right, length, BLOCK_K, CAUSAL)
        peak = gl.full([ROWS], float("-inf"), gl.float32, layout=rows_of)
        total = gl.zeros([ROWS], gl.float32, layout=rows_of)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=out_layout)
        weights, peak, total, decay = _softmax(scores, peak, total, scale, steep)
        weight = gl.convert_layout(weights.to(DTYPE), weight_layout)
        odd = False
        if TWO_MASKS:
            # The block before the last may lie on the diagonal too; in an odd list it belongs to the second step.
            odd = count % 2 == 1
            entries = indices + (plane * count_q + block).to(gl.int64) * count_k
            left = gl.load(entries + gl.maximum(count - 3, 0)) * BLOCK_K
            right = gl.load(entries + gl.maximum(count - 2, 0)) * BLOCK_K
        near, near_phase = _after(slot, phase, STAGES)
        mbarrier.wait(key_ready.index(near), near_phase, pred=steps > 1)
        for step in range(1, steps):
            near, near_phase = _after(slot, phase, STAGES)
            scores = warpgroup_mma(query, keys.index(near).permute((1, 0)), nothing, use_acc=False, is_async=True)
            # A wait for nothing: it keeps the compiler from rescaling before the product is issued.
            decay = warpgroup_mma_wait(1, deps=[decay])
            acc = acc * gl.convert_layout(decay, out_rows_of)[:, None]
            mbarrier.wait(value_ready.index(slot), phase)
            acc = warpgroup_mma(weight, values.index(slot), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(key_free.index(near), count=1)
            if TWO_MASKS:  # noqa: SIM102 (one is known to the compiler, the other is not)
                if (step == 1) & odd:
                    scores = _mask(scores, rows, left, right, length, BLOCK_K, CAUSAL)
            weights, peak, total, decay = _softmax(scores, peak, total, scale, steep)
            next_weight = gl.convert_layout(weights.to(DTYPE), weight_layout)
            # Waiting here, not at the top: a branch that keeps the compiler from moving the next wait above the
            # softmax. Keys of this step must be free by now, or the producer could not bring the next ones.
            far, far_phase = _after(near, near_phase, STAGES)
            mbarrier.wait(key_ready.index(far), far_phase, pred=step + 1 < steps)
            acc, weight = warpgroup_mma_wait(0, deps=[acc, weight])
            mbarrier.arrive(value_free.index(slot), count=1)
            weight = next_weight
            slot, phase = near, near_phase

        # The last product with V, and the first with K of the next tile.
        acc = acc * gl.convert_layout(decay, out_rows_of)[:, None]
        mbarrier.wait(value_ready.index(slot), phase)
        acc = warpgroup_mma(weight, values.index(slot), acc, is_async=True)
        value_slot = slot
        slot, phase = _after(slot, phase, STAGES)
        query_phase ^= 1
        mbarrier.wait(told.index(0), query_phase)
        tile = _read(numbers, 0)
        count = _read(numbers, 1)
        left = _read(numbers, 2)
        right = _read(numbers, 3)
        mbarrier.wait(query_ready.index(0), query_phase, pred=tile >= 0)
        mbarrier.wait(key_ready.index(slot), phase, pred=tile >= 0)
        # After the last tile there is no next one: a product of what lies there, which nobody reads.
        scores = warpgroup_mma(queries, keys.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc, weight = warpgroup_mma_wait(1, deps=[acc, weight])
        mbarrier.arrive(value_free.index(value_slot), count=1)
        _store(out, acc, total, plane, first_row, length, heads)
        scores = warpgroup_mma_wait(0, deps=[scores])


@gluon.jit(do_not_specialize=["length", "heads", "groups", "planes", "section", "count_q", "count_k"])
def forward_kernel(
    query_desc,
    key_desc,
    value_desc,
    out,
    counts,
    indices,
    counter,
    scale,
    steep,
    length,
    heads,
    groups,
    planes,
    section,
    count_q,
    count_k,
    HEAD_DIM: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Tiles drawn from ``counter``, which starts at zero, until there are none."""
    DTYPE: gl.constexpr = query_desc.dtype
    PIECES: gl.constexpr = STAGES * (STEP // BLOCK_K) * (HEAD_DIM // CHUNK)
    query_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, BLOCK_Q // 2, HEAD_DIM], query_desc.layout)
    key_smem = gl.allocate_shared_memory(DTYPE, [PIECES, 1, 1, BLOCK_K, CHUNK], key_desc.layout)
    value_smem = gl.allocate_shared_memory(DTYPE, [PIECES, 1, 1, BLOCK_K, CHUNK], value_desc.layout)
    numbers = gl.allocate_shared_memory(gl.int32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    notes = (numbers, _ring(1, 1))
    rings = (
        (query_smem, _ring(1, 1), _ring(1, 2)),
        (key_smem, _ring(STAGES, 1), _ring(STAGES, 2)),
        (value_smem, _ring(STAGES, 1), _ring(STAGES, 2)),
    )
    sizes = (length, heads, groups, planes, section, count_q, count_k)
    gl.warp_specialize(
        [
            (
                _consumer,
                (out, indices, rings, notes, scale, steep, sizes, 0, DTYPE, HEAD_DIM, BLOCK_Q, BLOCK_K, STAGES, CAUSAL),
            ),
            (
                _consumer,
                (out, indices, rings, notes, scale, steep, sizes, 1, DTYPE, HEAD_DIM, BLOCK_Q, BLOCK_K, STAGES, CAUSAL),
            ),
            (
                _producer,
                (
                    (query_desc, key_desc, value_desc), (counts, indices), counter, rings, notes, sizes,
                    HEAD_DIM, BLOCK_Q, BLOCK_K, STAGES, CAUSAL,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
