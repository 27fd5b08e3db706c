# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Block-sparse attention forward in Triton: one program per query tile walks its list of live key blocks.

The rule is :func:`afbs_compile.kernels.spec.attention.masked_attention`. The whole blocks of a list, which come first,
run a loop without masks, the partial ones another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from afbs_compile.kernels.masks.band_triton import sees


@triton.jit
def attend_tile(
    acc, total, peak, query, key, value, rows, start, stride_key_row, stride_value_row, scale, q_len, k_len, upper, lam,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, TILE_K: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold keys ``start .. start + TILE_K`` into the running softmax.

    ``scale`` (c below) is positive and turns scores into log2 units; ``peak`` (m) is in units of the scores.
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
    if MASKED:
        scores = tl.where(sees(rows, start + places, k_len, upper, BOUNDED), scores, float("-inf"))
    tile_peak = tl.max(scores, 1)
    new_peak = tl.maximum(peak, tile_peak)
    base = new_peak
    if MASKED:  # a row may see no key of the tile, and have seen none before
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
        acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc, input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def forward_kernel(
    query, key, value, out, whole_counts, partial_counts, indices, lam, scale, q_len, k_len, upper, heads, groups,
    count_q, count_k, stride_query_batch, stride_query_head, stride_query_row, stride_key_batch, stride_key_head,
    stride_key_row, stride_value_batch, stride_value_head, stride_value_row, stride_out_batch, stride_out_head,
    stride_out_row,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr, BOUNDED: tl.constexpr, HAS_PARTIAL: tl.constexpr, HAS_LAMBDA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``tile * TILE_Q ..`` of one head."""
    SPLIT_Q: tl.constexpr = BLOCK_Q // TILE_Q
    SPLIT_K: tl.constexpr = BLOCK_K // TILE_K
    # Heads are outermost, so that programs that run together share keys and values in the cache.
    tiles = count_q * SPLIT_Q
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    if BOUNDED:
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
    for entry in range(0, whole * SPLIT_K):
        start = tl.load(blocks + entry // SPLIT_K) * BLOCK_K + entry % SPLIT_K * TILE_K
        acc, total, peak = attend_tile(
            acc, total, peak, query_tile, key, value, rows, start, stride_key_row, stride_value_row, scale,
            q_len, k_len, upper, lam_head, HEAD_DIM, DIM_PAD, TILE_K, BOUNDED, False, HAS_LAMBDA, PRECISION,
        )  # fmt: skip
    if HAS_PARTIAL:
        partial = tl.load(partial_counts + row)
        for entry in range(whole * SPLIT_K, (whole + partial) * SPLIT_K):
            start = tl.load(blocks + entry // SPLIT_K) * BLOCK_K + entry % SPLIT_K * TILE_K
            acc, total, peak = attend_tile(
                acc, total, peak, query_tile, key, value, rows, start, stride_key_row, stride_value_row, scale,
                q_len, k_len, upper, lam_head, HEAD_DIM, DIM_PAD, TILE_K, BOUNDED, True, HAS_LAMBDA, PRECISION,
            )  # fmt: skip

    out += batch * stride_out_batch + head.to(tl.int64) * stride_out_head
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows.to(tl.int64)[:, None] * stride_out_row + cols[None, :], result, mask=inside)
