"""What kernels are told of masks that are bands, and the sentence for those that are not."""

from __future__ import annotations

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.masks.base import Band
from afbs_compile.kernels.operands import Operands


def told(operands: Operands) -> Band:
    """What kernels are told of the operands' mask.

    Raises:
        ValueError: the mask is no band; engines refuse such a call.
    """
    band = operands.mask.band(operands.q_len, operands.k_len)
    if band is None:
        raise ValueError(refusal(operands))
    return band


def refusal(operands: Operands) -> str | None:
    """Why a kernel that computes bands does not take the operands' mask, or ``None`` if it does."""
    if operands.mask.band(operands.q_len, operands.k_len) is None:
        return f"mask is {operands.mask}; accepted: masks that are a band about the diagonal"
    return None


def partial_at_most(operands: Operands, shape: BlockShape) -> int:
    """How many partial blocks a query block has at most: those that the bound crosses, or the last one."""
    band = told(operands)
    return shape.q // shape.k + (band.upper % shape.k != 0) if band.bounded else 1
