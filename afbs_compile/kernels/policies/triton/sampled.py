# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The mass that the first row of each query group gives to key blocks, on the GPU: two kernels, every product once.

The first writes the logarithm of the sum of ``exp(logit)`` over each key block for each sampled row. Its programs share
nothing, so no row's maximum has to be known and keys are divided among programs too. The second makes a softmax over
blocks of them. What lies between has a number for each sampled row and key block; rows are taken as many at a time as
fit in a fixed amount of memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from afbs_compile.kernels.attend.machine import capability, fp32_products
from afbs_compile.kernels.blocks import BlockShape, block_count, chunks
from afbs_compile.kernels.launcher import Launcher, layout, padded
from afbs_compile.kernels.masks.band import told
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.features import GROUP

KEYS = 2048
"""Keys that a program of the first kernel takes, a multiple of its tiles."""

TILE_K = 64
"""Keys of a tile; a block of keys that is larger is one."""

DEPTH_BYTES = 256
"""Of a row, that a tile holds at once; longer rows are multiplied in halves of it, and loaded again for each tile."""

BLOCKS, ROWS_NORMALISED = 64, 32
"""Key blocks and sampled rows of a tile of the second kernel; no query block has more sampled rows."""

SUMS_AT_ONCE = 1 << 26
"""Numbers between the two kernels, fp32: 256 MiB."""


