# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""What a call's rows see of its blocks, by Triton kernels, whatever the device: a dense mask is read once.

Nothing of the size of the mask is stored: of each pair of blocks a few numbers, and of each key whether it is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.launcher import padded
from afbs_compile.kernels.masks.band import form, told
from afbs_compile.kernels.masks.band_triton import covered_blocks, sees, visible_blocks, whole_blocks
from afbs_compile.kernels.operands import Operands, taken

VISIBLE, WHOLE, BLURRED = 1, 2, 4
"""Bits of a block."""

_VISIBLE, _WHOLE, _BLURRED = tl.constexpr(VISIBLE), tl.constexpr(WHOLE), tl.constexpr(BLURRED)

LARGE_TILE = 4096
"""Elements of a pair of blocks above which a program has eight warps."""


class Look(NamedTuple):
    """What :class:`afbs_compile.kernels.sight.Sight` says, as kernels read it; ``[B or 1, H or 1, n_q, ..]`` each.

    Attributes:
        bits: uint8 ``[.., n_k]``: :data:`VISIBLE`, :data:`WHOLE`, :data:`BLURRED`.
        bias: fp32 ``[.., n_k]``; ``None`` where nothing is added to scores.
        ends: int32 ``[.., 2]``; ``None`` where the formula says it.
        seen: bool ``[B or 1, k_len]``, the keys that some row of any head sees; ``None`` without a dense mask.
    """

    bits: Tensor
    bias: Tensor | None = None
    ends: Tensor | None = None
    seen: Tensor | None = None

    def of_heads(self, heads: Sequence[int]) -> Look:
        """Of some query heads."""
        if self.bits.shape[1] == 1:
            return self
        bias, ends = (None if x is None else taken(x, heads) for x in (self.bias, self.ends))
        return Look(taken(self.bits, heads), bias, ends, self.seen)


def look(operands: Operands, shape: BlockShape) -> Look:
    """What the rows of a call see of its blocks; found once for the same operands.

    Args:
        operands: of the call, whose mask is a band; shape: rows per block.
    """
    key = ("look", shape)
    if key not in operands.derived:
        operands.derived[key] = (_by_keys if operands.attn_mask is None else _by_elements)(operands, shape)
    found: Look = operands.derived[key]
    return found


def plane_strides(x: Tensor) -> tuple[int, int]:
    """How far ``x [B or 1, H or 1, ..]`` steps from a batch element, and from a head, to the next; 0 for one of all."""
    batch, head = x.stride()[:2]
    return (0 if x.shape[0] == 1 else batch), (0 if x.shape[1] == 1 else head)


