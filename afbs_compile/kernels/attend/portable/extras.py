"""What the portable kernels are told of a call beside q, k, v and the lists."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.masks.band import as_band
from afbs_compile.kernels.masks.band_triton import BOUNDED, form
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.attention import LOG2_E


class Extras(NamedTuple):
    """Operands and constants; a tensor that a kernel does not read is any other one.

    Attributes:
        valid, mask, sinks: tensors to read; ``valid`` and a bool mask as bytes.
        upper, width: of the band; natural: the softmax scale; softcap: any number where nothing is capped.
        scale: what turns scores, as the kernel compares them, into log2 units.
        strides: of ``valid`` the batch's, of ``mask`` all four.
        form, has_valid, has_mask, capped, has_sinks, changed: what :mod:`.kernel` calls FORM, VALID, MASK, CAPPED,
            SINKS and CHANGED. blind: whether a row may see nothing.
    """

    valid: Tensor
    mask: Tensor
    sinks: Tensor
    upper: int
    width: int
    natural: float
    softcap: float
    scale: float
    strides: tuple[int, int, int, int, int]
    form: int
    has_valid: bool
    has_mask: int
    capped: bool
    has_sinks: bool
    changed: bool
    blind: bool

    @classmethod
    def of(cls, operands: Operands, unread: Tensor) -> Extras:
        """What kernels are told of operands with a positive scale; ``unread`` stands for what is not there."""
        band, valid, mask, sinks = as_band(operands), operands.valid, operands.attn_mask, operands.sinks
        changed = not operands.is_plain
        strides = (0, 0, 0, 0, 0)
        if valid is not None:
            strides = (valid.stride(0), *strides[1:])
        if mask is not None:
            # A dimension of one element is read again and again.
            steps = (0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
            strides = (strides[0], *steps)  # type: ignore[assignment]
        plain = form(band) <= BOUNDED and operands.by_formula and operands.offset >= 0
        return cls(
            unread if valid is None else _bytes(valid),
            unread if mask is None else _bytes(mask),
            unread if sinks is None else sinks.contiguous(),
            band.upper,
            max(band.width, 1),
            operands.scale,
            operands.softcap or 1.0,
            LOG2_E if changed else operands.scale * LOG2_E,
            strides,
            form(band),
            valid is not None,
            0 if mask is None else 2 if operands.has_bias else 1,
            operands.softcap > 0,
            sinks is not None,
            changed,
            not plain,
        )


def _bytes(x: Tensor) -> Tensor:
    x = x if x.stride(-1) == 1 or x.dim() > 2 else x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x
