# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The coarse attention of :mod:`afbs_compile.kernels.policies.grouped` on the GPU: two kernels, every product once.

The first writes the logarithm of the sum of ``exp(logit)`` over each key block for each query group. Its programs share
nothing, so no row's maximum has to be known and keys are divided among programs too. The second makes a softmax over
blocks of them. What lies between has a number for each query group and key block; groups are taken as many at a time
as fit in a fixed amount of memory. Products of half precision numbers are exact; those of fp32 ones take three TF32
products each, which is fp32 but for the last bits, and but for what leaves fp32: that is looked for beside.
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
from afbs_compile.kernels.operands import LARGEST_SCORE, Operands
from afbs_compile.kernels.policies.features import GROUP, Features

COLUMNS = 2048
"""Key groups that a program of the first kernel takes, a multiple of its tiles; a quarter where rows are long."""

TILE_K = 64
"""Key groups of a tile; those of a block of keys, where they are more."""

DEPTH_BYTES = 256
"""Of a row, that a tile holds at once; longer rows are multiplied in halves of it, and loaded again for each tile."""

BLOCKS, ROWS_NORMALISED = 64, 32
"""Key blocks and query groups of a tile of the second kernel; no query block has more groups."""

SUMS_AT_ONCE = 1 << 26
"""Numbers between the two kernels, fp32: 256 MiB."""


