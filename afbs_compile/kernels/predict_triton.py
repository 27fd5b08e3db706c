# ruff: noqa: N803 (Triton writes compile-time constants in capitals)
# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The predictor on the GPU: three Triton kernels, fp32 throughout, no host synchronisation.

    q, k ─▶ block means, self-similarity ─▶ pooled scores ─▶ top-CDF selection ─▶ BlockLists

The pooled scores are written into the memory of ``BlockLists.indices`` and replaced there by the indices, row by row:
at 128K tokens they would otherwise cost another half gigabyte for 32 heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.launch import Launcher, device_constants, layout, padded
from afbs_compile.kernels.predict import BlockLists
from afbs_compile.kernels.reference import DIAGONAL_ONLY, Kept, block_count, kept_limits

SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)

SCORE_TILE = 64
"""Query and key blocks per program of the score kernel; half as many where there are few."""

MANY_BLOCKS = 128
"""Query blocks from which the score kernel fills a large GPU with whole tiles."""

FEWEST_COLUMNS = 128
"""Key blocks that a selection is compiled for at least: they cost a warp nothing, and short calls share one kernel."""

STATISTICS_ELEMENTS = 2048
"""Elements that a program of the statistics kernel holds in registers at a time: 64 for each thread of its one warp."""


@triton.jit
def _block_statistics(
    x,
    mean,
    similarity,
    program,
    block,
    batch,
    head,
    length,
    stride_batch,
    stride_head,
    stride_row,
    stride_dim,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_THETA: tl.constexpr,
):
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
@triton.jit(do_not_specialize=["length", "heads", "heads_k", "count_q", "count_k", "programs_q"])
def _statistics_kernel(
    query,
    key,
    mean,
    similarity,
    length,
    heads,
    heads_k,
    count_q,
    count_k,
    programs_q,
    stride_query_batch,
    stride_query_head,
    stride_query_row,
    stride_query_dim,
    stride_key_batch,
    stride_key_head,
    stride_key_row,
    stride_key_dim,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS_Q: tl.constexpr,
    ROWS_K: tl.constexpr,
    HAS_THETA: tl.constexpr,
):
    """The statistics of all blocks: first those of q, then those of k."""
    program = tl.program_id(0)
    if program < programs_q:
        plane = program // count_q
        _block_statistics(
            query, mean, similarity, program, program % count_q, plane // heads, plane % heads, length,
            stride_query_batch, stride_query_head, stride_query_row, stride_query_dim,
            HEAD_DIM, DIM_PAD, BLOCK_Q, ROWS_Q, HAS_THETA,
        )  # fmt: skip
    else:
        place = program - programs_q
        plane = place // count_k
        _block_statistics(
            key, mean, similarity, program, place % count_k, plane // heads_k, plane % heads_k, length,
            stride_key_batch, stride_key_head, stride_key_row, stride_key_dim,
            HEAD_DIM, DIM_PAD, BLOCK_K, ROWS_K, HAS_THETA,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "groups", "count_q", "programs_q"])
