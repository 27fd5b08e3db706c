"""``sink_window``: the first block and a window of the latest ones (StreamingLLM, Xiao et al. 2024).

tau maps to the window's extent: ``WINDOW * tau / (1 - tau)`` tokens behind the query block's first row (and ahead of
its last one where attention is not causal), whatever the length. tau = 0 keeps only what is always kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afbs_compile.kernels.policies.base import Rule
from afbs_compile.kernels.reference import block_count

WINDOW = 1024
"""Extent in tokens at tau = 0.5."""


class SinkWindow:
    """Scores by distance; q and k do not matter."""

    name = "sink_window"
    rule: Rule = "strength"

    def scores(self, q: Tensor, k: Tensor, *, causal: bool, scale: float, block_q: int, block_k: int) -> Tensor:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.scores`."""
        count_q, count_k = block_count(q.shape[2], block_q), block_count(q.shape[2], block_k)
        first_q = torch.arange(count_q, device=q.device)[:, None] * block_q
        first_k = torch.arange(count_k, device=q.device) * block_k
        # Tokens between the two blocks' nearest rows, at least 1 for blocks that do not overlap.
        behind, ahead = first_q - (first_k + block_k - 1), first_k - (first_q + block_q - 1)
        distance = torch.maximum(behind, ahead).clamp_min(1)
        # strength = WINDOW / distance > (1 - tau) / tau   <=>   distance < WINDOW * tau / (1 - tau)
        strength = math.log(WINDOW) - distance.float().log()
        strength[:, 0] = math.inf
        return strength.expand(*q.shape[:2], -1, -1)

    def write_scores(
        self, q: Tensor, k: Tensor, out: Tensor, *, causal: bool, scale: float, block_q: int, block_k: int
    ) -> None:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.write_scores`."""
        scores = self.scores(q, k, causal=causal, scale=scale, block_q=block_q, block_k=block_k)
        out.view(torch.float32).copy_(scores)
