"""``sink_window``: the first block and a window of the latest ones (StreamingLLM, Xiao et al. 2024).

tau maps to the window's extent: ``WINDOW * tau / (1 - tau)`` tokens behind the query block's first row (and ahead of
its last one where that is seen), whatever the length. tau = 0 keeps only what is always kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.base import Policy

WINDOW = 1024
"""Extent in tokens at tau = 0.5."""


class SinkWindow(Policy):
    """Scores by distance; q and k do not matter."""

    name = "sink_window"
    rule = "strength"

    def scores(self, operands: Operands, shape: BlockShape) -> Tensor:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.scores`."""
        grid, device = operands.grid(shape), operands.device
        offset = operands.mask.offset(grid.q_len, grid.k_len)
        first_q = torch.arange(grid.count_q, device=device)[:, None] * shape.q + offset
        first_k = torch.arange(grid.count_k, device=device) * shape.k
        # Tokens between the two blocks' nearest rows, at least 1 for blocks that do not overlap.
        behind, ahead = first_q - (first_k + shape.k - 1), first_k - (first_q + shape.q - 1)
        distance = torch.maximum(behind, ahead).clamp_min(1)
        # strength = WINDOW / distance > (1 - tau) / tau   <=>   distance < WINDOW * tau / (1 - tau)
        strength = math.log(WINDOW) - distance.float().log()
        strength[:, 0] = math.inf
        return strength.expand(*operands.q.shape[:2], -1, -1)
