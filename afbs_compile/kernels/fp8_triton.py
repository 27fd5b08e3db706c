# ruff: noqa: N803 (Triton writes compile-time constants in capitals)
# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Operands rounded to FP8 in one launch: the specification is :func:`afbs_compile.kernels.fp8.quantise`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels import fp8
from afbs_compile.kernels.fp8 import BLOCK, Quantised, no_constants
from afbs_compile.kernels.launch import Launcher, device_constants, layout
from afbs_compile.kernels.reference import LOG2_E, block_count

ROWS = tl.constexpr(BLOCK)
LARGEST = tl.constexpr(fp8.LARGEST)
LARGEST_EXPONENT = tl.constexpr(fp8.LARGEST_EXPONENT)
ROW_EXPONENT = tl.constexpr(fp8.ROW_EXPONENT)
WARPS = 8


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
def _rounded(x):
    """E4M3; NaN for what is not finite."""
    clamped = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    return tl.where(tl.abs(x) < float("inf"), clamped, float("nan")).to(tl.float8e4nv)


@triton.jit
def _tile(x, plane, heads, rows, length, stride_batch, stride_head, stride_row, stride_dim, HEAD_DIM: tl.constexpr):
    """Rows of one head in fp32, zeros past the end."""
    base = x + (plane // heads).to(tl.int64) * stride_batch + (plane % heads).to(tl.int64) * stride_head
    columns = tl.arange(0, HEAD_DIM).to(tl.int64)
    offsets = rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_dim
    return tl.load(base + offsets, mask=(rows < length)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _block_exponent(tile, rows, first, peak):
    """The exponent of a block: of its first row's peak, or of the constant where that is larger."""
    first_row = tl.where((rows == first)[:, None], _magnitudes(tile), 0.0)
    return _exponent(tl.maximum(tl.max(tl.max(first_row, 1), 0), peak))


@triton.jit
def _query_block(x, scales, out, plane, rows, factor, length, width, HEAD_DIM: tl.constexpr):
    """Store rows of q, each at its own scale."""
    x *= factor
    exponent = _exponent(tl.max(_magnitudes(x), 1)) - ROW_EXPONENT
    tl.store(scales + plane.to(tl.int64) * width + rows, _power(exponent))
    where = (plane.to(tl.int64) * length + rows)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(out + where, _rounded(x * _power(-exponent)[:, None]), mask=(rows < length)[:, None])


@triton.jit
def _key_block(x, scale, out, constants, plane, rows, first, length, HEAD_DIM: tl.constexpr):
    """Store a block of k less the mean of its head."""
    columns = tl.arange(0, HEAD_DIM)
    x -= tl.load(constants + columns)[None, :]
    exponent = _block_exponent(x, rows, first, tl.load(constants + HEAD_DIM))
    tl.store(scale, _power(exponent))
    where = (plane.to(tl.int64) * length + rows)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out + where, _rounded(x * _power(-exponent)), mask=(rows < length)[:, None])


@triton.jit
def _value_block(x, scale, out, constants, rows, first, width, HEAD_DIM: tl.constexpr):
    """Store a block of v, turned; its rows are in the order of the columns."""
    exponent = _block_exponent(x, rows, first, tl.load(constants + HEAD_DIM + 1))
    tl.store(scale, _power(exponent))
    where = tl.arange(0, HEAD_DIM).to(tl.int64)[:, None] * width + first + tl.arange(0, ROWS)[None, :]
    tl.store(out + where, tl.trans(_rounded(x * _power(-exponent))))


@triton.jit
def _quantise_kernel(
    query, key, value, out_query, query_scale, out_key, key_scale, out_value, value_scale, constants,
    factor, length, heads, heads_k, count, programs_q, programs_k,
    stride_query_batch, stride_query_head, stride_query_row, stride_query_dim,
    stride_key_batch, stride_key_head, stride_key_row, stride_key_dim,
    stride_value_batch, stride_value_head, stride_value_row, stride_value_dim,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One block of 128 rows: first those of q, then those of k, then those of v."""
    program = tl.program_id(0)
    places = tl.arange(0, ROWS)
    if program < programs_q:
        plane = program // count
        rows = program % count * ROWS + places
        x = _tile(
            query, plane, heads, rows, length,
            stride_query_batch, stride_query_head, stride_query_row, stride_query_dim, HEAD_DIM,
        )  # fmt: skip
        _query_block(x, query_scale, out_query, plane, rows, factor, length, count * ROWS, HEAD_DIM)
    elif program < programs_q + programs_k:
        place = program - programs_q
        plane = place // count
        first = place % count * ROWS
        rows = first + places
        mine = constants + plane % heads_k * (HEAD_DIM + 2)
        x = _tile(
            key, plane, heads_k, rows, length,
            stride_key_batch, stride_key_head, stride_key_row, stride_key_dim, HEAD_DIM,
        )  # fmt: skip
        _key_block(x, key_scale + place, out_key, mine, plane, rows, first, length, HEAD_DIM)
    else:
        place = program - programs_q - programs_k
        plane = place // count
        first = place % count * ROWS
        # From the bits of a column (sixteen, thread, half, one of a pair) to those of its key (half before thread).
        rows = first + places // 16 * 16 + places // 2 % 2 * 8 + places % 16 // 4 * 2 + places % 2
        mine = constants + plane % heads_k * (HEAD_DIM + 2)
        x = _tile(
            value, plane, heads_k, rows, length,
            stride_value_batch, stride_value_head, stride_value_row, stride_value_dim, HEAD_DIM,
        )  # fmt: skip
        turned = out_value + plane.to(tl.int64) * HEAD_DIM * count * ROWS
        _value_block(x, value_scale + place, turned, mine, rows, first, count * ROWS, HEAD_DIM)


_quantise = Launcher(_quantise_kernel)


def quantise(q: Tensor, k: Tensor, v: Tensor, constants: tuple[float, ...] | None, scale: float | None) -> Quantised:
    """:func:`afbs_compile.kernels.fp8.quantise` on the GPU: every entry is read once and written once.

    Args:
        q, k, v, constants, scale: as there; at least one element.
    """
    (batch, heads, length, dim), kv_heads = q.shape, k.shape[1]
    count = block_count(length, BLOCK)
    if constants is None:
        constants = no_constants(kv_heads, dim)

    def empty(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    out = Quantised(
        empty(batch, heads, length, dim),
        empty(batch, heads, count * BLOCK, dtype=torch.float32),
        empty(batch, kv_heads, length, dim),
        empty(batch, kv_heads, count, dtype=torch.float32),
        empty(batch, kv_heads, dim, count * BLOCK),
        empty(batch, kv_heads, count, dtype=torch.float32),
    )
    factor = (dim**-0.5 if scale is None else scale) * LOG2_E
    programs_q, programs_k = batch * heads * count, batch * kv_heads * count
    _quantise(
        (layout(q), layout(k), layout(v), factor),
        programs_q + 2 * programs_k,
        q, k, v, *out, device_constants(constants, q.device),
        factor, length, heads, kv_heads, count, programs_q, programs_k,
        *q.stride(), *k.stride(), *v.stride(), dim,
        warps=WARPS,
    )  # fmt: skip
    return out
