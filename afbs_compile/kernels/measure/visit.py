"""The order in which a pass visits key blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.policies.rules import ALWAYS


class Visit(NamedTuple):
    """The order in which ``m`` query blocks visit their key blocks.

    Attributes:
        order: int32 ``[H, m, n_k]``; blocks that are always kept first, and of these the partial ones, then by score.
        level: fp32 ``[H, m, n_k]``, ascending: the block is live at every tau above it. Negative for blocks that are
            always kept, infinite for invisible ones.
        partial: bool ``[H or 1, m, n_k]``, by block: those that need a mask.
        first: int32 ``[H or 1, m]``, how many of the first blocks are partial.
    """

    order: Tensor
    level: Tensor
    partial: Tensor
    first: Tensor


def visit_order(level: Tensor, partial: Tensor, always: Tensor) -> Visit:
    """Sort key blocks by the tau from which they are live.

    Args:
        level: fp32 ``[H, m, n_k]``, as :func:`afbs_compile.kernels.measure.levels.levels_of` gives them.
        partial: bool ``[H or 1, m, n_k]``, visible blocks that are not whole; always: likewise, those that every tau
            keeps.
    """
    leading = partial & always
    ascending = level.masked_fill(leading & (level < math.inf), ALWAYS - 1).sort(dim=-1, stable=True)
    first = leading.sum(-1, dtype=torch.int32)
    return Visit(ascending.indices.int(), ascending.values, partial, first)
