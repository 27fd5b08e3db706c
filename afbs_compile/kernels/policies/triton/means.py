# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Scores by block means on the GPU: two Triton kernels, fp32 throughout, no host synchronisation.

q, k ─▶ block means, self-similarity ─▶ pooled scores
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape, block_count
from afbs_compile.kernels.launcher import Launcher, layout, padded
from afbs_compile.kernels.masks.base import Band
from afbs_compile.kernels.operands import Operands

SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)

SCORE_TILE = 64
"""Query and key blocks per program of the score kernel; half as many where there are few."""

MANY_BLOCKS = 128
"""Query blocks from which the score kernel fills a large GPU with whole tiles."""

STATISTICS_ELEMENTS = 2048
"""Elements that a program of the statistics kernel holds in registers at a time: 64 for each thread of its one warp."""


@triton.jit
def _block_statistics(
    x, mean, similarity, program, block, batch, head, length, stride_batch, stride_head, stride_row, stride_dim,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_THETA: tl.constexpr,
):  # fmt: skip
    """One block of rows: its mean ``[DIM_PAD]`` (zeros past HEAD_DIM) and its self-similarity.

    Where no head asks for it the self-similarity is 1; either way it is NaN where an entry is not finite.
    """
    first = block * BLOCK
    size = tl.minimum(BLOCK, length - first)
    cols = tl.arange(0, DIM_PAD)
    base = x + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head + first.to(tl.int64) * stride_row
    total = tl.zeros([DIM_PAD], tl.float32)
    units = tl.zeros([DIM_PAD], tl.float32)
    flaws = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for start in range(0, BLOCK, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < size)[:, None] & (cols < HEAD_DIM)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_dim
        tile = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tile, 0)
        if HAS_THETA:
            # unit = (x / max|x|) / ||x / max|x|||: dividing by the largest entry first keeps the squares finite.
            peak = tl.max(tl.abs(tile), 1)
            scaled = tile * tl.math.div_rn(1.0, tl.maximum(peak, SMALLEST_NORMAL))[:, None]
            norm = tl.sqrt(tl.sum(scaled * scaled, 1))
            units += tl.sum(scaled * tl.math.div_rn(1.0, tl.maximum(norm, SMALLEST_NORMAL))[:, None], 0)
        else:
            flaws += tile * 0.0  # NaN where the entry is infinite or NaN
    tl.store(mean + program.to(tl.int64) * DIM_PAD + cols, total / size)
    if HAS_THETA:
        # Mean pairwise cosine: 1/n^2 sum_ab cos(x_a, x_b) = ||mean of unit rows||^2.
        direction = units / size
        tl.store(similarity + program, tl.sum(direction * direction, 0))
    else:
        tl.store(similarity + program, 1.0 + tl.sum(tl.sum(flaws, 1), 0))


# One compilation for most sizes: it takes half a second, and a calibration meets many. The row length of what is stored
# stays apart, for rows that begin at a multiple of 16 are stored in wide pieces.
@triton.jit(do_not_specialize=["q_len", "k_len", "heads", "heads_k", "count_q", "count_k", "programs_q"])
def _statistics_kernel(
    query, key, mean, similarity, q_len, k_len, heads, heads_k, count_q, count_k, programs_q, stride_query_batch,
    stride_query_head, stride_query_row, stride_query_dim, stride_key_batch, stride_key_head, stride_key_row,
    stride_key_dim,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS_Q: tl.constexpr,
    ROWS_K: tl.constexpr, HAS_THETA: tl.constexpr,
):  # fmt: skip
    """The statistics of all blocks: first those of q, then those of k."""
    program = tl.program_id(0)
    if program < programs_q:
        plane = program // count_q
        _block_statistics(
            query, mean, similarity, program, program % count_q, plane // heads, plane % heads, q_len,
            stride_query_batch, stride_query_head, stride_query_row, stride_query_dim,
            HEAD_DIM, DIM_PAD, BLOCK_Q, ROWS_Q, HAS_THETA,
        )  # fmt: skip
    else:
        place = program - programs_q
        plane = place // count_k
        _block_statistics(
            key, mean, similarity, program, place % count_k, plane // heads_k, plane % heads_k, k_len,
            stride_key_batch, stride_key_head, stride_key_row, stride_key_dim,
            HEAD_DIM, DIM_PAD, BLOCK_K, ROWS_K, HAS_THETA,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "groups", "upper", "count_q", "programs_q"])
