# ruff: noqa: N803, N806 (Triton writes compile-time constants in capitals)
# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Block-sparse attention forward in Triton: one program per query tile walks its list of live key blocks.

The rule is :func:`afbs_compile.kernels.reference.masked_attention`. Lists are ascending, so the blocks that need a
mask (those on the diagonal, or the partial one at the end) are the last entries; all others run a loop without masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.launch import Launcher, device_constants, layout, padded
from afbs_compile.kernels.predict import BlockLists
from afbs_compile.kernels.reference import LAMBDA_OFF, LOG2_E, block_count
from afbs_compile.kernels.tiling import Kind, LaunchShape, choose, describe

LARGEST_ROW_STRIDE = 2**31 // 256
"""Offsets inside a tile of at most 256 rows are 32 bits wide; the start of a tile is 64 bits wide."""


@triton.jit
def _attend_tile(
    acc,
    total,
    peak,
    query,
    key,
    value,
    rows,
    start,
    stride_key_row,
    stride_value_row,
    scale,
    length,
    lam,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LAMBDA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold keys ``start .. start + TILE_K`` into the running softmax.

    ``scale`` (c below) is positive and turns scores into log2 units; ``peak`` (m) is in units of the scores.
    """
    places = tl.arange(0, TILE_K)
    cols = tl.arange(0, DIM_PAD)
    base = start.to(tl.int64)
    keys = key + base * stride_key_row + places[:, None] * stride_key_row + cols[None, :]
    values = value + base * stride_value_row + places[:, None] * stride_value_row + cols[None, :]
    if MASKED:
        inside = (start + places < length)[:, None] & (cols < HEAD_DIM)[None, :]
        key_tile = tl.load(keys, mask=inside, other=0.0)
    elif HEAD_DIM != DIM_PAD:
        inside = (places >= 0)[:, None] & (cols < HEAD_DIM)[None, :]
        key_tile = tl.load(keys, mask=inside, other=0.0)
    else:
        key_tile = tl.load(keys)

    scores = tl.dot(query, tl.trans(key_tile), input_precision=PRECISION)
    if MASKED:
        allowed = (start + places < length)[None, :]
        if CAUSAL:
            allowed = allowed & (rows[:, None] >= (start + places)[None, :])
        scores = tl.where(allowed, scores, float("-inf"))
    tile_peak = tl.max(scores, 1)
    new_peak = tl.maximum(peak, tile_peak)

    # l <- l * 2^(c (m_old - m_new)) + rowsum(2^(c (s - m_new))),   o <- o * 2^(c (m_old - m_new)) + 2^(c (s - m_new)) V
    # Subtracting first is exact at the maximum. The fused c * s - c * m, one instruction less, overflows where c * m
    # has an ulp above 128, and fp16 inputs of 6e4 reach that.
    weights = tl.math.exp2((scores - new_peak[:, None]) * scale)
    decay = tl.math.exp2((peak - new_peak) * scale)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    needed = True
    if HAS_LAMBDA:
        # Each row skips by its own scores: another row of the tile, a later token maybe, has no say.
        skipped = (tile_peak - new_peak) * scale < lam
        weights = tl.where(skipped[:, None], 0.0, weights)
        needed = tl.min((skipped | (rows >= length)).to(tl.int32), 0) == 0
    if needed:
        if MASKED or HEAD_DIM != DIM_PAD:  # noqa: SIM108 (a ternary would evaluate both in the interpreter)
            value_tile = tl.load(values, mask=inside, other=0.0)
        else:
            value_tile = tl.load(values)
        acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc, input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def _forward_kernel(
    query,
    key,
    value,
    out,
    counts,
    indices,
    lam,
    scale,
    length,
    heads,
    groups,
    count_q,
    count_k,
    stride_query_batch,
    stride_query_head,
    stride_query_row,
    stride_key_batch,
    stride_key_head,
    stride_key_row,
    stride_value_batch,
    stride_value_head,
    stride_value_row,
    stride_out_batch,
    stride_out_head,
    stride_out_row,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASKED: tl.constexpr,
    HAS_LAMBDA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows ``tile * TILE_Q ..`` of one head."""
    SPLIT_Q: tl.constexpr = BLOCK_Q // TILE_Q
    SPLIT_K: tl.constexpr = BLOCK_K // TILE_K
    # Heads are outermost, so that programs that run together share keys and values in the cache.
    tiles = count_q * SPLIT_Q
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    if CAUSAL:
        # Longest rows first: the short ones fill the end.
        tile = tiles - 1 - tile
    batch = (plane // heads).to(tl.int64)
    head = plane % heads
    head_k = (head // groups).to(tl.int64)
    block = tile // SPLIT_Q

    rows = tile * TILE_Q + tl.arange(0, TILE_Q)
    cols = tl.arange(0, DIM_PAD)
    inside = (rows < length)[:, None] & (cols < HEAD_DIM)[None, :]
    query += batch * stride_query_batch + head.to(tl.int64) * stride_query_head
    key += batch * stride_key_batch + head_k * stride_key_head
    value += batch * stride_value_batch + head_k * stride_value_head
    query_tile = tl.load(query + rows.to(tl.int64)[:, None] * stride_query_row + cols[None, :], mask=inside, other=0.0)

    row = plane.to(tl.int64) * count_q + block
    count = tl.load(counts + row)
    blocks = indices + row * count_k
    # Only the last entries can lie on the diagonal, or be the partial block.
    MASKED_AT_MOST: tl.constexpr = HAS_MASKED * (BLOCK_Q // BLOCK_K if CAUSAL else 1)
    first_masked = block * MASKED_AT_MOST if CAUSAL else length // BLOCK_K
    plain = count
    for place in tl.static_range(1, MASKED_AT_MOST + 1):
        last = tl.load(blocks + count - place, mask=count >= place, other=-1)
        plain -= (last >= first_masked).to(tl.int32)

    lam_head = 0.0
    if HAS_LAMBDA:
        lam_head = tl.load(lam + head)
    acc = tl.zeros([TILE_Q, DIM_PAD], tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    peak = tl.full([TILE_Q], float("-inf"), tl.float32)
    for entry in range(0, plain * SPLIT_K):
        start = tl.load(blocks + entry // SPLIT_K) * BLOCK_K + entry % SPLIT_K * TILE_K
        acc, total, peak = _attend_tile(
            acc, total, peak, query_tile, key, value, rows, start, stride_key_row, stride_value_row, scale,
            length, lam_head, HEAD_DIM, DIM_PAD, TILE_K, CAUSAL, False, HAS_LAMBDA, PRECISION,
        )  # fmt: skip
    if HAS_MASKED:
        for entry in range(plain * SPLIT_K, count * SPLIT_K):
            start = tl.load(blocks + entry // SPLIT_K) * BLOCK_K + entry % SPLIT_K * TILE_K
            acc, total, peak = _attend_tile(
                acc, total, peak, query_tile, key, value, rows, start, stride_key_row, stride_value_row, scale,
                length, lam_head, HEAD_DIM, DIM_PAD, TILE_K, CAUSAL, True, HAS_LAMBDA, PRECISION,
            )  # fmt: skip

    out += batch * stride_out_batch + head.to(tl.int64) * stride_out_head
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows.to(tl.int64)[:, None] * stride_out_row + cols[None, :], result, mask=inside)


_forward = Launcher(_forward_kernel)


def _precision(device: torch.device) -> str:
    """How fp32 operands are multiplied.

    Three tf32 products carry 22 to 24 bits of each operand, as much as fp32 rounding leaves of a sum, on the tensor
    cores. Plain IEEE products run on the scalar units and need tiles too small for them.
    """
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def _addressable(x: Tensor) -> Tensor:
    """``x`` itself if the kernel can walk it, else a contiguous copy: the last dimension must have stride 1."""
    return x if x.stride(3) == 1 and x.stride(2) < LARGEST_ROW_STRIDE else x.contiguous()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    lam: Sequence[float],
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    out: Tensor | None = None,
) -> Tensor:
    """Attention over the live blocks of ``lists``; nothing else of k and v is read.

    Half precisions multiply in their own precision and accumulate in fp32; fp32 operands keep fp32's accuracy. Where
    the blocks do not fit the machine they are cut into smaller tiles, and ``lam`` is then ignored: nothing is skipped.

    Args:
        q: ``[B, H, N, D]`` fp16, bf16 or fp32; k, v: ``[B, H_kv, N, D]`` of the same dtype; any strides.
        lists: as :func:`afbs_compile.kernels.predict.predict_blocks` makes them: ascending, no block that is
            invisible under ``causal``, and at least one visible key for every row.
        lam: one number per query head, at most 0; a tile whose row maxima all lie more than ``-lam`` log2 units
            under the running ones adds to the row sums, but its product with V is skipped.
        causal: whether row r attends keys 0..r only.
        scale: softmax scale; ``None`` means ``D ** -0.5``.
        block_q, block_k: rows per block, powers of two; ``block_q`` is a multiple of ``block_k``.
        out: ``[B, H, N, D]`` to write into, its last dimension contiguous; by default a new tensor, in memory
            ``[B, N, H, D]``.

    Returns:
        ``out``, in the dtype of ``q``.
    """
    batch, heads, length, dim = q.shape
    if out is None:
        out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    if out.numel() == 0:
        return out
    scale = dim**-0.5 if scale is None else scale
    if scale <= 0:
        # The kernel takes the row maximum before it multiplies by the scale.
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = (_addressable(x) for x in (q, k, v))
    wants_lambda = any(value > LAMBDA_OFF for value in lam)
    kind = _kind(q.device, q.dtype, dim, causal=causal, block_q=block_q, block_k=block_k, uses_lambda=wants_lambda)
    count_q = block_count(length, block_q)
    layouts = tuple(map(layout, (q, k, v, out, *lists)))

    def launch(shape: LaunchShape) -> None:
        has_lambda = wants_lambda and (shape.tile_q, shape.tile_k) == (block_q, block_k)
        _forward(
            (layouts, block_q, block_k, causal, scale, has_lambda, shape),
            batch * heads * count_q * (block_q // shape.tile_q),
            *(q, k, v, out, lists.counts, lists.indices),
            device_constants(tuple(lam), q.device) if has_lambda else lists.counts,
            *(scale * LOG2_E, length, heads, heads // k.shape[1], count_q, lists.indices.shape[-1]),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
            *(dim, kind.dim_pad, block_q, block_k, shape.tile_q, shape.tile_k),
            *(causal, causal or length % block_k != 0, has_lambda, _precision(q.device)),
            warps=shape.warps,
            stages=shape.stages,
        )

    with torch.cuda.device_of(q):  # Triton launches on the current device.
        launch(choose(kind, length, launch))
    return out


def launch_choice(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    causal: bool,
    block_q: int,
    block_k: int,
    uses_lambda: bool = False,
) -> str:
    """What :func:`attend` launches for a kind of call, e.g. ``"portable 128x64 tiles, 4 warps, 2 stages"``.

    On GPUs other than Hopper this is the first guess until a call of at least
    :data:`afbs_compile.kernels.tiling.SHORTEST_TIMED` tokens has timed it against its neighbours.
    """
    blocks = {"block_q": block_q, "block_k": block_k}
    return describe(_kind(device, dtype, head_dim, causal=causal, uses_lambda=uses_lambda, **blocks))


def _kind(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    causal: bool,
    block_q: int,
    block_k: int,
    uses_lambda: bool,
) -> Kind:
    return Kind(device, block_q, block_k, padded(head_dim), dtype.itemsize, causal, uses_lambda)