class Tiling(NamedTuple):
    """How the first kernel is tiled.

    Attributes:
        rows, cols: query groups and key groups of a tile.
        depth: columns of a feature row that it holds at once; chunks: how often, for a whole row.
        stages: of the software pipeline; columns: key groups that a program takes.
    """

    rows: int
    cols: int
    depth: int
    chunks: int
    stages: int
    columns: int

    @classmethod
    def of(cls, dim: int, size: int, per_k: int, *, large: bool) -> Tiling:
        """The tiling that fits.

        Args:
            dim: numbers of a feature row, of ``size`` bytes; per_k: key groups of a block.
            large: whether a program may have 96 KiB of shared memory, else 48.
        """
        whole, cols = padded(dim), max(TILE_K, per_k)
        if large and DEPTH_BYTES < whole * size <= 2 * DEPTH_BYTES:  # two programs share a multiprocessor
            return cls(64, cols, whole, 1, 1, COLUMNS // 4)
        depth = whole if whole * size <= DEPTH_BYTES else DEPTH_BYTES // 2 // size
        # Three TF32 products for each one take the registers that more rows would need.
        rows = 128 if large and size == 2 else 64
        loaded = (cols if depth == whole else cols + rows) * depth * size
        stages = min(4, max(1, (64 if large else 32) * 1024 // loaded))
        return cls(rows, cols, depth, whole // depth, stages, COLUMNS)


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
    tile_q, base_q, base_k, sums, groups, exists, seen, begin, end, log2_scale, rows_q, rows_k, groups_k, count_k,
    stride_q_row, stride_q_dim, stride_k_row, stride_k_dim,
    HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, REVERSE: tl.constexpr, SPAN: tl.constexpr, PER_K: tl.constexpr,
    MASKED: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """``log2(sum(exp(logit)))`` over each key block from key group ``begin`` to ``end``; -inf where none is seen.

    A logit is ``scale * sum_t <q[a * parts + t'], k[b * parts + t]>``.
    """
    for start in range(begin, end, COLS):
        cols = start + tl.arange(0, COLS)
        product = tl.zeros([ROWS, COLS], tl.float32)
        if PARTS * CHUNKS == 1:
            tile_k = _tile(base_k, cols, cols < groups_k, stride_k_row, stride_k_dim, 0, HEAD_DIM, DEPTH)
            product = tl.dot(tile_q, tl.trans(tile_k), product, input_precision=PRECISION)
        else:
            for step in range(PARTS * CHUNKS):
                part = step // CHUNKS
                first = step % CHUNKS * DEPTH
                place_q = groups * PARTS + (PARTS - 1 - part if REVERSE else part)
                place_k = cols * PARTS + part
                part_q = _tile(base_q, place_q, place_q < rows_q, stride_q_row, stride_q_dim, first, HEAD_DIM, DEPTH)
                part_k = _tile(base_k, place_k, place_k < rows_k, stride_k_row, stride_k_dim, first, HEAD_DIM, DEPTH)
                product = tl.dot(part_q, tl.trans(part_k), product, input_precision=PRECISION)
        logits = product * log2_scale
        if MASKED:
            logits = tl.where(
                (cols[None, :] * SPAN <= seen[:, None]) & (cols < groups_k)[None, :], logits, float("-inf")
            )
        logits = tl.reshape(logits, [ROWS, COLS // PER_K, PER_K])
        peak = tl.max(logits, 2)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp2(logits - peak[:, :, None]), 2)
        blocks = start // PER_K + tl.arange(0, COLS // PER_K)
        places = sums + blocks.to(tl.int64)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
        tl.store(places, peak + tl.log2(total), mask=(blocks < count_k)[None, :] & exists[:, None])


@triton.jit(
    do_not_specialize=[
        "first_unit", "units", "heads", "repeats", "rows_q", "rows_k", "groups_q", "groups_k", "upper", "count_k"
    ]
)  # fmt: skip
def _sum_kernel(
    query, key, sums, log2_scale, first_unit, units, heads, repeats, rows_q, rows_k, groups_q, groups_k, upper, count_k,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_dim, stride_k_batch, stride_k_head, stride_k_row,
    stride_k_dim,
    HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, REVERSE: tl.constexpr, SPAN: tl.constexpr, LAST: tl.constexpr,
    GROUP: tl.constexpr, PER_K: tl.constexpr, BOUNDED: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One unit, ``ROWS`` query groups of a head, over ``COLUMNS`` key groups; units that share keys run together."""
    program = tl.program_id(0)
    unit = program % units
    tiles = tl.cdiv(groups_q, ROWS)
    first = (first_unit + unit) % tiles * ROWS
    plane = (first_unit + unit) // tiles
    groups = first + tl.arange(0, ROWS)
    seen = groups * GROUP + LAST + upper
    begin = program // units * COLUMNS
    end = tl.minimum(begin + COLUMNS, groups_k)
    clear = end // COLS * COLS
    if BOUNDED:
        end = tl.minimum(end, ((first + ROWS - 1) * GROUP + LAST + upper) // SPAN + 1)
        clear = tl.minimum(clear, ((first * GROUP + LAST + upper) // SPAN + 1) // COLS * COLS)
    else:
        seen = tl.full([ROWS], groups_k * SPAN, tl.int32)
    if begin >= end:
        return
    base_q = query + (plane // heads).to(tl.int64) * stride_q_batch + (plane % heads).to(tl.int64) * stride_q_head
    base_k = (
        key + (plane // heads).to(tl.int64) * stride_k_batch + (plane % heads // repeats).to(tl.int64) * stride_k_head
    )
    mine = sums + unit.to(tl.int64) * count_k * ROWS
    exists = groups < groups_q
    # Where rows are multiplied in parts, this one is not used, and not loaded.
    tile_q = _tile(base_q, groups, exists, stride_q_row, stride_q_dim, 0, HEAD_DIM, DEPTH)
    clear = tl.maximum(clear, begin)
    _sums_of_tiles(
        tile_q, base_q, base_k, mine, groups, exists, seen, begin, clear, log2_scale, rows_q, rows_k, groups_k, count_k,
        stride_q_row, stride_q_dim, stride_k_row, stride_k_dim, HEAD_DIM, PARTS, REVERSE, SPAN, PER_K, False, DEPTH,
        CHUNKS, PRECISION, ROWS, COLS,
    )  # fmt: skip
    _sums_of_tiles(
        tile_q, base_q, base_k, mine, groups, exists, seen, clear, end, log2_scale, rows_q, rows_k, groups_k, count_k,
        stride_q_row, stride_q_dim, stride_k_row, stride_k_dim, HEAD_DIM, PARTS, REVERSE, SPAN, PER_K, True, DEPTH,
        CHUNKS, PRECISION, ROWS, COLS,
    )  # fmt: skip


@triton.jit
def _parts(
    base, blocks, exists, seen, count_k, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """What the first kernel wrote of some key blocks and query groups; -inf where a group sees none of a block."""
    visible = (blocks < count_k)[:, None] & exists[None, :]
    if BOUNDED:
        visible = visible & (blocks[:, None] * BLOCK_K <= seen[None, :])
    return tl.load(base + blocks.to(tl.int64)[:, None] * UNIT, mask=visible, other=float("-inf"))


@triton.jit(do_not_specialize=["first_unit", "groups_q", "upper", "count_q", "count_k"])
def _mass_kernel(
    sums, out, first_unit, groups_q, upper, count_q, count_k,
    LAST: tl.constexpr, GROUP: tl.constexpr, PER_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr,
    AVERAGED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The logarithm of the mass of every key block for ``ROWS`` query groups of a unit, as the bits of fp32 in int32.

    ``AVERAGED``: of the mean of it and of the mass whose logarithm is there.
    """
    program = tl.program_id(0)
    unit = program // (UNIT // ROWS)
    place = program % (UNIT // ROWS) * ROWS
    tiles = tl.cdiv(groups_q, UNIT)
    first = (first_unit + unit) % tiles * UNIT + place
    plane = (first_unit + unit) // tiles
    groups = first + tl.arange(0, ROWS)
    seen = groups * GROUP + LAST + upper
    base = sums + unit.to(tl.int64) * count_k * UNIT + place + tl.arange(0, ROWS)[None, :]
    exists = groups < groups_q
    end = count_k
    if BOUNDED:
        end = tl.minimum(end, ((first + ROWS - 1) * GROUP + LAST + upper) // BLOCK_K + 1)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, end, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        parts = _parts(base, blocks, exists, seen, count_k, BLOCK_K, BOUNDED, UNIT)
        new = tl.maximum(peak, tl.max(parts, 0))
        least = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(peak - least) + tl.sum(tl.exp2(parts - least[None, :]), 0)
        peak = new
    # A group that sees nothing gives mass to nothing.
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.where(total == 0.0, 1.0, total)

    size = tl.minimum(PER_Q, groups_q - first - tl.arange(0, ROWS // PER_Q) * PER_Q)
    blocks_q = first // PER_Q + tl.arange(0, ROWS // PER_Q)
    rows_out = out + plane.to(tl.int64) * count_q * count_k + blocks_q.to(tl.int64)[None, :] * count_k
    for start in range(0, end if AVERAGED else count_k, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        parts = _parts(base, blocks, exists, seen, count_k, BLOCK_K, BOUNDED, UNIT)
        weights = tl.where(exists[None, :], tl.exp2(parts - peak[None, :]) / total[None, :], 0.0)
        mass = tl.sum(tl.reshape(weights, [BLOCKS, ROWS // PER_Q, PER_Q]), 2) / size[None, :]
        inside = (blocks < count_k)[:, None] & (blocks_q < count_q)[None, :]
        if AVERAGED:
            there = tl.load(rows_out + blocks[:, None], mask=inside, other=0).to(tl.float32, bitcast=True)
            mass = (mass + tl.exp(there)) / 2
        tl.store(rows_out + blocks[:, None], tl.log(mass).to(tl.int32, bitcast=True), mask=inside)


_sums, _masses = Launcher(_sum_kernel), Launcher(_mass_kernel)


def write_log_mass(
    features: Features, operands: Operands, shape: BlockShape, out: torch.Tensor, *, averaged: bool = False
) -> None:
    """Write the logarithm of :func:`grouped.block_mass` into ``out``, int32 ``[B, H, n_q, n_k]``, as bits of fp32.

    Args:
        features, operands, shape: as there; the mask is a band that starts at the first key.
        out: contiguous.
        averaged: whether that of the mean with the mass whose logarithm ``out`` holds; blocks that no row of a query
            block sees are left as they are then.
    """
    q, k, band = features.q, features.k, told(operands)
    batch, heads, rows_q, dim = q.shape
    groups_q, groups_k = block_count(operands.q_len, GROUP), block_count(operands.k_len, features.span)
    (count_q, count_k), per_k = out.shape[2:], shape.k // features.span
    tiling = Tiling.of(dim, q.element_size(), per_k, large=capability(q.device) >= 8)
    precision = fp32_products(q.device) if q.dtype == torch.float32 else "ieee"
    units = batch * heads * block_count(groups_q, tiling.rows)
    most = max(1, SUMS_AT_ONCE // (count_k * tiling.rows))
    with torch.cuda.device_of(q):
        sums = torch.empty(min(units, most), count_k, tiling.rows, dtype=torch.float32, device=q.device)
        for part in chunks(units, most):
            count = part.stop - part.start
            kind = (
                layout(q),
                layout(k),
                operands.q_len,
                operands.k_len,
                band,
                shape,
                features[2:],
                averaged,
                part.start,
            )
            _sums(
                (*kind, count),
                count * block_count(groups_k, tiling.columns),
                *(q, k, sums, features.scale * math.log2(math.e), part.start, count, heads, heads // k.shape[1]),
                *(rows_q, k.shape[2], groups_q, groups_k, band.upper, count_k, *q.stride(), *k.stride()),
                *(dim, features.parts, features.reverse, features.span, features.last, GROUP, per_k, band.bounded),
                *(tiling.columns, tiling.depth, tiling.chunks, precision, tiling.rows, tiling.cols),
                warps=tiling.rows // 16,
                stages=tiling.stages,
            )
            _masses(
                (*kind, count),
                count * (tiling.rows // ROWS_NORMALISED),
                *(sums, out, part.start, groups_q, band.upper, count_q, count_k),
                *(features.last, GROUP, shape.q // GROUP, shape.k, band.bounded, averaged),
                *(tiling.rows, ROWS_NORMALISED, BLOCKS),
                warps=4,
            )
    if precision == "tf32x3":
        mark_overflow(features, shape, out)


def mark_overflow(features: Features, shape: BlockShape, out: torch.Tensor) -> None:
    """Write NaN where a logit may leave fp32: three TF32 products make 0 of it, and a row with NaN keeps every block.

    Arguments: see :func:`write_log_mass`. Neither waits for the device nor looks at later keys.
    """
    (count_q, count_k), heads = out.shape[2:], features.q.shape[1]

    def largest(x: torch.Tensor, rows: int, count: int) -> torch.Tensor:
        """``[B, H, count]``: of blocks of so many rows; NaN where there is any."""
        peaks = torch.nn.functional.pad(x.abs().amax(-1), (0, count * rows - x.shape[2]))
        found: torch.Tensor = peaks.unflatten(2, (count, rows)).amax(-1)
        return found

    of_q = largest(features.q, shape.q // GROUP * features.parts, count_q)
    of_k = largest(features.k, shape.k // features.span * features.parts, count_k)
    of_k = of_k.repeat_interleave(heads // of_k.shape[1], 1)
    products = features.q.shape[3] * features.parts * max(1.0, abs(features.scale))
    bound = of_q[..., None] * products * of_k[:, :, None]
    out.view(torch.float32).masked_fill_(~(bound < LARGEST_SCORE), math.nan)
