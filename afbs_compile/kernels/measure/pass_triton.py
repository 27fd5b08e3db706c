# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The pass of :mod:`afbs_compile.kernels.measure.one_pass` on the GPU: a program a query tile walks its visiting order.

The first blocks of an order, of which the host says how many, need a mask; the others need one where a partial block
may be among them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.attend.machine import fp32_products
from afbs_compile.kernels.attend.portable.extras import Extras
from afbs_compile.kernels.attend.portable.kernel import attend_tile
from afbs_compile.kernels.attend.portable.tiling import Kind, by_rule
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.launcher import padded
from afbs_compile.kernels.masks.band_triton import BOUNDED
from afbs_compile.kernels.measure.visit import Visit
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.sight import rows_that_count


# One compilation for all sizes: it takes about a second, and a calibration meets many sizes.
@triton.jit(do_not_specialize=["q_len", "k_len", "upper", "width", "groups", "count", "count_k", "thresholds"])
def _pass_kernel(
    query, key, value, dense, difference, magnitude, order, masked, live, blocks, valid, mask, sinks, counted,
    width, natural, softcap, stride_mask_head, stride_mask_row, stride_mask_key, scale, q_len, k_len, upper, groups,
    count, count_k, thresholds,
    stride_query_head, stride_query_row, stride_key_head, stride_key_row, stride_value_head, stride_value_row,
    stride_dense_head, stride_dense_row,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr, FORM: tl.constexpr, LEADING: tl.constexpr, REST_MASKED: tl.constexpr,
    PRECISION: tl.constexpr, VALID: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    CHANGED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """``TILE_Q`` rows of a measured query block of one head: its output after each threshold, against ``dense``."""
    SPLIT_Q: tl.constexpr = BLOCK_Q // TILE_Q
    SPLIT_K: tl.constexpr = BLOCK_K // TILE_K
    # Longest rows first: the short ones fill the end.
    tile = count * SPLIT_Q - 1 - tl.program_id(0) % (count * SPLIT_Q)
    head = (tl.program_id(0) // (count * SPLIT_Q)).to(tl.int64)
    place = tile // SPLIT_Q
    block = tl.load(blocks + place).to(tl.int32)
    rows = block * BLOCK_Q + tile % SPLIT_Q * TILE_Q + tl.arange(0, TILE_Q)
    cols = tl.arange(0, DIM_PAD)
    inside = (rows < q_len)[:, None] & (cols < HEAD_DIM)[None, :]
    query += head * stride_query_head
    key += head // groups * stride_key_head
    value += head // groups * stride_value_head
    query_tile = tl.load(query + rows.to(tl.int64)[:, None] * stride_query_row + cols[None, :], mask=inside, other=0.0)
    dense += head * stride_dense_head + rows.to(tl.int64)[:, None] * stride_dense_row + cols[None, :]
    looked_at = inside
    if COUNTED:
        looked_at = inside & (tl.load(counted + rows, mask=rows < q_len, other=0) != 0)[:, None]
    size = tl.abs(tl.load(dense, mask=looked_at, other=0.0).to(tl.float32))
    tl.store(magnitude + head * count * SPLIT_Q + tile, tl.sum(tl.sum(size, 1), 0))

    row = head * count + place
    order += row * count_k
    live += row * thresholds
    difference += (head * count * SPLIT_Q + tile) * thresholds
    acc = tl.zeros([TILE_Q, DIM_PAD], tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    peak = tl.full([TILE_Q], float("-inf"), tl.float32)
    if MASK > 0:
        mask += head * stride_mask_head
    if SINKS:
        peak = tl.zeros([TILE_Q], tl.float32) + tl.load(sinks + head).to(tl.float32)
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    first = 0
    if LEADING:
        first = tl.load(masked + place) * SPLIT_K
        for entry in range(0, first):
            start = tl.load(order + entry // SPLIT_K) * BLOCK_K + entry % SPLIT_K * TILE_K
            acc, total, peak = attend_tile(
                acc, total, peak, query_tile, key, value, rows, start, stride_key_row, stride_value_row, scale, q_len,
                k_len, upper, 0.0, width, natural, softcap, valid, mask, stride_mask_row, stride_mask_key, HEAD_DIM,
                DIM_PAD, TILE_K, FORM, True, False, PRECISION, VALID, MASK, CAPPED, CHANGED,
            )  # fmt: skip
    changed = True
    error = 0.0
    for threshold in range(thresholds):
        end = tl.load(live + threshold) * SPLIT_K
        changed = changed | (end > first)
        for entry in range(first, end):
            start = tl.load(order + entry // SPLIT_K) * BLOCK_K + entry % SPLIT_K * TILE_K
            acc, total, peak = attend_tile(
                acc, total, peak, query_tile, key, value, rows, start, stride_key_row, stride_value_row, scale, q_len,
                k_len, upper, 0.0, width, natural, softcap, valid, mask, stride_mask_row, stride_mask_key, HEAD_DIM,
                DIM_PAD, TILE_K, FORM, REST_MASKED, False, PRECISION, VALID, MASK, CAPPED, CHANGED,
            )  # fmt: skip
        first = tl.maximum(first, end)
        if changed:  # else this threshold keeps what the one before it kept
            exact = tl.load(dense, mask=inside, other=0.0)
            output = (acc / tl.where(total == 0.0, 1.0, total)[:, None]).to(exact.dtype).to(tl.float32)
            distance = tl.where(looked_at, tl.abs(output - exact.to(tl.float32)), 0.0)
            error = tl.sum(tl.sum(distance, 1), 0)
        tl.store(difference + threshold, error)
        changed = False


def _addressable(x: Tensor) -> Tensor:
    """``x`` itself if the kernel can walk it, else a contiguous copy: the last dimension must have stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def triton_pass(
    operands: Operands, dense: Tensor, shape: BlockShape, visit: Visit, live: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`afbs_compile.kernels.measure.pass_plain.plain_pass` on Triton, whatever the device; sums are fp32."""
    operands = operands.with_positive_scale()
    q, k, v, exact = (_addressable(x[0]) for x in (operands.q, operands.k, operands.v, dense))
    (heads, q_len, dim), k_len = q.shape, k.shape[1]
    extras, counted = Extras.of(operands, rows), rows_that_count(operands)
    count, dim_pad = len(rows), padded(dim)
    # Whole blocks, but 64 keys of narrow heads: on an H200 128 of them take a tenth longer, those of wider heads less.
    keys = min(shape.k, 64) if dim_pad <= 64 else shape.k
    kind = Kind(q.device, BlockShape(shape.q, keys), dim_pad, q.element_size(), extras.form > 0, whole=True)
    tile_q, tile_k, warps, stages = by_rule(kind)
    split = shape.q // tile_q
    difference = q.new_empty(heads, count * split, live.shape[2], dtype=torch.float32)
    magnitude = q.new_empty(heads, count * split, dtype=torch.float32)
    # Of a band that starts at the first key the partial blocks are near the query block, and so the first ones.
    leading = extras.form == BOUNDED and not extras.blind
    rest_masked = not leading and (extras.blind or k_len % shape.k != 0)

    with torch.cuda.device_of(q):  # Triton launches on the current device.
        _pass_kernel[(heads * count * split,)](
            q, k, v, exact, difference, magnitude, visit.order, visit.first, live, rows, *extras[:3],
            rows if counted is None else counted[0].contiguous().view(torch.uint8), extras.width, extras.natural,
            extras.softcap, *extras.strides[2:], extras.scale, q_len, k_len, extras.upper, operands.groups, count,
            visit.order.shape[2], live.shape[2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *exact.stride()[:2],
            HEAD_DIM=dim, DIM_PAD=dim_pad, BLOCK_Q=shape.q, BLOCK_K=shape.k, TILE_Q=tile_q, TILE_K=tile_k,
            FORM=extras.form, LEADING=leading, REST_MASKED=rest_masked, PRECISION=fp32_products(q.device),
            VALID=extras.has_valid, MASK=extras.has_mask, CAPPED=extras.capped, SINKS=extras.has_sinks,
            CHANGED=extras.changed, COUNTED=counted is not None, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return difference.unflatten(1, (count, split)).sum(2), magnitude.unflatten(1, (count, split)).sum(2)
