# ruff: noqa: N803 (Triton writes compile-time constants in capitals)
# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The predictor on the GPU: four Triton kernels, fp32 throughout, no host synchronisation.

    q, k ─▶ block means, self-similarity ─▶ pooled scores ─▶ top-CDF selection ─▶ BlockLists

The pooled scores are written into the memory of ``BlockLists.indices`` and replaced there by the indices, row by row:
at 128K tokens they would otherwise cost another half gigabyte for 32 heads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.predict import BlockLists
from afbs_compile.kernels.reference import block_count

SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)

SCORE_TILE = 64
"""Query and key blocks per program of the score kernel."""

STATISTICS_ELEMENTS = 2048
"""Elements that a program of the statistics kernel holds in registers at a time: 64 for each thread of its one warp."""


@functools.cache
def device_constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copy per-head constants to the device, once for each distinct tuple.

    The tensors are never evicted: a captured CUDA graph may hold their address. The first call for a tuple
    synchronises with the device, so it must not fall into a CUDA graph capture (run the function once before).

    Returns:
        fp32 ``[len(values)]``.
    """
    # On a thread of its own, because during the warm-up of its CUDA graphs inductor sends every allocation of the
    # calling thread to the graph's pool, and takes a tensor that outlives the call for an error.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.tensor, values, dtype=torch.float32, device=device).result()


@triton.jit
def _statistics_kernel(
    x,
    mean,
    similarity,
    length,
    heads,
    count,
    stride_batch,
    stride_head,
    stride_row,
    stride_dim,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One block of rows: its mean ``[DIM_PAD]`` (zeros past HEAD_DIM) and its self-similarity."""
    program = tl.program_id(0)
    block = program % count
    batch = (program // count) // heads
    head = (program // count) % heads
    first = block * BLOCK
    size = tl.minimum(BLOCK, length - first)
    cols = tl.arange(0, DIM_PAD)
    base = x + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head + first.to(tl.int64) * stride_row
    total = tl.zeros([DIM_PAD], tl.float32)
    units = tl.zeros([DIM_PAD], tl.float32)
    for start in range(0, BLOCK, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < size)[:, None] & (cols < HEAD_DIM)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_dim
        tile = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tile, 0)
        # unit = (x / max|x|) / ||x / max|x|||: dividing by the largest entry first keeps the squares finite.
        peak = tl.max(tl.abs(tile), 1)
        scaled = tile * tl.math.div_rn(1.0, tl.maximum(peak, SMALLEST_NORMAL))[:, None]
        norm = tl.sqrt(tl.sum(scaled * scaled, 1))
        units += tl.sum(scaled * tl.math.div_rn(1.0, tl.maximum(norm, SMALLEST_NORMAL))[:, None], 0)
    tl.store(mean + program.to(tl.int64) * DIM_PAD + cols, total / size)
    # Mean pairwise cosine: 1/n^2 sum_ab cos(x_a, x_b) = ||mean of unit rows||^2.
    direction = units / size
    tl.store(similarity + program, tl.sum(direction * direction, 0))


@triton.jit
def _score_kernel(
    mean_q,
    mean_k,
    scores,
    scale,
    heads,
    groups,
    count_q,
    count_k,
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
    base_q = mean_q + (head.to(tl.int64) * count_q + rows_q)[:, None] * DIM_PAD
    base_k = mean_k + (head_k.to(tl.int64) * count_k + rows_k)[:, None] * DIM_PAD
    product = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, DIM_PAD, DEPTH):
        part_q = tl.load(base_q + start + depth[None, :], mask=(rows_q < count_q)[:, None], other=0.0)
        part_k = tl.load(base_k + start + depth[None, :], mask=(rows_k < count_k)[:, None], other=0.0)
        product = tl.dot(part_q, tl.trans(part_k), product, input_precision="ieee")
    offsets = (head.to(tl.int64) * count_q + rows_q)[:, None] * count_k + rows_k[None, :]
    inside = (rows_q < count_q)[:, None] & (rows_k < count_k)[None, :]
    tl.store(scores + offsets, (product * scale).to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _select_kernel(
    lists,
    counts,
    similarity_q,
    similarity_k,
    tau,
    theta,
    heads,
    groups,
    count_q,
    count_k,
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
    tau_head = tl.load(tau + head % heads)
    theta_head = tl.load(theta + head % heads)

    cols = tl.arange(0, COUNT_PAD)
    exists = cols < count_k
    visible = exists
    if CAUSAL:
        visible = exists & (cols * BLOCK_K <= block * BLOCK_Q + (BLOCK_Q - 1))
    row = lists + program.to(tl.int64) * count_k
    scores = tl.load(row + cols, mask=visible, other=0).to(tl.float32, bitcast=True)
    similarity = tl.load(similarity_k + head_k.to(tl.int64) * count_k + cols, mask=visible, other=0.0)
    coherent = similarity >= theta_head
    coherent_row = tl.load(similarity_q + program) >= theta_head

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
    keep_all = (tau_head >= 1.0) | (coherent_row == 0) | (total != total)
    threshold = tl.where(keep_all, -0x80000000, threshold)

    first_q = block * BLOCK_Q
    diagonal = (cols * BLOCK_K < first_q + BLOCK_Q) & (first_q < cols * BLOCK_K + BLOCK_K)
    live = visible & ((bits >= threshold) | (coherent == 0) | diagonal)

    # Every store below depends on a sum over the whole row, so no score is overwritten before it is read.
    flags = live.to(tl.int32)
    count = tl.sum(flags, 0)
    tl.store(row + tl.cumsum(flags, 0) - flags, cols, mask=live)
    tl.store(row + cols, tl.zeros_like(cols), mask=exists & (cols >= count))
    tl.store(counts + program, count)


def _block_statistics(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """:func:`reference.block_statistics` with the mean padded by zeros to a power of two columns."""
    batch, heads, length, dim = x.shape
    count, padded = block_count(length, block), max(16, triton.next_power_of_2(dim))
    mean = x.new_empty(batch, heads, count, padded, dtype=torch.float32)
    similarity = x.new_empty(batch, heads, count, dtype=torch.float32)
    _statistics_kernel[(batch * heads * count,)](
        x,
        mean,
        similarity,
        length,
        heads,
        count,
        *x.stride(),
        HEAD_DIM=dim,
        DIM_PAD=padded,
        BLOCK=block,
        ROWS=min(block, STATISTICS_ELEMENTS // padded),
        num_warps=1,  # no barriers: 3.5 times as fast as four warps on an H200
    )
    return mean, similarity


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
) -> BlockLists:
    """:func:`afbs_compile.kernels.predict.predict_blocks` on Triton, whatever the device.

    Deterministic. It may be captured in a CUDA graph once it has run with the same ``tau`` and ``theta``.
    """
    batch, heads, length, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    count_q, count_k = block_count(length, block_q), block_count(length, block_k)
    counts = q.new_empty(batch, heads, count_q, dtype=torch.int32)
    indices = q.new_empty(batch, heads, count_q, count_k, dtype=torch.int32)
    if counts.numel() == 0:
        return BlockLists(counts, indices)

    # Triton launches on the current device.
    with torch.cuda.device_of(q):
        thresholds = device_constants((*tau, *theta), q.device)
        mean_q, similarity_q = _block_statistics(q, block_q)
        mean_k, similarity_k = _block_statistics(k, block_k)
        sizes = (heads, heads // k.shape[1], count_q, count_k)
        shape = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "CAUSAL": causal}
        tiles = block_count(count_q, SCORE_TILE) * block_count(count_k, SCORE_TILE)
        padded = mean_q.shape[-1]
        _score_kernel[(batch * heads * tiles,)](
            mean_q,
            mean_k,
            indices,
            scale,
            *sizes,
            DIM_PAD=padded,
            TILE=SCORE_TILE,
            DEPTH=min(padded, 32),
            num_warps=4,
            **shape,
        )
        count_pad = max(16, triton.next_power_of_2(count_k))
        _select_kernel[(batch * heads * count_q,)](
            indices,
            counts,
            similarity_q,
            similarity_k,
            thresholds,
            thresholds[heads:],
            *sizes,
            COUNT_PAD=count_pad,
            # 16 probabilities a thread keep the row in registers; one warp needs no barrier for its sums.
            num_warps=min(max(count_pad // 512, 1), 16),
            **shape,
        )
    return BlockLists(counts, indices)