def _score_kernel(
    mean,
    scores,
    scale,
    heads,
    groups,
    count_q,
    count_k,
    programs_q,
    DIM_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A ``TILE x TILE`` part of one head's pooled scores, stored as the bits of fp32 in int32."""
    tiles_q = tl.cdiv(count_q, TILE)
    tiles_k = tl.cdiv(count_k, TILE)
    program = tl.program_id(0)
    first_k = (program % tiles_k) * TILE
    first_q = (program // tiles_k) % tiles_q * TILE
    head = program // (tiles_k * tiles_q)
    # The last query row of the tile comes before its first key: nothing to compute.
    if CAUSAL and (first_q + TILE) * BLOCK_Q - 1 < first_k * BLOCK_K:
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


@triton.jit(do_not_specialize=["heads", "groups", "count_q", "programs_q", "local_keys", "first_whole"])
def _select_kernel(
    lists,
    counts,
    similarity,
    thresholds,
    heads,
    groups,
    count_q,
    count_k,
    programs_q,
    local_keys,
    first_whole,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    COUNT_PAD: tl.constexpr,
):
    """One query block: read its scores from ``lists``, decide, and overwrite them with the live blocks."""
    program = tl.program_id(0)
    block = program % count_q
    head = program // count_q
    head_k = head // heads * (heads // groups) + head % heads // groups
    tau_head = tl.load(thresholds + head % heads)
    theta_head = tl.load(thresholds + heads + head % heads)

    cols = tl.arange(0, COUNT_PAD)
    exists = cols < count_k
    visible = exists
    if CAUSAL:
        visible = exists & (cols * BLOCK_K <= block * BLOCK_Q + (BLOCK_Q - 1))
    row = lists + program.to(tl.int64) * count_k
    scores = tl.load(row + cols, mask=visible, other=0).to(tl.float32, bitcast=True)
    of_keys = similarity + programs_q + head_k.to(tl.int64) * count_k
    coherent = tl.load(of_keys + cols, mask=visible, other=0.0) >= theta_head
    coherent_row = tl.load(similarity + program) >= theta_head

    # p = softmax over the visible coherent blocks. tl.max passes over NaN, but the sum does not.
    scores = tl.where(visible & coherent, scores, float("-inf"))
    peak = tl.max(scores, 0)
    weights = tl.exp(scores - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights, 0)
    probability = tl.math.div_rn(weights, tl.maximum(total, SMALLEST_NORMAL) + tl.zeros_like(weights))

    # Keep j when sum(p_i for p_i > p_j) < tau: the smallest t with sum(p_i for p_i > t) < tau is the least probability
    # kept. Probabilities are not negative, so they order as their bits do, and t is found bit by bit.
    bits = probability.to(tl.int32, bitcast=True)
    threshold = 0
    for shift in range(30):
        half = 0x20000000 >> shift
        above = tl.sum(tl.where(bits > threshold + half - 1, probability, 0.0), 0)
        threshold = tl.where(above < tau_head, threshold, threshold + half)
    keep_all = (tau_head >= 1.0) | (coherent_row == 0) | (total != total) | (block >= first_whole)
    threshold = tl.where(keep_all, -0x80000000, threshold)

    first_q = block * BLOCK_Q
    near = (cols * BLOCK_K < first_q + BLOCK_Q) & (first_q < cols * BLOCK_K + BLOCK_K + local_keys)
    live = visible & ((bits >= threshold) | (coherent == 0) | near)

    # Every store below depends on a sum over the whole row, so no score is overwritten before it is read.
    flags = live.to(tl.int32)
    count = tl.sum(flags, 0)
    tl.store(row + tl.cumsum(flags, 0) - flags, cols, mask=live)
    tl.store(row + cols, tl.zeros_like(cols), mask=exists & (cols >= count))
    tl.store(counts + program, count)


_statistics, _scores, _selection = Launcher(_statistics_kernel), Launcher(_score_kernel), Launcher(_select_kernel)


def pooled_scores(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    *,
    has_theta: bool,
    causal: bool,
    scale: float,
    block_q: int,
    block_k: int,
) -> Tensor:
    """Write the scores of the block means, as the bits of fp32.

    Args:
        q, k, causal, scale, block_q, block_k: as in :func:`predict_blocks`; at least one block.
        out: int32 ``[B, H, n_q, n_k]``, contiguous.
        has_theta: whether self-similarities are wanted.

    Returns:
        fp32, the self-similarities of all blocks of q, then of those of k; 1 without ``has_theta``. Either way NaN
        where a block has an entry that is not finite.
    """
    batch, heads, length, dim = q.shape
    heads_k, (count_q, count_k) = k.shape[1], out.shape[2:]
    programs_q, programs_k = batch * heads * count_q, batch * heads_k * count_k
    dim_pad = padded(dim)
    tile = SCORE_TILE if count_q >= MANY_BLOCKS else SCORE_TILE // 2
    rows = STATISTICS_ELEMENTS // dim_pad
    sizes = (heads, heads // heads_k, count_q, count_k, programs_q)
    # The statistics of the blocks of q, then those of the blocks of k; the means of all, then the self-similarities.
    mean = q.new_empty((programs_q + programs_k) * (dim_pad + 1), dtype=torch.float32)
    similarity = mean[(programs_q + programs_k) * dim_pad :]
    kind = (layout(q), layout(k), block_q, block_k, causal, scale, has_theta)
    with torch.cuda.device_of(q):  # Triton launches on the current device.
        _statistics(
            kind,
            programs_q + programs_k,
            *(q, k, mean, similarity),
            *(length, heads, heads_k, count_q, count_k, programs_q),
            *(*q.stride(), *k.stride()),
            *(dim, dim_pad, block_q, block_k, min(block_q, rows), min(block_k, rows), has_theta),
            warps=1,  # no barriers: 3.5 times as fast as four warps on an H200
        )
        _scores(
            kind,
            batch * heads * block_count(count_q, tile) * block_count(count_k, tile),
            *(mean, out, scale),
            *sizes,
            *(dim_pad, block_q, block_k, causal, tile, min(dim_pad, 32)),
            warps=4,
            stages=3,
        )
    return similarity


def selection_shape(count_k: int) -> tuple[int, int]:
    """Columns that a program which selects among ``count_k`` key blocks takes, and its warps.

    16 numbers a thread keep the row in registers; one warp needs no barrier for its sums.
    """
    columns = max(padded(count_k), FEWEST_COLUMNS)
    return columns, min(max(columns // 512, 1), 16)


def select_by_mass(
    lists: BlockLists,
    similarity: Tensor,
    heads_k: int,
    tau: Sequence[float],
    theta: Sequence[float],
    *,
    causal: bool,
    block_q: int,
    block_k: int,
    length: int,
    kept: Kept,
) -> None:
    """Replace the scores in ``lists.indices`` by the live blocks and fill ``lists.counts``.

    Args:
        lists: contiguous; their indices hold the bits of fp32 scores.
        similarity: what :func:`pooled_scores` returns, or ones.
        heads_k: key heads.
        tau, theta, causal, block_q, block_k: as in :func:`predict_blocks`.
        length: N.
        kept: which blocks every tau keeps, beside those on the diagonal.
    """
    local_keys, first_whole = kept_limits(length, block_q, kept)
    batch, heads, count_q, count_k = lists.indices.shape
    columns, warps = selection_shape(count_k)
    with torch.cuda.device_of(lists.indices):
        thresholds = device_constants((*tau, *theta), lists.indices.device)
        _selection(
            (layout(lists.indices), heads_k, block_q, block_k, causal, local_keys, first_whole),
            batch * heads * count_q,
            *(lists.indices, lists.counts, similarity, thresholds),
            *(heads, heads // heads_k, count_q, count_k, batch * heads * count_q, local_keys, first_whole),
            *(block_q, block_k, causal, columns),
            warps=warps,
        )


def empty_lists(q: Tensor, block_q: int, block_k: int) -> BlockLists:
    """Lists for every query block of ``q``, not yet filled."""
    batch, heads, length, _ = q.shape
    count_q, count_k = block_count(length, block_q), block_count(length, block_k)
    return BlockLists(
        q.new_empty(batch, heads, count_q, dtype=torch.int32),
        q.new_empty(batch, heads, count_q, count_k, dtype=torch.int32),
    )


def predict_blocks(
    q: Tensor,
    k: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    kept: Kept = DIAGONAL_ONLY,
) -> BlockLists:
    """:func:`afbs_compile.kernels.predict.predict_blocks` on Triton, whatever the device.

    Deterministic. It may be captured in a CUDA graph once it has run with the same ``tau`` and ``theta``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lists = empty_lists(q, block_q, block_k)
    if lists.counts.numel():
        blocks: dict[str, Any] = {"causal": causal, "block_q": block_q, "block_k": block_k}
        similarity = pooled_scores(q, k, lists.indices, has_theta=max(theta) >= 0.0, scale=scale, **blocks)
        select_by_mass(lists, similarity, k.shape[1], tau, theta, length=q.shape[2], kept=kept, **blocks)
    return lists
