"""``vertical_slash``: columns and diagonals that sampled rows attend (MInference, Jiang et al. 2024), rule ``"mass"``.

MInference takes the last 64 queries of the prompt, finds the key columns ("vertical") and the distances ("slash") that
hold most of their attention, and gives all earlier rows the same ones. There the end of the prompt decides which blocks
its beginning attends: a leak of the future. Here each query block looks at rows that it may know: its own and those of
the query block before it. Of every 16 rows one, the first, is probed with the exact softmax over all keys it sees.

    p_ij = A_ij + (A_{i-1, j} + A_{i-1, j-m}) / 2,    normalised over the visible j,

where ``A_ij`` is the mass that the probed rows of query block i give to key block j, ``A_{i-1, j}`` is what the block
before saw in the same column, ``A_{i-1, j-m}`` what it saw at the same distance (m = block_q / block_k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.features import GROUP, Features
from afbs_compile.kernels.policies.grouped import GroupedPolicy, block_mass


class VerticalSlash(GroupedPolicy):
    """Scores by the columns and distances that probed rows attend."""

    name = "vertical_slash"
    rule = "mass"

    def features(self, q: Tensor, k: Tensor, scale: float) -> Features:
        """The first query of every group against every key."""
        return Features(q[:, :, ::GROUP], k, scale, parts=1, reverse=False, span=1, last=0)

    def scores(self, operands: Operands, shape: BlockShape) -> Tensor:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.scores`."""
        mass = block_mass(self.features(operands.q, operands.k, operands.scale), operands, shape)
        return with_previous(mass, shape.q // shape.k).log()

    def write_scores(
        self, operands: Operands, shape: BlockShape, out: Tensor, *, with_similarity: bool = False
    ) -> Tensor | None:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.write_scores`."""
        super().write_scores(operands, shape, out)
        scores = out.view(torch.float32)
        scores.copy_(with_previous(scores.exp(), shape.q // shape.k)).log_()
        return None


def with_previous(mass: Tensor, step: int) -> Tensor:
    """Add half of what the query block before saw in the same column, and half of what it saw at the same distance.

    Args:
        mass: fp32 ``[..., n_q, n_k]``, 0 where a block is not visible.
        step: key blocks per query block.
    """
    before = mass[..., :-1, :]
    total = mass.clone()
    total[..., 1:, :].add_(before, alpha=0.5)
    total[..., 1:, step:].add_(before[..., :-step], alpha=0.5)
    return total