def mask_strides(mask: Tensor) -> tuple[int, ...]:
    """The four strides of a dense mask, 0 where one entry is for all."""
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def as_read(mask: Tensor) -> Tensor:
    """A mask as kernels read it: bytes in place of bools."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


# One compilation for most sizes: it takes half a second, and a calibration meets many.
@triton.jit(do_not_specialize=["q_len", "k_len", "upper", "width", "count_q", "count_k", "stride_valid"])
def _by_keys_kernel(
    bits, counts, q_len, k_len, upper, width, count_q, count_k, stride_valid,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, HAS_VALID: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The blocks of one query block by positions, and by how many keys of each are valid."""
    program = tl.program_id(0)
    block = program % count_q
    cols = tl.arange(0, COLUMNS)
    visible = visible_blocks(cols, block, q_len, k_len, upper, width, BLOCK_Q, BLOCK_K, BAND)
    whole = whole_blocks(cols, block, q_len, k_len, upper, width, BLOCK_Q, BLOCK_K, BAND)
    covered = covered_blocks(cols, block, q_len, k_len, upper, width, BLOCK_Q, BLOCK_K, BAND)
    if HAS_VALID:
        count = tl.load(counts + program // count_q * stride_valid + cols, mask=cols < count_k, other=0)
        visible = visible & (count > 0)
        whole = whole & (count == BLOCK_K)
    found = tl.where(visible, _VISIBLE, 0) | tl.where(whole, _WHOLE, 0) | tl.where(visible & ~covered, _BLURRED, 0)
    tl.store(bits + program.to(tl.int64) * count_k + cols, found.to(tl.uint8), mask=cols < count_k)


def _by_keys(operands: Operands, shape: BlockShape) -> Look:
    grid, band, valid = operands.grid(shape), told(operands), operands.valid
    batch = 1 if valid is None else len(valid)
    bits = torch.empty(batch, 1, grid.count_q, grid.count_k, dtype=torch.uint8, device=operands.device)
    if bits.numel() == 0:
        return Look(bits)
    counts = bits if valid is None else _in_blocks(valid, shape.k)
    with torch.cuda.device_of(bits):  # Triton launches on the current device.
        _by_keys_kernel[(batch * grid.count_q,)](
            bits, counts, grid.q_len, grid.k_len, band.upper, band.width, grid.count_q, grid.count_k, counts.stride(0),
            *shape, form(band), valid is not None, padded(grid.count_k), num_warps=4,
        )  # fmt: skip
    return Look(bits)


def _in_blocks(valid: Tensor, block: int) -> Tensor:
    """How many keys of each block are valid, int32 ``[B, n_k]``."""
    return F.pad(valid, (0, -valid.shape[1] % block)).unflatten(1, (-1, block)).sum(2, dtype=torch.int32)


@triton.jit
def _allowed(
    mask, valid, rows, keys, q_len, k_len, upper, width, stride_row, stride_key, stride_valid_key,
    BAND: tl.constexpr, HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Which keys some rows may attend, ``[rows, keys]``, and the mask's own entries."""
    inside = (rows < q_len)[:, None] & (keys < k_len)[None, :]
    places = rows.to(tl.int64)[:, None] * stride_row + keys.to(tl.int64)[None, :] * stride_key
    given = tl.load(mask + places, mask=inside, other=0)
    allowed = inside & sees(rows, keys, k_len, upper, width, BAND)
    allowed = allowed & (given != float("-inf")) if HAS_BIAS else allowed & (given != 0)
    if HAS_VALID:
        exists = tl.load(valid + keys.to(tl.int64) * stride_valid_key, mask=keys < k_len, other=0)
        allowed = allowed & (exists != 0)[None, :]
    return allowed, given


@triton.jit
def _note(
    shown, given, rows, keys, q_len, k_len, row, whole, counts, bias, seen, ends_first, ends_last,
    BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Store what one pair of blocks is like; the ends so far."""
    somewhere = tl.max(shown.to(tl.int32), 0)
    full = shown & (given == 0) if HAS_BIAS else shown
    full = full | (rows >= q_len)[:, None]
    place = row + tl.min(keys, 0) // BLOCK_K
    tl.store(whole + place, (tl.min(tl.min(full.to(tl.int32), 1), 0)).to(tl.uint8))
    tl.store(counts + place, tl.sum(somewhere, 0))
    # Programs that see the same key store the same.
    tl.store(seen + keys, tl.full(keys.shape, 1, tl.uint8), mask=somewhere != 0)
    if HAS_BIAS:
        # the logarithm of the mean of exp(bias) over what is seen
        numbers = tl.where(shown, given.to(tl.float32), float("-inf"))
        peak = tl.max(tl.max(numbers, 1), 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.sum(tl.sum(tl.exp(numbers - base), 1), 0)
        size = tl.sum(tl.sum(shown.to(tl.int32), 1), 0)
        tl.store(bias + place, tl.log(mass) + base - tl.log(tl.maximum(size, 1).to(tl.float32)))
    first = shown & (rows == tl.min(rows, 0))[:, None]
    ends_first = tl.maximum(ends_first, tl.max(tl.max(tl.where(first, keys[None, :], -1), 1), 0))
    ends_last = tl.maximum(ends_last, tl.max(tl.where(somewhere != 0, keys, -1), 0))
    return ends_first, ends_last


@triton.jit(do_not_specialize=["q_len", "k_len", "upper", "width", "heads", "count_q", "count_k", "stride_seen"])
def _by_elements_kernel(
    mask, valid, whole, counts, bias, ends, seen, q_len, k_len, upper, width, heads, count_q, count_k, stride_batch,
    stride_head, stride_row, stride_key, stride_valid_batch, stride_valid_key, stride_seen,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    """The blocks of one query block, key block by key block."""
    program = tl.program_id(0)
    block = program % count_q
    plane = program // count_q
    batch = (plane // heads).to(tl.int64)
    mask += batch * stride_batch + (plane % heads).to(tl.int64) * stride_head
    valid += batch * stride_valid_batch
    seen += batch * stride_seen
    row = program.to(tl.int64) * count_k
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    places = tl.arange(0, BLOCK_K)
    first = -1
    last = -1
    clear = tl.zeros([BLOCK_Q], tl.int32)
    for start in range(0, k_len, BLOCK_K):
        shown, given = _allowed(
            mask, valid, rows, start + places, q_len, k_len, upper, width, stride_row, stride_key, stride_valid_key,
            BAND, HAS_VALID, HAS_BIAS,
        )  # fmt: skip
        if HAS_BIAS:
            # Beside anything larger the lowest number has no weight.
            shown = shown & ~(given <= LOWEST)
            clear = clear | tl.max(shown.to(tl.int32), 1)
        first, last = _note(
            shown, given, rows, start + places, q_len, k_len, row, whole, counts, bias, seen, first, last,
            BLOCK_K, HAS_BIAS,
        )  # fmt: skip
    if HAS_BIAS:
        # A row of nothing larger weighs its keys by the scores: these query blocks are looked at again.
        if tl.min((clear | (rows >= q_len).to(tl.int32)), 0) == 0:
            for start in range(0, k_len, BLOCK_K):
                shown, given = _allowed(
                    mask, valid, rows, start + places, q_len, k_len, upper, width, stride_row, stride_key,
                    stride_valid_key, BAND, HAS_VALID, HAS_BIAS,
                )  # fmt: skip
                shown = shown & (~(given <= LOWEST) | (clear == 0)[:, None])
                first, last = _note(
                    shown, given, rows, start + places, q_len, k_len, row, whole, counts, bias, seen, first, last,
                    BLOCK_K, HAS_BIAS,
                )  # fmt: skip
    tl.store(ends + program * 2, first)
    tl.store(ends + program * 2 + 1, last)


def _by_elements(operands: Operands, shape: BlockShape) -> Look:
    grid, band, valid, mask = operands.grid(shape), told(operands), operands.valid, operands.attn_mask
    assert mask is not None
    batch, heads = mask.shape[0] if valid is None else len(valid), mask.shape[1]
    sizes, device = (batch, heads, grid.count_q), operands.device
    whole = torch.empty(*sizes, grid.count_k, dtype=torch.uint8, device=device)
    counts = torch.empty(*sizes, grid.count_k, dtype=torch.int32, device=device)
    ends = torch.empty(*sizes, 2, dtype=torch.int32, device=device)
    seen = torch.zeros(batch, grid.k_len, dtype=torch.uint8, device=device)
    bias = torch.empty(whole.shape, dtype=torch.float32, device=device) if operands.has_bias else None
    lowest = torch.finfo(mask.dtype).min if operands.has_bias else 0
    if whole.numel():
        with torch.cuda.device_of(mask):  # Triton launches on the current device.
            _by_elements_kernel[(batch * heads * grid.count_q,)](
                as_read(mask), mask if valid is None else as_read(valid), whole, counts, whole if bias is None else bias,
                ends, seen, grid.q_len, grid.k_len, band.upper, band.width, heads, grid.count_q, grid.count_k,
                *mask_strides(mask), *((0, 0) if valid is None else valid.stride()), grid.k_len,
                *shape, form(band), valid is not None, operands.has_bias, lowest,
                num_warps=8 if shape.q * shape.k > LARGE_TILE else 4,
            )  # fmt: skip
    # A key that no row of the query block sees, but that another one does, blurs its block.
    blurred = (counts > 0) & (counts < _in_blocks(seen.bool(), shape.k)[:, None, None])
    bits = (counts > 0) * VISIBLE + whole * WHOLE + blurred * BLURRED
    return Look(bits.to(torch.uint8), bias, ends, seen.bool())
