"""The kinds of mask by name, and masks from their text: ``"causal"``, or ``"kind(1,2)"`` where there are parameters."""

from __future__ import annotations

import functools
import re

from afbs_compile.errors import shown
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.causal import Causal, CausalEnd
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.masks.window import Around, Chunk, Window

MASKS: dict[str, type[Mask]] = {kind.name: kind for kind in (Full, Causal, CausalEnd, Window, Chunk, Around)}
"""To add a kind, write it in a file of its own and name it here; code outside the package adds an entry."""


PARAMETER = re.compile(r"-?\d{1,10}")
"""No length has more digits."""


@functools.lru_cache(maxsize=64)
def mask_of(text: str) -> Mask:
    """The mask that :func:`str` writes as ``text``.

    Raises:
        ValueError: there is no such mask.
    """
    kind, _, parameters = text.partition("(")
    try:
        mask = MASKS[kind](*map(int, PARAMETER.findall(parameters)))
    except (KeyError, TypeError):
        mask = None
    if mask is None or str(mask) != text:
        raise ValueError(f"mask is {shown(text)}; accepted: {', '.join(MASKS)}")
    return mask
