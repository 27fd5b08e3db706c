# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Operands rounded to FP8 in one launch: the specification is :func:`afbs_compile.kernels.spec.fp8.quantise`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.blocks import block_count
from afbs_compile.kernels.launcher import Launcher, device_constants, layout
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec import fp8
from afbs_compile.kernels.spec.attention import LOG2_E
from afbs_compile.kernels.spec.fp8 import BLOCK, Quantised, no_constants

ROWS = tl.constexpr(BLOCK)
TILE = tl.constexpr(64)
"""Rows of a program: half a block, for more of them fit a multiprocessor and memory has more to fetch at a time."""

LARGEST_EXPONENT = tl.constexpr(fp8.LARGEST_EXPONENT)
ROW_EXPONENT = tl.constexpr(fp8.ROW_EXPONENT)
WARPS = 4


@triton.jit
def _exponent(peak):
    """Floor of the binary logarithm, within the limits of a scale."""
    exponent = ((peak.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    return tl.minimum(tl.maximum(exponent, -LARGEST_EXPONENT), LARGEST_EXPONENT)


@triton.jit
def _power(exponent):
    """2 to the power of an integer, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _magnitudes(x):
    """Absolute values, 0 for what is not finite."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0)


@triton.jit
def _rounded(x, factor):
    """E4M3 of ``x`` times a power of two; NaN for what is not finite, which ``x - x`` tells. The conversion clamps."""
    return (x * factor + (x - x)).to(tl.float8e4nv)


@triton.jit
def _tile(x, rows, length, stride_row, stride_dim, HEAD_DIM: tl.constexpr):
    """Rows of one head in fp32, zeros past the end."""
    columns = tl.arange(0, HEAD_DIM).to(tl.int64)
    offsets = rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_dim
    return tl.load(x + offsets, mask=(rows < length)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _row(x, row, length, stride_row, stride_dim, HEAD_DIM: tl.constexpr):
    """One row of one head in fp32, zeros past the end."""
    columns = tl.arange(0, HEAD_DIM).to(tl.int64)
    x += row.to(tl.int64) * stride_row
    return tl.load(x + columns * stride_dim, mask=row < length, other=0.0).to(tl.float32)


@triton.jit
def _query_tile(x, scales, out, plane, rows, factor, length, width, HEAD_DIM: tl.constexpr):
    """Store rows of q, each at its own scale."""
    x *= factor
    exponent = _exponent(tl.max(_magnitudes(x), 1)) - ROW_EXPONENT
    tl.store(scales + plane.to(tl.int64) * width + rows, _power(exponent))
    where = (plane.to(tl.int64) * length + rows)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(out + where, _rounded(x, _power(-exponent)[:, None]), mask=(rows < length)[:, None])


@triton.jit
def _key_tile(x, first_row, scale, out, constants, plane, rows, length, HEAD_DIM: tl.constexpr):
    """Store rows of k less the mean of their head, at the scale of their block."""
    columns = tl.arange(0, HEAD_DIM)
    mean = tl.load(constants + columns)
    exponent = _exponent(tl.maximum(tl.max(_magnitudes(first_row - mean), 0), tl.load(constants + HEAD_DIM)))
    tl.store(scale, _power(exponent))
    where = (plane.to(tl.int64) * length + rows)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out + where, _rounded(x - mean[None, :], _power(-exponent)), mask=(rows < length)[:, None])


@triton.jit
def _value_tile(x, first_row, scale, out, constants, first, width, HEAD_DIM: tl.constexpr):
    """Store rows of v, turned, at the scale of their block; they are in the order of the columns."""
    exponent = _exponent(tl.maximum(tl.max(_magnitudes(first_row), 0), tl.load(constants + HEAD_DIM + 1)))
    tl.store(scale, _power(exponent))
    where = tl.arange(0, HEAD_DIM).to(tl.int64)[:, None] * width + first + tl.arange(0, TILE)[None, :]
    tl.store(out + where, tl.trans(_rounded(x, _power(-exponent))))


@triton.jit
def _quantise_kernel(
    query, key, value, out_query, query_scale, out_key, key_scale, out_value, value_scale, constants,
    factor, q_len, k_len, heads, heads_k, count_q, count_k, programs_q, programs_k,
    stride_query_batch, stride_query_head, stride_query_row, stride_query_dim,
    stride_key_batch, stride_key_head, stride_key_row, stride_key_dim,
    stride_value_batch, stride_value_head, stride_value_row, stride_value_dim,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Half a block of rows: first those of q, then those of k, then those of v."""
    program = tl.program_id(0)
    places = tl.arange(0, TILE)
    tiles_q = count_q * (ROWS // TILE)
    tiles = count_k * (ROWS // TILE)
    if program < programs_q:
        plane = program // tiles_q
        rows = program % tiles_q * TILE + places
        query += (plane // heads).to(tl.int64) * stride_query_batch + (plane % heads).to(tl.int64) * stride_query_head
        x = _tile(query, rows, q_len, stride_query_row, stride_query_dim, HEAD_DIM)
        _query_tile(x, query_scale, out_query, plane, rows, factor, q_len, count_q * ROWS, HEAD_DIM)
    elif program < programs_q + programs_k:
        place = program - programs_q
        plane = place // tiles
        block = place % tiles // (ROWS // TILE)
        rows = place % tiles * TILE + places
        key += (plane // heads_k).to(tl.int64) * stride_key_batch + (plane % heads_k).to(tl.int64) * stride_key_head
        x = _tile(key, rows, k_len, stride_key_row, stride_key_dim, HEAD_DIM)
        first_row = _row(key, block * ROWS, k_len, stride_key_row, stride_key_dim, HEAD_DIM)
        mine = constants + plane % heads_k * (HEAD_DIM + 2)
        _key_tile(x, first_row, key_scale + plane * count_k + block, out_key, mine, plane, rows, k_len, HEAD_DIM)
    else:
        place = program - programs_q - programs_k
        plane = place // tiles
        block = place % tiles // (ROWS // TILE)
        first = place % tiles * TILE
        # From the bits of a column (sixteen, thread, half, one of a pair) to those of its key (half before thread).
        rows = first + places // 16 * 16 + places // 2 % 2 * 8 + places % 16 // 4 * 2 + places % 2
        value += (plane // heads_k).to(tl.int64) * stride_value_batch
        value += (plane % heads_k).to(tl.int64) * stride_value_head
        x = _tile(value, rows, k_len, stride_value_row, stride_value_dim, HEAD_DIM)
        first_row = _row(value, block * ROWS, k_len, stride_value_row, stride_value_dim, HEAD_DIM)
        mine = constants + plane % heads_k * (HEAD_DIM + 2)
        turned = out_value + plane.to(tl.int64) * HEAD_DIM * count_k * ROWS
        _value_tile(x, first_row, value_scale + plane * count_k + block, turned, mine, first, count_k * ROWS, HEAD_DIM)


_quantise = Launcher(_quantise_kernel)


def quantise(operands: Operands, constants: tuple[float, ...]) -> Quantised:
    """:func:`afbs_compile.kernels.spec.fp8.quantise` on the GPU: every entry is read once and written once.

    Args:
        operands, constants: as there; at least one element.
    """
    q, k, v = operands.q, operands.k, operands.v
    (batch, heads, q_len, dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
    count_q, count_k = block_count(q_len, BLOCK), block_count(k_len, BLOCK)

    def empty(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    out = Quantised(
        empty(batch, heads, q_len, dim),
        empty(batch, heads, count_q * BLOCK, dtype=torch.float32),
        empty(batch, kv_heads, k_len, dim),
        empty(batch, kv_heads, count_k, dtype=torch.float32),
        empty(batch, kv_heads, dim, count_k * BLOCK),
        empty(batch, kv_heads, count_k, dtype=torch.float32),
    )
    factor, tiles = operands.scale * LOG2_E, BLOCK // TILE.value
    programs_q, programs_k = batch * heads * count_q * tiles, batch * kv_heads * count_k * tiles
    _quantise(
        (layout(q), layout(k), layout(v), factor),
        programs_q + 2 * programs_k,
        q, k, v, *out, device_constants(constants or no_constants(kv_heads, dim), q.device),
        factor, q_len, k_len, heads, kv_heads, count_q, count_k, programs_q, programs_k,
        *q.stride(), *k.stride(), *v.stride(), dim,
        warps=WARPS,
    )  # fmt: skip
    return out
