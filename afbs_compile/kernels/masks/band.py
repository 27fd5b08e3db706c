"""What kernels are told of masks that are bands, and the sentence for those that are not."""

from __future__ import annotations

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.masks.base import Band
from afbs_compile.kernels.operands import Operands

FREE, BOUNDED, WINDOW, CHUNK = range(4)
"""Forms of a band: every key is seen; those up to ``row + upper``; of these the last ``width``; those of one chunk."""


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


def form(band: Band) -> int:
    """Which of :data:`FREE`, :data:`BOUNDED`, :data:`WINDOW` and :data:`CHUNK` a band is: kernels compile for each."""
    if not band.bounded:
        return FREE
    if band.width == 0:
        return BOUNDED
    return CHUNK if band.chunked else WINDOW


def is_simple(operands: Operands, shape: BlockShape) -> bool:
    """Whether positions alone say what kernels need to know, as of causal and full masks.

    Then nothing but the band hides keys, no block is blurred, and every row sees a key of a block that is always kept.
    """
    band = told(operands)
    if not operands.by_formula or band.width:
        return False
    if not band.bounded:
        return True
    return band.upper == operands.offset and band.upper >= 0 and not _blurs(operands, shape, band.upper)


def _blurs(operands: Operands, shape: BlockShape, upper: int) -> bool:
    """Whether some query block sees a key block in part: its last row stops short of the block's last key."""
    last = operands.q_len + upper  # the keys that the last row sees
    within = shape.q + upper  # those that the last row of the first query block sees
    inner = operands.q_len > shape.q and within < operands.k_len and upper % shape.k != 0
    return inner or (last < operands.k_len and last % shape.k != 0)


def partial_at_most(operands: Operands, shape: BlockShape) -> int:
    """How many partial blocks a query block has at most: those that an edge crosses, or the last one."""
    band, count_k, per_q = told(operands), operands.grid(shape).count_k, shape.q // shape.k
    if not operands.by_formula:
        return count_k
    if not band.bounded:
        return 1
    ahead = per_q + (band.upper % shape.k != 0)
    if band.width == 0:
        return ahead
    if not band.chunked:
        return min(count_k, ahead + per_q + ((band.upper - band.width + 1) % shape.k > 1))
    if band.width % shape.q == 0 and band.upper % shape.q == 0:
        return min(count_k, ahead)
    # The rows of a query block are in several chunks, and none of these is seen by all of them.
    return min(count_k, (band.width + shape.q) // shape.k + 2)
