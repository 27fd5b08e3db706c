"""Attention on FP8 operands: what is rounded, to what, and what it gives; the specification, in plain PyTorch.

    Q    row by row: largest entry in [128, 256), softmax scale and log2(e) multiplied in before
    K    block by block: less a constant per key head, which the softmax cancels; a peak in [1, 2)
    V    block by block: a peak in [1, 2)
    P    2^8 2^(s - m), m the running maximum; the row sum is of the weights before they are rounded

Everything becomes E4M3 (four bits of exponent, three of mantissa, largest value 448) at a scale that is a power of two:
within its range, 2^-6 to 448, a power of two more or less rounds nothing differently.

Causality: a block's scale may depend on nothing that its first row does not see. The peak of a block is that of its
first row, or a constant where that is larger; later rows may be 224 times as large before they are clamped to 448.
Infinite entries become NaN, which E4M3 has, and no entry that is not finite has a part in a peak.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.blocks import block_count
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.attention import LOG2_E

BLOCK = 128
"""Rows of a block."""

LARGEST = 448.0
"""The largest number of E4M3."""

ROW_EXPONENT = 7
"""The peak of a row of Q lies in [2^7, 2^8)."""

WEIGHT_EXPONENT = 8
"""The largest weight is 2^8: weights down to 2^-14 of it keep three bits."""

LARGEST_EXPONENT = 60
"""Of a scale, either way: the product of two, and its inverse, stay normal numbers of fp32."""

SMALLEST_PEAK = 2.0**-4
"""Peak of keys and of values, at least, where no constants are given."""


class Quantised(NamedTuple):
    """Operands of the FP8 kernel.

    Attributes:
        q: E4M3 ``[B, H, N, D]``; q_scale: fp32 ``[B, H, n_q * 128]``, of no meaning past the end.
        k: E4M3 ``[B, H_kv, N, D]``; k_scale: fp32 ``[B, H_kv, n_k]``.
        v: E4M3 ``[B, H_kv, D, n_k * 128]``, transposed, keys in :func:`key_order`, zeros past the end; v_scale: fp32
            ``[B, H_kv, n_k]``.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor


class Fp8Constants(NamedTuple):
    """What calibration knows of a call's keys and values.

    Attributes:
        key_mean: fp32 ``[H_kv, D]``, subtracted from every key.
        key_peak, value_peak: fp32 ``[H_kv]``, largest magnitudes of the keys less their mean and of the values.
    """

    key_mean: Tensor
    key_peak: Tensor
    value_peak: Tensor

    @classmethod
    def unpacked(cls, values: Sequence[float] | Tensor, kv_heads: int, dim: int) -> Fp8Constants:
        """The constants from the numbers that a recipe and the operator carry.

        Args:
            values: :func:`afbs_compile.kernels.call.fp8_constant_count` of them; none: no mean, peaks
                :data:`SMALLEST_PEAK`.
            kv_heads: H_kv; dim: D.
        """
        if not len(values):
            peak = torch.full((kv_heads,), SMALLEST_PEAK)
            return cls(torch.zeros(kv_heads, dim), peak, peak)
        table = torch.as_tensor(values, dtype=torch.float32).view(kv_heads, dim + 2)
        return cls(table[:, :dim], table[:, dim], table[:, dim + 1])

    @classmethod
    def of(cls, operands: Sequence[tuple[Tensor, Tensor]]) -> Fp8Constants:
        """The constants of some keys and values.

        Args:
            operands: k and v ``[B, H_kv, N, D]`` of every sample.
        """
        finite = [(_finite(k.float()), _finite(v.float())) for k, v in operands]
        tokens = sum(k.shape[0] * k.shape[2] for k, _ in finite)
        mean = torch.stack([k.sum((0, 2)) for k, _ in finite]).sum(0) / tokens
        key_peak = torch.stack([(k - mean[:, None]).abs().amax((0, 2, 3)) for k, _ in finite]).amax(0)
        value_peak = torch.stack([v.abs().amax((0, 2, 3)) for _, v in finite]).amax(0)
        return cls(mean, key_peak, value_peak)

    def packed(self) -> tuple[float, ...]:
        """What :meth:`unpacked` takes, six significant digits each."""
        table = torch.cat([self.key_mean, self.key_peak[:, None], self.value_peak[:, None]], 1)
        return tuple(float(f"{value:.6g}") for value in table.flatten().tolist())


@functools.cache  # thousands of numbers, for every call
def no_constants(kv_heads: int, dim: int) -> tuple[float, ...]:
    """The numbers that stand for no constants."""
    return Fp8Constants.unpacked((), kv_heads, dim).packed()


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def key_order(device: torch.device | None = None) -> Tensor:
    """Keys of a block in the order of V's columns: int64 ``[128]``.

    Of every 16 keys: 0, 1, 8, 9, 2, 3, 10, 11, ... The tensor cores return scores to a thread in pairs of columns and
    take FP8 weights from it in fours; in this order a thread has the weights that it must give.
    """
    return torch.arange(BLOCK, device=device).view(-1, 2, 4, 2).transpose(1, 2).flatten()


