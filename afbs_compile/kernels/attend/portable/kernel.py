# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Block-sparse attention forward in Triton: one program per query tile walks its list of live key blocks.

The rule is :func:`afbs_compile.kernels.spec.attention.masked_attention`. The whole blocks of a list, which come first,
run a loop without masks, the partial ones another.

``FORM`` says what the formula is (:mod:`afbs_compile.kernels.masks.band_triton`); ``VALID``, ``MASK`` (1 bool, 2 added
numbers), ``CAPPED`` and ``SINKS`` whether there is such an operand. Where numbers are added, scores are capped or have
sinks, they are multiplied by the softmax scale first, and ``CHANGED`` says so.
"""

from __future__ import annotations

import triton
import triton.language as tl

from afbs_compile.kernels.masks.band_triton import sees


@triton.jit
def attend_tile(
    acc, total, peak, query, key, value, rows, start, stride_key_row, stride_value_row, scale, q_len, k_len, upper, lam,
    width, natural, softcap, valid, mask, stride_mask_row, stride_mask_key,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, TILE_K: tl.constexpr, FORM: tl.constexpr, MASKED: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, PRECISION: tl.constexpr, VALID: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr,
    CHANGED: tl.constexpr,
):  # fmt: skip
    """Fold keys ``start .. start + TILE_K`` into the running softmax.

    ``scale`` (c below) is positive and turns scores into log2 units; ``peak`` (m) is in units of the scores, which
    ``natural`` makes those of the softmax where they are changed.
    """
    places = tl.arange(0, TILE_K)
    cols = tl.arange(0, DIM_PAD)
    first = start.to(tl.int64)
    keys = key + first * stride_key_row + places[:, None] * stride_key_row + cols[None, :]
    values = value + first * stride_value_row + places[:, None] * stride_value_row + cols[None, :]
    if MASKED:
        inside = (start + places < k_len)[:, None] & (cols < HEAD_DIM)[None, :]
        key_tile = tl.load(keys, mask=inside, other=0.0)
    elif HEAD_DIM != DIM_PAD:
        inside = (places >= 0)[:, None] & (cols < HEAD_DIM)[None, :]
        key_tile = tl.load(keys, mask=inside, other=0.0)
    else:
        key_tile = tl.load(keys)

    scores = tl.dot(query, tl.trans(key_tile), input_precision=PRECISION)
    if CHANGED:
        scores = scores * natural
        if CAPPED:  # tanh(x) = 1 - 2 / (e^2x + 1)
            scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0))
    if MASKED:
        seen = sees(rows, start + places, k_len, upper, width, FORM)
        if VALID:
            seen = seen & (tl.load(valid + start + places, mask=start + places < k_len, other=0) != 0)[None, :]
        if MASK > 0:
            given = mask + rows.to(tl.int64)[:, None] * stride_mask_row + (first + places)[None, :] * stride_mask_key
            there = (rows < q_len)[:, None] & (start + places < k_len)[None, :]
            numbers = tl.load(given, mask=there, other=0)
            if MASK == 1:
                seen = seen & (numbers != 0)
            else:
                numbers = numbers.to(tl.float32)
                seen = seen & (numbers != float("-inf"))
                scores = scores + numbers
        if VALID or MASK > 0 or FORM > 1:  # rows past the end weigh nothing
            seen = seen & (rows < q_len)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    tile_peak = tl.max(scores, 1)
    new_peak = tl.maximum(peak, tile_peak)
    # A row may see no key of the tile and have seen none before, or its scores lie below what fp32 holds.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)

    # l <- l * 2^(c (m_old - m_new)) + rowsum(2^(c (s - m_new))),   o <- o * 2^(c (m_old - m_new)) + 2^(c (s - m_new)) V
    # Subtracting first is exact at the maximum. The fused c * s - c * m, one instruction less, overflows where c * m
    # has an ulp above 128, and fp16 inputs of 6e4 reach that.
    weights = tl.math.exp2((scores - base[:, None]) * scale)
    decay = tl.math.exp2((peak - base) * scale)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    needed = True
    if HAS_LAMBDA:
        # Each row skips by its own scores: another row of the tile, a later token maybe, has no say.
        skipped = (tile_peak - base) * scale < lam
        weights = tl.where(skipped[:, None], 0.0, weights)
        needed = tl.min((skipped | (rows >= q_len)).to(tl.int32), 0) == 0
    if needed:
        if MASKED or HEAD_DIM != DIM_PAD:  # noqa: SIM108 (a ternary would evaluate both in the interpreter)
            value_tile = tl.load(values, mask=inside, other=0.0)
        else:
            value_tile = tl.load(values)
        if MASKED and (VALID or MASK > 0 or FORM > 1):  # what no row weighs may be anything: NaN times zero is NaN
            weighed = tl.max((weights != 0.0).to(tl.int32), 0) != 0
            value_tile = tl.where(weighed[:, None], value_tile, 0.0)
        acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc, input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def forward_kernel(
    query, key, value, out, whole_counts, partial_counts, indices, lam, valid, mask, sinks, scale, q_len, k_len, upper,
    width, natural, softcap, heads, groups,
    count_q, count_k, stride_query_batch, stride_query_head, stride_query_row, stride_key_batch, stride_key_head,
    stride_key_row, stride_value_batch, stride_value_head, stride_value_row, stride_out_batch, stride_out_head,
    stride_out_row, stride_valid_batch, stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_key,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr, FORM: tl.constexpr, HAS_PARTIAL: tl.constexpr, HAS_LAMBDA: tl.constexpr,
    PRECISION: tl.constexpr, VALID: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    CHANGED: tl.constexpr, MAY_BE_BLIND: tl.constexpr,
):  # fmt: skip
    """Rows ``tile * TILE_Q ..`` of one head."""
    SPLIT_Q: tl.constexpr = BLOCK_Q // TILE_Q
    SPLIT_K: tl.constexpr = BLOCK_K // TILE_K
    # Heads are outermost, so that programs that run together share keys and values in the cache.
    tiles = count_q * SPLIT_Q
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    if FORM > 0:
        # Longest rows first: the short ones fill the end.
        tile = tiles - 1 - tile
    batch = (plane // heads).to(tl.int64)
    head = plane % heads
    head_k = (head // groups).to(tl.int64)
    block = tile // SPLIT_Q

    rows = tile * TILE_Q + tl.arange(0, TILE_Q)
    cols = tl.arange(0, DIM_PAD)
    inside = (rows < q_len)[:, None] & (cols < HEAD_DIM)[None, :]
    query += batch * stride_query_batch + head.to(tl.int64) * stride_query_head
    key += batch * stride_key_batch + head_k * stride_key_head
    value += batch * stride_value_batch + head_k * stride_value_head
    query_tile = tl.load(query + rows.to(tl.int64)[:, None] * stride_query_row + cols[None, :], mask=inside, other=0.0)

    row = plane.to(tl.int64) * count_q + block
    whole = tl.load(whole_counts + row)
    blocks = indices + row * count_k
    lam_head = 0.0
    if HAS_LAMBDA:
        lam_head = tl.load(lam + head)
    acc = tl.zeros([TILE_Q, DIM_PAD], tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    peak = tl.full([TILE_Q], float("-inf"), tl.float32)
    if VALID:
        valid += batch * stride_valid_batch
    if MASK > 0:
        mask += batch * stride_mask_batch + head.to(tl.int64) * stride_mask_head
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        peak = tl.zeros([TILE_Q], tl.float32) + sink
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    for entry in range(0, whole * SPLIT_K):
        start = tl.load(blocks + entry // SPLIT_K) * BLOCK_K + entry % SPLIT_K * TILE_K
        acc, total, peak = attend_tile(
            acc, total, peak, query_tile, key, value, rows, start, stride_key_row, stride_value_row, scale,
            q_len, k_len, upper, lam_head, width, natural, softcap, valid, mask, stride_mask_row, stride_mask_key,
            HEAD_DIM, DIM_PAD, TILE_K, FORM, False, HAS_LAMBDA, PRECISION, VALID, MASK, CAPPED, CHANGED,
        )  # fmt: skip
    if HAS_PARTIAL:
        partial = tl.load(partial_counts + row)
        for entry in range(whole * SPLIT_K, (whole + partial) * SPLIT_K):
            start = tl.load(blocks + entry // SPLIT_K) * BLOCK_K + entry % SPLIT_K * TILE_K
            acc, total, peak = attend_tile(
                acc, total, peak, query_tile, key, value, rows, start, stride_key_row, stride_value_row, scale,
                q_len, k_len, upper, lam_head, width, natural, softcap, valid, mask, stride_mask_row, stride_mask_key,
                HEAD_DIM, DIM_PAD, TILE_K, FORM, True, HAS_LAMBDA, PRECISION, VALID, MASK, CAPPED, CHANGED,
            )  # fmt: skip

    out += batch * stride_out_batch + head.to(tl.int64) * stride_out_head
    if MAY_BE_BLIND:  # a row that sees nothing is 0, and so is its accumulator
        total = tl.where(total == 0.0, 1.0, total)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows.to(tl.int64)[:, None] * stride_out_row + cols[None, :], result, mask=inside)
