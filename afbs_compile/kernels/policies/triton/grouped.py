# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The coarse attention of :mod:`afbs_compile.kernels.policies.grouped` on the GPU: two kernels, fp32 accumulation.

A program takes a tile of query groups of one head twice over the key groups: once for the maximum and the sum of each
row's softmax, once for its mass per block. Nothing of the size of the coarse attention is stored. Products of half
precision numbers are exact; those of fp32 ones take three TF32 products each, which is fp32 but for the last bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.attend.machine import fp32_products
from afbs_compile.kernels.blocks import BlockShape, block_count
from afbs_compile.kernels.launcher import Launcher, layout, padded
from afbs_compile.kernels.masks.band import told
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.features import GROUP, Features

ROWS, COLS = 64, 64
"""Query groups and key groups of a tile; every block's groups divide them or are a multiple."""


@triton.jit
def _logits(
    base_q, base_k, rows, cols, rows_q, rows_k, scale, stride_q_row, stride_q_dim, stride_k_row, stride_k_dim,
    HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, REVERSE: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``scale * sum_t <q[a * parts + t'], k[b * parts + t]>`` for a tile of groups, zeros past the last rows."""
    product = tl.zeros([ROWS, COLS], tl.float32)
    depth = tl.arange(0, DEPTH)
    for step in range(0, PARTS * CHUNKS):
        part = step // CHUNKS
        dims = step % CHUNKS * DEPTH + depth
        place_q = rows * PARTS + (PARTS - 1 - part if REVERSE else part)
        place_k = cols * PARTS + part
        inside = dims < HEAD_DIM
        tile_q = tl.load(
            base_q + place_q.to(tl.int64)[:, None] * stride_q_row + dims.to(tl.int64)[None, :] * stride_q_dim,
            mask=(place_q < rows_q)[:, None] & inside[None, :],
            other=0.0,
        )
        tile_k = tl.load(
            base_k + place_k.to(tl.int64)[:, None] * stride_k_row + dims.to(tl.int64)[None, :] * stride_k_dim,
            mask=(place_k < rows_k)[:, None] & inside[None, :],
            other=0.0,
        )
        product = tl.dot(tile_q, tl.trans(tile_k), product, input_precision=PRECISION)
    return product * scale


@triton.jit(do_not_specialize=["heads", "repeats", "rows_q", "rows_k", "groups_q", "groups_k", "upper", "count_q"])
def _log_mass_kernel(
    query, key, out, scale, heads, repeats, rows_q, rows_k, groups_q, groups_k, upper, count_q, count_k, stride_q_batch,
    stride_q_head, stride_q_row, stride_q_dim, stride_k_batch, stride_k_head, stride_k_row, stride_k_dim,
    HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, REVERSE: tl.constexpr, SPAN: tl.constexpr, LAST: tl.constexpr,
    GROUP: tl.constexpr, PER_Q: tl.constexpr, PER_K: tl.constexpr, BOUNDED: tl.constexpr, DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The logarithm of the mass of every key block for ``ROWS`` query groups, as the bits of fp32 in int32."""
    tiles = tl.cdiv(groups_q, ROWS)
    program = tl.program_id(0)
    first = program % tiles * ROWS
    plane = program // tiles
    batch, head = plane // heads, plane % heads
    base_q = query + batch.to(tl.int64) * stride_q_batch + head.to(tl.int64) * stride_q_head
    base_k = key + batch.to(tl.int64) * stride_k_batch + (head // repeats).to(tl.int64) * stride_k_head
    rows = first + tl.arange(0, ROWS)
    seen = rows * GROUP + LAST + upper
    end = groups_k
    if BOUNDED:
        end = tl.minimum(groups_k, ((first + ROWS - 1) * GROUP + LAST + upper) // SPAN + 1)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        logits = _logits(
            base_q, base_k, rows, cols, rows_q, rows_k, scale, stride_q_row, stride_q_dim, stride_k_row, stride_k_dim,
            HEAD_DIM, PARTS, REVERSE, DEPTH, CHUNKS, PRECISION, ROWS, COLS,
        )  # fmt: skip
        visible = (cols < groups_k)[None, :]
        if BOUNDED:
            visible = visible & (cols[None, :] * SPAN <= seen[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        # m' = max(m, max_b s_b),   l <- l * exp(m - m') + sum_b exp(s_b - m'). The first tile has a visible group.
        new = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp(peak - new) + tl.sum(tl.exp(logits - new[:, None]), 1)
        peak = new

    # Groups past the last one count for nothing; a query block at the end may have fewer groups than PER_Q.
    exists = rows < groups_q
    size = tl.minimum(PER_Q, groups_q - first - tl.arange(0, ROWS // PER_Q) * PER_Q)
    blocks_q = first // PER_Q + tl.arange(0, ROWS // PER_Q)
    base = out + plane.to(tl.int64) * count_q * count_k
    for start in range(0, count_k * PER_K, COLS):
        blocks_k = start // PER_K + tl.arange(0, COLS // PER_K)
        mass = tl.zeros([ROWS // PER_Q, COLS // PER_K], tl.float32)
        if start < end:
            cols = start + tl.arange(0, COLS)
            logits = _logits(
                base_q, base_k, rows, cols, rows_q, rows_k, scale, stride_q_row, stride_q_dim, stride_k_row,
                stride_k_dim, HEAD_DIM, PARTS, REVERSE, DEPTH, CHUNKS, PRECISION, ROWS, COLS,
            )  # fmt: skip
            visible = exists[:, None] & (cols < groups_k)[None, :]
            if BOUNDED:
                visible = visible & (cols[None, :] * SPAN <= seen[:, None])
            weights = tl.where(visible, tl.exp(logits - peak[:, None]) / total[:, None], 0.0)
            weights = tl.sum(tl.reshape(weights, [ROWS // PER_Q, PER_Q, COLS]), 1)
            mass = tl.sum(tl.reshape(weights, [ROWS // PER_Q, COLS // PER_K, PER_K]), 2) / size[:, None]
        offsets = blocks_q.to(tl.int64)[:, None] * count_k + blocks_k[None, :]
        inside = (blocks_q < count_q)[:, None] & (blocks_k < count_k)[None, :]
        tl.store(base + offsets, tl.log(mass).to(tl.int32, bitcast=True), mask=inside)


@triton.jit(do_not_specialize=["length", "heads", "groups"])
def _moment_kernel(
    x, out, scale, length, heads, groups, stride_batch, stride_head, stride_row, stride_dim,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, GROUP: tl.constexpr, OF_QUERIES: tl.constexpr,
):  # fmt: skip
    """Two rows of one group: the mean times ``scale``, and half its square (queries) or the variance (keys)."""
    program = tl.program_id(0)
    group = program % groups
    plane = program // groups
    first = group * GROUP
    size = tl.minimum(GROUP, length - first)
    rows = tl.arange(0, GROUP)
    dims = tl.arange(0, DIM_PAD)
    inside = (rows < size)[:, None] & (dims < HEAD_DIM)[None, :]
    base = x + (plane // heads).to(tl.int64) * stride_batch + (plane % heads).to(tl.int64) * stride_head
    offsets = (first + rows).to(tl.int64)[:, None] * stride_row + dims.to(tl.int64)[None, :] * stride_dim
    tile = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tile, 0) / size
    if OF_QUERIES:
        mean = mean * scale
        second = mean * mean / 2
    else:
        apart = tl.where(inside, tile - mean[None, :], 0.0)
        second = tl.sum(apart * apart, 0) / size
    place = out + program.to(tl.int64) * 2 * HEAD_DIM + dims
    tl.store(place, mean, mask=dims < HEAD_DIM)
    tl.store(place + HEAD_DIM, second, mask=dims < HEAD_DIM)


_log_mass, _moments = Launcher(_log_mass_kernel), Launcher(_moment_kernel)


def moment_rows(x: Tensor, scale: float, *, of_queries: bool) -> Tensor:
    """The features of ``cumulant``.

    Args:
        x: ``[B, H, N, D]``, any strides.
        scale: factor of the means.
        of_queries: whether the second row of a group is half the square of the first, else the variance.

    Returns:
        ``[B, H, 2 * ceil(N / GROUP), D]``: fp32, or bfloat16 where x is in half precision.
    """
    batch, heads, length, dim = x.shape
    groups = block_count(length, GROUP)
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    out = x.new_empty(batch, heads, 2 * groups, dim, dtype=dtype)
    with torch.cuda.device_of(x):
        _moments(
            (layout(x), scale, of_queries),
            batch * heads * groups,
            *(x, out, scale, length, heads, groups),
            *x.stride(),
            *(dim, padded(dim), GROUP, of_queries),
            warps=1,
        )
    return out


def write_log_mass(features: Features, operands: Operands, shape: BlockShape, out: Tensor) -> None:
    """Write the logarithm of :func:`grouped.block_mass` into ``out``, int32 ``[B, H, n_q, n_k]``, as bits of fp32.

    Args:
        features, operands, shape: as there; the mask is a band.
    """
    q, k, band = features.q, features.k, told(operands)
    batch, heads, rows_q, dim = q.shape
    groups_q, groups_k = block_count(operands.q_len, GROUP), block_count(operands.k_len, features.span)
    dim_pad = padded(dim)
    depth = min(dim_pad, 64)
    per_k = shape.k // features.span
    precision = "ieee" if q.dtype != torch.float32 else fp32_products(q.device)
    with torch.cuda.device_of(q):
        _log_mass(
            (layout(q), layout(k), operands.q_len, operands.k_len, band, shape, features[2:]),
            batch * heads * block_count(groups_q, ROWS),
            *(q, k, out, features.scale),
            *(heads, heads // k.shape[1], rows_q, k.shape[2], groups_q, groups_k, band.upper, *out.shape[2:]),
            *(*q.stride(), *k.stride()),
            *(dim, features.parts, features.reverse, features.span, features.last, GROUP),
            *(shape.q // GROUP, per_k, band.bounded, depth, dim_pad // depth),
            *(precision, ROWS, max(COLS, per_k)),
            warps=4,
            stages=3,
        )