def _powers(peak: Tensor, largest: int = 0) -> Tensor:
    """The power of two that a peak is divided by to lie in [2^largest, 2^(largest + 1))."""
    exponent = torch.frexp(peak).exponent.clamp(1 - LARGEST_EXPONENT, 1 + LARGEST_EXPONENT) - 1 - largest
    return torch.ldexp(torch.ones_like(peak), exponent)


def _rounded(x: Tensor) -> Tensor:
    """E4M3: to nearest, ties to even, clamped to its largest number; NaN for what is not finite."""
    return torch.where(x.isfinite(), x.clamp(-LARGEST, LARGEST), math.nan).to(torch.float8_e4m3fn)


def _rounded_blocks(x: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor ``[B, H_kv, N, D]`` in fp32 as E4M3 blocks and their scales ``[B, H_kv, n_k]``."""
    first_rows = _finite(x[:, :, ::BLOCK]).abs().amax(-1)
    scale = _powers(torch.maximum(first_rows, peak[:, None].to(x.device)))
    return _rounded(x / scale.repeat_interleave(BLOCK, 2)[:, :, : x.shape[2], None]), scale


def quantise(operands: Operands, constants: Sequence[float]) -> Quantised:
    """Round the operands of a call.

    Args:
        operands: of the call; constants: as in :meth:`Fp8Constants.unpacked`.
    """
    q, k, v = operands.q, operands.k, operands.v
    dim = q.shape[3]
    mean, key_peak, value_peak = Fp8Constants.unpacked(constants, k.shape[1], dim)
    queries = q.float() * (operands.scale * LOG2_E)
    q_scale = _powers(_finite(queries).abs().amax(-1), ROW_EXPONENT)
    missing_q, missing_k = (block_count(n, BLOCK) * BLOCK - n for n in (operands.q_len, operands.k_len))
    keys, k_scale = _rounded_blocks(k.float() - mean.to(k.device)[:, None], key_peak)
    values, v_scale = _rounded_blocks(v.float(), value_peak)
    # Bytes, for E4M3 tensors can be moved about only so far.
    padded = F.pad(values.view(torch.uint8), (0, 0, 0, missing_k))
    by_block = padded.unflatten(2, (-1, BLOCK))[:, :, :, key_order(v.device)].flatten(2, 3)
    turned = by_block.transpose(2, 3).contiguous().view(torch.float8_e4m3fn)
    rounded = _rounded(queries / q_scale[..., None])
    return Quantised(rounded, F.pad(q_scale, (0, missing_q), value=1.0), keys, k_scale, turned, v_scale)


def attend(quantised: Quantised, live: Tensor, seen: Tensor) -> Tensor:
    """Attention over the live blocks, visited in descending order with a running maximum.

    Args:
        quantised: from :func:`quantise`.
        live: bool ``[B, H, n_q, n_k]``, blocks of 128 x 128; at least one visible key for each row.
        seen: bool ``[q_len, k_len]``, what the mask lets a row see.

    Returns:
        fp32 ``[B, H, q_len, D]``.
    """
    q, q_scale, k, k_scale, v, v_scale = quantised
    q_len, k_len, count, groups = q.shape[2], k.shape[2], live.shape[3], q.shape[1] // k.shape[1]
    keys = (k.float() * k_scale.repeat_interleave(BLOCK, 2)[:, :, :k_len, None]).repeat_interleave(groups, 1)
    in_order = v.float().transpose(2, 3).unflatten(2, (-1, BLOCK))[:, :, :, key_order(v.device).argsort()]
    values = (in_order * v_scale[..., None, None]).repeat_interleave(groups, 1)
    scores = (q.float() * q_scale[:, :, :q_len, None]) @ keys.transpose(2, 3)
    allowed = live.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :q_len, :k_len]
    scores = scores.masked_fill(~(allowed & seen), -math.inf)
    peak = scores.new_full(scores.shape[:3], -math.inf)
    total, out = torch.zeros_like(peak), torch.zeros(q.shape, device=q.device)
    for block in reversed(range(count)):
        tile = scores[..., block * BLOCK : (block + 1) * BLOCK]
        higher = torch.maximum(peak, tile.amax(-1))
        base = torch.where(higher == -math.inf, 0.0, higher)
        # l <- l * 2^(m_old - m) + rowsum(2^(s - m)),   o <- o * 2^(m_old - m) + E4M3(2^(s - m)) V
        decay = torch.exp2(peak - base)
        weights = torch.exp2(tile - base[..., None] + WEIGHT_EXPONENT)
        total = total * decay + weights.sum(-1)
        added = _rounded(weights).float() @ values[:, :, block, : tile.shape[-1]]
        # A tile that is not live is not read: NaN in it must not be multiplied by zero.
        used = live[..., block].repeat_interleave(BLOCK, 2)[:, :, :q_len, None]
        out = out * decay[..., None] + torch.where(used, added, 0.0)
        peak = higher
    return out / total[..., None]
