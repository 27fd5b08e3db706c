"""What kernels are told of masks that are bands, and the sentence for those that are not."""

from __future__ import annotations

from typing import NamedTuple

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands


class KernelBand(NamedTuple):
    """A band (:class:`afbs_compile.kernels.masks.base.Band`) as numbers: ``upper`` means nothing unless ``bounded``."""

    upper: int
    bounded: bool


def told(operands: Operands) -> KernelBand:
    """What kernels are told of the operands' mask.

    Raises:
        ValueError: the mask is no band; engines refuse such a call.
    """
    band = operands.mask.band(operands.q_len, operands.k_len)
    if band is None:
        raise ValueError(refusal(operands))
    return KernelBand(0 if band.upper is None else band.upper, band.upper is not None)


def refusal(operands: Operands) -> str | None:
    """Why a kernel that computes bands does not take the operands' mask, or ``None`` if it does."""
    if operands.mask.band(operands.q_len, operands.k_len) is None:
        return f"mask is {operands.mask}; accepted: masks that are a band about the diagonal"
    return None


def partial_at_most(operands: Operands, shape: BlockShape) -> int:
    """How many partial blocks a query block has at most: those that the bound crosses, or the last one."""
    band = told(operands)
    return shape.q // shape.k + (band.upper % shape.k != 0) if band.bounded else 1
