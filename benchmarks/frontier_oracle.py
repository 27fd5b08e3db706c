"""Selection by the true attention mass of every block, which no predictor can know better."""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.rules import Rule, levels
from afbs_compile.kernels.spec.selection import kept_blocks
from afbs_compile.tuner import measure


class Oracle:
    """Keeps the blocks whose true mass the rule keeps at one threshold, and those that calibration always keeps.

    Args:
        rule: ``"share"``: a block's strength must exceed the threshold; ``"mass"``: the smallest set of blocks that
            holds ``1 - threshold``.
        shape: of the blocks.
        threshold: above 0.
    """

    def __init__(self, rule: Rule, shape: BlockShape, threshold: float) -> None:
        self._rule, self._shape = rule, shape
        self._tau = 1 - threshold if rule == "mass" else 1 / (1 + threshold)
        self._sparsities: list[float] = []

    @property
    def sparsity(self) -> float:
        """Mean over the heads and texts so far."""
        return mean(self._sparsities)

    def __call__(self, name: str, operands: Operands) -> Tensor:
        """A site's output ``[B, H, N, D]``."""
        heads = range(operands.heads)  # one N x N matrix at a time
        return torch.cat([self._attend(operands.taken([head])) for head in heads], 1)

    def _attend(self, operands: Operands) -> Tensor:
        q, k, v, device = operands.q, operands.k, operands.v, operands.device
        grid, (block_q, block_k) = operands.grid(self._shape), self._shape.rows
        rows, keys = grid.count_q * block_q - operands.q_len, grid.count_k * block_k - operands.k_len
        seen = operands.mask.matrix(operands.q_len, operands.k_len, device)
        scores = ((q.float() @ k.float().transpose(-1, -2)) * operands.scale).masked_fill_(~seen, -torch.inf)
        probability = torch.nn.functional.pad(scores.softmax(-1), (0, keys, 0, rows))
        mass = probability.unflatten(-1, (-1, block_k)).sum(-1).unflatten(-2, (-1, block_q)).mean(-2)
        mass = mass / mass.sum(-1, keepdim=True)
        visible = operands.mask.visibility(grid, device).visible
        kept = kept_blocks(operands, self._shape, measure.kept_for(operands))[0, 0]
        live = ((levels(mass.log(), self._rule, visible) < self._tau) | kept) & visible
        self._sparsities.append(1 - float(live.sum() / visible.sum() / len(live)))
        allowed = live.repeat_interleave(block_k, -1).repeat_interleave(block_q, -2)
        allowed = allowed[..., : operands.q_len, : operands.k_len] & seen
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed, scale=operands.scale)