class Tiling(NamedTuple):
    """How the first kernel is tiled.

    Attributes:
        rows, keys: of a tile; depth: columns that it holds at once; chunks: how often, for all columns of a head.
        stages: of the software pipeline.
    """

    rows: int
    keys: int
    depth: int
    chunks: int
    stages: int

    @classmethod
    def of(cls, dim: int, size: int, block_k: int, *, large: bool) -> Tiling:
        """The tiling that fits.

        Args:
            dim: numbers of a head, of ``size`` bytes; block_k: keys per block.
            large: whether a program may have 96 KiB of shared memory, else 48.
        """
        whole = padded(dim)
        depth = whole if whole * size <= DEPTH_BYTES else DEPTH_BYTES // 2 // size
        # Three TF32 products for each one take the registers that more rows would need.
        rows, keys = 128 if large and size == 2 else 64, max(TILE_K, block_k)
        loaded = (keys if depth == whole else keys + rows) * depth * size
        return cls(rows, keys, depth, whole // depth, min(4, max(1, (64 if large else 32) * 1024 // loaded)))


@triton.jit
def _tile(base, places, exists, stride_row, stride_dim, first, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr):
    """Some columns of some rows, zeros where there is none."""
    dims = first + tl.arange(0, DEPTH)
    return tl.load(
        base + places.to(tl.int64)[:, None] * stride_row + dims.to(tl.int64)[None, :] * stride_dim,
        mask=exists[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _sums_of_tiles(
    tile_q, base_q, base_k, sums, rows, rows_exist, seen, begin, end, log2_scale, k_len, count_k, stride_q_row,
    stride_q_dim, stride_k_row, stride_k_dim,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``log2(sum(exp(logit)))`` over each key block from key ``begin`` to ``end``; -inf where a row sees none of it."""
    for start in range(begin, end, COLS):
        cols = start + tl.arange(0, COLS)
        product = tl.zeros([ROWS, COLS], tl.float32)
        if CHUNKS == 1:
            tile_k = _tile(base_k, cols, cols < k_len, stride_k_row, stride_k_dim, 0, HEAD_DIM, DEPTH)
            product = tl.dot(tile_q, tl.trans(tile_k), product, input_precision=PRECISION)
        else:
            for chunk in range(CHUNKS):
                first = chunk * DEPTH
                part_q = _tile(base_q, rows, rows_exist, stride_q_row, stride_q_dim, first, HEAD_DIM, DEPTH)
                part_k = _tile(base_k, cols, cols < k_len, stride_k_row, stride_k_dim, first, HEAD_DIM, DEPTH)
                product = tl.dot(part_q, tl.trans(part_k), product, input_precision=PRECISION)
        logits = product * log2_scale
        if MASKED:
            logits = tl.where((cols[None, :] <= seen[:, None]) & (cols < k_len)[None, :], logits, float("-inf"))
        logits = tl.reshape(logits, [ROWS, COLS // BLOCK_K, BLOCK_K])
        peak = tl.max(logits, 2)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp2(logits - peak[:, :, None]), 2)
        blocks = start // BLOCK_K + tl.arange(0, COLS // BLOCK_K)
        places = sums + blocks.to(tl.int64)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
        tl.store(places, peak + tl.log2(total), mask=(blocks < count_k)[None, :] & rows_exist[:, None])


@triton.jit(do_not_specialize=["first_unit", "units", "heads", "repeats", "k_len", "groups_q", "upper", "count_k"])
def _sum_kernel(
    query, key, sums, log2_scale, first_unit, units, heads, repeats, k_len, groups_q, upper, count_k,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_dim, stride_k_batch, stride_k_head, stride_k_row,
    stride_k_dim,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr,
    KEYS: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """One unit, ``ROWS`` sampled rows of a head, over ``KEYS`` keys; units that share keys run at the same time."""
    program = tl.program_id(0)
    unit = program % units
    tiles = tl.cdiv(groups_q, ROWS)
    first = (first_unit + unit) % tiles * ROWS
    plane = (first_unit + unit) // tiles
    groups = first + tl.arange(0, ROWS)
    rows = groups * GROUP
    seen = rows + upper
    begin = program // units * KEYS
    end = tl.minimum(begin + KEYS, k_len)
    clear = end // COLS * COLS
    if BOUNDED:
        end = tl.minimum(end, (first + ROWS - 1) * GROUP + upper + 1)
        clear = tl.minimum(clear, (first * GROUP + upper + 1) // COLS * COLS)
    else:
        seen = tl.full([ROWS], k_len, tl.int32)
    if begin >= end:
        return
    base_q = query + (plane // heads).to(tl.int64) * stride_q_batch + (plane % heads).to(tl.int64) * stride_q_head
    base_k = (
        key + (plane // heads).to(tl.int64) * stride_k_batch + (plane % heads // repeats).to(tl.int64) * stride_k_head
    )
    mine = sums + unit.to(tl.int64) * count_k * ROWS
    exists = groups < groups_q
    # Where a row is multiplied in parts, this one is not used, and not loaded.
    tile_q = _tile(base_q, rows, exists, stride_q_row, stride_q_dim, 0, HEAD_DIM, DEPTH)
    clear = tl.maximum(clear, begin)
    _sums_of_tiles(
        tile_q, base_q, base_k, mine, rows, exists, seen, begin, clear, log2_scale, k_len, count_k, stride_q_row,
        stride_q_dim, stride_k_row, stride_k_dim, HEAD_DIM, BLOCK_K, False, DEPTH, CHUNKS, PRECISION, ROWS, COLS,
    )  # fmt: skip
    _sums_of_tiles(
        tile_q, base_q, base_k, mine, rows, exists, seen, clear, end, log2_scale, k_len, count_k, stride_q_row,
        stride_q_dim, stride_k_row, stride_k_dim, HEAD_DIM, BLOCK_K, True, DEPTH, CHUNKS, PRECISION, ROWS, COLS,
    )  # fmt: skip


@triton.jit
def _parts(
    base, blocks, exists, seen, count_k, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """What the first kernel wrote of some key blocks and rows; -inf where a row sees none of a block."""
    visible = (blocks < count_k)[:, None] & exists[None, :]
    if BOUNDED:
        visible = visible & (blocks[:, None] * BLOCK_K <= seen[None, :])
    return tl.load(base + blocks.to(tl.int64)[:, None] * UNIT, mask=visible, other=float("-inf"))


@triton.jit(do_not_specialize=["first_unit", "groups_q", "upper", "count_q", "count_k"])
def _mean_kernel(
    sums, out, first_unit, groups_q, upper, count_q, count_k,
    GROUP: tl.constexpr, PER_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The logarithm of the mean of the mass that ``out`` knows and of that of ``ROWS`` sampled rows of a unit."""
    program = tl.program_id(0)
    unit = program // (UNIT // ROWS)
    place = program % (UNIT // ROWS) * ROWS
    tiles = tl.cdiv(groups_q, UNIT)
    first = (first_unit + unit) % tiles * UNIT + place
    plane = (first_unit + unit) // tiles
    groups = first + tl.arange(0, ROWS)
    seen = groups * GROUP + upper
    base = sums + unit.to(tl.int64) * count_k * UNIT + place + tl.arange(0, ROWS)[None, :]
    exists = groups < groups_q
    end = count_k
    if BOUNDED:
        end = tl.minimum(end, ((first + ROWS - 1) * GROUP + upper) // BLOCK_K + 1)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, end, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        parts = _parts(base, blocks, exists, seen, count_k, BLOCK_K, BOUNDED, UNIT)
        new = tl.maximum(peak, tl.max(parts, 0))
        least = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(peak - least) + tl.sum(tl.exp2(parts - least[None, :]), 0)
        peak = new

    size = tl.minimum(PER_Q, groups_q - first - tl.arange(0, ROWS // PER_Q) * PER_Q)
    blocks_q = first // PER_Q + tl.arange(0, ROWS // PER_Q)
    rows_out = out + plane.to(tl.int64) * count_q * count_k + blocks_q.to(tl.int64)[None, :] * count_k
    for start in range(0, end, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        parts = _parts(base, blocks, exists, seen, count_k, BLOCK_K, BOUNDED, UNIT)
        weights = tl.where(exists[None, :], tl.exp2(parts - peak[None, :]) / total[None, :], 0.0)
        mass = tl.sum(tl.reshape(weights, [BLOCKS, ROWS // PER_Q, PER_Q]), 2) / size[None, :]
        inside = (blocks < count_k)[:, None] & (blocks_q < count_q)[None, :]
        of_groups = tl.load(rows_out + blocks[:, None], mask=inside, other=0).to(tl.float32, bitcast=True)
        mean = tl.log((mass + tl.exp(of_groups)) / 2)
        tl.store(rows_out + blocks[:, None], mean.to(tl.int32, bitcast=True), mask=inside)


_sums, _means = Launcher(_sum_kernel), Launcher(_mean_kernel)


def write_log_mean(operands: Operands, shape: BlockShape, out: torch.Tensor) -> None:
    """Replace the logarithms of masses in ``out`` by those of their means with the mass that sampled rows give.

    Blocks that no row of a query block sees are left as they are.

    Args:
        operands: whose mask is a band that starts at the first key; shape: tokens per block.
        out: int32 ``[B, H, n_q, n_k]``, contiguous, the bits of fp32.
    """
    q, k, band = operands.q, operands.k, told(operands)
    batch, heads, q_len, dim = q.shape
    groups_q, (count_q, count_k) = block_count(q_len, GROUP), out.shape[2:]
    tiling = Tiling.of(dim, q.element_size(), shape.k, large=capability(q.device) >= 8)
    rows = tiling.rows
    precision = fp32_products(q.device) if q.dtype == torch.float32 else "ieee"
    units = batch * heads * block_count(groups_q, rows)
    most = max(1, SUMS_AT_ONCE // (count_k * rows))
    with torch.cuda.device_of(q):
        sums = torch.empty(min(units, most), count_k, rows, dtype=torch.float32, device=q.device)
        for part in chunks(units, most):
            count = part.stop - part.start
            kind = (layout(q), layout(k), operands.scale, shape, band, part.start, part.stop)
            _sums(
                kind,
                count * block_count(operands.k_len, KEYS),
                *(q, k, sums, operands.scale * math.log2(math.e), part.start, count, heads, operands.groups),
                *(operands.k_len, groups_q, band.upper, count_k, *q.stride(), *k.stride()),
                *(dim, GROUP, shape.k, band.bounded, KEYS),
                *(tiling.depth, tiling.chunks, precision, rows, tiling.keys),
                warps=rows // 16,
                stages=tiling.stages,
            )
            _means(
                kind,
                count * (rows // ROWS_NORMALISED),
                *(sums, out, part.start, groups_q, band.upper, count_q, count_k),
                *(GROUP, shape.q // GROUP, shape.k, band.bounded, rows, ROWS_NORMALISED, BLOCKS),
                warps=4,
            )
