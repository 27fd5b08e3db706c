# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""What a dense mask makes of blocks, on the GPU: the mask is read once, and nothing of its size is written."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.masks.band import as_band
from afbs_compile.kernels.masks.band_triton import form, sees
from afbs_compile.kernels.operands import Operands

WORD = 16
"""Keys of a word of bits: every block is a multiple of it."""


class MaskBlocks(NamedTuple):
    """Of a bool mask; ``B`` and ``H`` are 1 where one is for all.

    Attributes:
        visible, whole: bool ``[B, H, n_q, n_k]``, as in :class:`afbs_compile.kernels.sight.Sight`.
        first: int32 ``[B, H, n_q, n_k]``, the last key of the block that the first row of the query block sees; -1 for
            none.
        seen: int32 ``[B, H, n_q, n_k, shape.k / WORD]``, bits of the keys that some row of the query block sees.
    """

    visible: Tensor
    whole: Tensor
    first: Tensor
    seen: Tensor


@triton.jit
def _kernel(
    mask, valid, visible, whole, first, seen_words, q_len, k_len, upper, width, heads, count_q, count_k,
    stride_batch, stride_head, stride_row, stride_key, stride_valid,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr, VALID: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """One block."""
    place = tl.program_id(0).to(tl.int64)
    block_k = (place % count_k).to(tl.int32)
    block_q = (place // count_k % count_q).to(tl.int32)
    plane = place // count_k // count_q
    batch, head = plane // heads, plane % heads
    rows = block_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < q_len)[:, None] & (keys < k_len)[None, :]
    given = mask + batch * stride_batch + head * stride_head
    given = given + rows.to(tl.int64)[:, None] * stride_row + keys.to(tl.int64)[None, :] * stride_key
    seen = sees(rows, keys, k_len, upper, width, FORM) & inside & (tl.load(given, mask=inside, other=0) != 0)
    if VALID:
        seen = seen & (tl.load(valid + batch * stride_valid + keys, mask=keys < k_len, other=0) != 0)[None, :]
    seen = seen.to(tl.int32)
    by_key = tl.max(seen, 0)
    tl.store(visible + place, tl.max(by_key, 0))
    missing = (rows < q_len)[:, None] & (seen == 0)
    tl.store(whole + place, 1 - tl.max(tl.max(missing.to(tl.int32), 0), 0))
    at_first = tl.where((tl.arange(0, BLOCK_Q) == 0)[:, None] & (seen != 0), keys[None, :], -1)
    tl.store(first + place, tl.max(tl.max(at_first, 0), 0))
    bits = tl.reshape(by_key << (tl.arange(0, BLOCK_K) % WORD), [BLOCK_K // WORD, WORD])
    tl.store(seen_words + place * (BLOCK_K // WORD) + tl.arange(0, BLOCK_K // WORD), tl.sum(bits, 1))


def mask_blocks(operands: Operands, shape: BlockShape) -> MaskBlocks:
    """What a bool mask, together with formula and valid keys, makes of blocks.

    Args:
        operands: whose ``attn_mask`` is bool, and whose formula is a band; shape: rows per block.
    """
    mask, valid, grid, band = operands.attn_mask, operands.valid, operands.grid(shape), as_band(operands)
    assert mask is not None
    batch = mask.shape[0] if valid is None else operands.q.shape[0]
    sizes = (batch, mask.shape[1], grid.count_q, grid.count_k)
    visible, whole = (torch.empty(sizes, dtype=torch.uint8, device=mask.device) for _ in range(2))
    first = torch.empty(sizes, dtype=torch.int32, device=mask.device)
    seen = torch.empty((*sizes, shape.k // WORD), dtype=torch.int32, device=mask.device)
    # A dimension of one element is read again and again.
    strides = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
    with torch.cuda.device_of(mask):  # Triton launches on the current device.
        _kernel[(visible.numel(),)](
            mask.view(torch.uint8), visible if valid is None else valid.contiguous().view(torch.uint8), visible, whole,
            first, seen, grid.q_len, grid.k_len, band.upper, max(band.width, 1), sizes[1], grid.count_q, grid.count_k,
            *strides, grid.k_len, BLOCK_Q=shape.q, BLOCK_K=shape.k, FORM=form(band), VALID=valid is not None,
            WORD=WORD, num_warps=8,
        )  # fmt: skip
    return MaskBlocks(visible.bool(), whole.bool(), first, seen)
