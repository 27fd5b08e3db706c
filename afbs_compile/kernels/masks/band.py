"""What kernels are told of masks that are bands, and the sentences for what they do not take."""

from __future__ import annotations

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.masks.base import Band
from afbs_compile.kernels.operands import Operands


def told(operands: Operands) -> Band:
    """What kernels are told of the operands' mask.

    Raises:
        ValueError: it is not all by a band, or not by one that starts at the first key; engines refuse such a call.
    """
    reason = refusal(operands)
    band = operands.mask.band(operands.q_len, operands.k_len)
    if reason is not None or band is None:
        raise ValueError(reason)
    return band


def as_band(operands: Operands) -> Band:
    """The operands' formula as a band, whatever else hides keys.

    Raises:
        ValueError: it is none; engines refuse such a call.
    """
    band = operands.mask.band(operands.q_len, operands.k_len)
    if band is None:
        raise ValueError(band_refusal(operands))
    return band


def band_refusal(operands: Operands) -> str | None:
    """Why a kernel of any band does not take the operands' formula, or ``None`` if it does."""
    if operands.mask.band(operands.q_len, operands.k_len) is None:
        return f"mask is {operands.mask}; accepted: masks that are a band about the diagonal"
    return None


def extras_refusal(operands: Operands, *, takes_valid: bool) -> str | None:
    """Why a kernel of any band, and of valid keys maybe, does not take the operands, or ``None`` if it does."""
    names = ("attn_mask", "sinks") if takes_valid else ("valid", "attn_mask", "sinks")
    given = [name for name in names if getattr(operands, name) is not None]
    if operands.softcap:
        given.append("softcap")
    if given:
        return f"{', '.join(given)} given; accepted: calls without"
    return band_refusal(operands)


def refusal(operands: Operands) -> str | None:
    """Why a kernel of nothing but one bound does not take the operands, or ``None`` if it does."""
    if (reason := extras_refusal(operands, takes_valid=False)) is not None:
        return reason
    band = as_band(operands)
    if band.width:
        return f"mask is {operands.mask}; accepted: bands that start at the first key"
    if band.bounded and band.upper < 0:
        return f"mask is {operands.mask} over {operands.q_len} rows and {operands.k_len} keys; accepted: as many keys"
    return None


def selection_refusal(operands: Operands, shape: BlockShape) -> str | None:
    """Why kernels that select blocks by the positions of a band do not take the operands, or ``None`` if they do."""
    if (reason := refusal(operands)) is not None:
        return reason
    offset = operands.offset
    if operands.mask.local and offset % shape.k:
        return f"row 0 is at key {offset}; accepted: a multiple of {shape.k}, or blocks hold keys that no row sees"
    if offset + operands.q_len > operands.k_len:
        return f"{operands.q_len} rows over {operands.k_len} keys; accepted: rows that have keys of their own"
    if not seen_by_blocks(operands, shape):
        return f"{operands.q_len} rows over {operands.k_len} keys; accepted: rows that see all keys of their last block"
    return None


def seen_by_blocks(operands: Operands, shape: BlockShape) -> bool:
    """Whether every key of a visible block is seen by some row of the query block, and every row sees a key."""
    band = as_band(operands)
    if not operands.by_formula or band.width:
        return False
    # The last row of a query block must see the end of the last key block that any of its rows reaches.
    end = operands.q_len + band.upper
    reaches_the_end = end >= operands.k_len or end % shape.k == 0
    return not band.bounded or (band.upper >= 0 and band.upper % shape.k == 0 and reaches_the_end)


def partial_at_most(operands: Operands, shape: BlockShape) -> int:
    """How many partial blocks a query block has at most, of what :func:`seen_by_blocks` holds for.

    Those that the bound crosses, or the last one.
    """
    band = as_band(operands)
    return shape.q // shape.k + (band.upper % shape.k != 0) if band.bounded else 1