def _score_kernel(
    mean, scores, scale, heads, groups, upper, count_q, count_k, programs_q,
    DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """A ``TILE x TILE`` part of one head's pooled scores, stored as the bits of fp32 in int32."""
    tiles_q = tl.cdiv(count_q, TILE)
    tiles_k = tl.cdiv(count_k, TILE)
    program = tl.program_id(0)
    first_k = (program % tiles_k) * TILE
    first_q = (program // tiles_k) % tiles_q * TILE
    head = program // (tiles_k * tiles_q)
    # The last query row of the tile does not see its first key: nothing to compute.
    if BOUNDED and (first_q + TILE) * BLOCK_Q - 1 + upper < first_k * BLOCK_K:
        return
    head_k = head // heads * (heads // groups) + head % heads // groups
    rows_q = first_q + tl.arange(0, TILE)
    rows_k = first_k + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    base_q = mean + (head.to(tl.int64) * count_q + rows_q)[:, None] * DIM_PAD
    base_k = mean + (programs_q + head_k.to(tl.int64) * count_k + rows_k)[:, None] * DIM_PAD
    product = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, DIM_PAD, DEPTH):
        part_q = tl.load(base_q + start + depth[None, :], mask=(rows_q < count_q)[:, None], other=0.0)
        part_k = tl.load(base_k + start + depth[None, :], mask=(rows_k < count_k)[:, None], other=0.0)
        product = tl.dot(part_q, tl.trans(part_k), product, input_precision="ieee")
    offsets = (head.to(tl.int64) * count_q + rows_q)[:, None] * count_k + rows_k[None, :]
    inside = (rows_q < count_q)[:, None] & (rows_k < count_k)[None, :]
    tl.store(scores + offsets, (product * scale).to(tl.int32, bitcast=True), mask=inside)


_statistics, _scores = Launcher(_statistics_kernel), Launcher(_score_kernel)


def pooled_scores(operands: Operands, shape: BlockShape, out: Tensor, *, with_similarity: bool) -> Tensor:
    """Write the scores of the block means, as the bits of fp32.

    Args:
        operands: of the call, at least one block; a mask that is no band hides nothing here, for what is not visible is
            unspecified.
        shape: rows per block.
        out: int32 ``[B, H, n_q, n_k]``, contiguous.
        with_similarity: whether self-similarities are wanted.

    Returns:
        fp32, the self-similarities of all blocks of q, then of those of k; 1 without ``with_similarity``. Either way
        NaN where a block has an entry that is not finite.
    """
    q, k = operands.q, operands.k
    (batch, heads, q_len, dim), (heads_k, k_len), (count_q, count_k) = q.shape, k.shape[1:3], out.shape[2:]
    band = operands.mask.band(q_len, k_len) or Band(bounded=False)
    programs_q, programs_k = batch * heads * count_q, batch * heads_k * count_k
    dim_pad = padded(dim)
    tile = SCORE_TILE if count_q >= MANY_BLOCKS else SCORE_TILE // 2
    rows = STATISTICS_ELEMENTS // dim_pad
    # The statistics of the blocks of q, then those of the blocks of k; the means of all, then the self-similarities.
    mean = q.new_empty((programs_q + programs_k) * (dim_pad + 1), dtype=torch.float32)
    similarity = mean[(programs_q + programs_k) * dim_pad :]
    kind = (layout(q), layout(k), shape, band, operands.scale, with_similarity)
    with torch.cuda.device_of(q):  # Triton launches on the current device.
        _statistics(
            kind,
            programs_q + programs_k,
            *(q, k, mean, similarity),
            *(q_len, k_len, heads, heads_k, count_q, count_k, programs_q),
            *(*q.stride(), *k.stride()),
            *(dim, dim_pad, *shape.rows, min(shape.q, rows), min(shape.k, rows), with_similarity),
            warps=1,  # no barriers: 3.5 times as fast as four warps on an H200
        )
        _scores(
            kind,
            batch * heads * block_count(count_q, tile) * block_count(count_k, tile),
            *(mean, out, operands.scale),
            *(heads, operands.groups, band.upper, count_q, count_k, programs_q),
            *(dim_pad, *shape.rows, band.bounded, tile, min(dim_pad, 32)),
            warps=4,
            stages=3,
        )
    return similarity
