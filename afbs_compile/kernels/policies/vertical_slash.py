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
from afbs_compile.kernels.policies.base import OnnxBody
from afbs_compile.kernels.policies.features import Features, first_rows
from afbs_compile.kernels.policies.grouped import BLOCK_MASS, GroupedPolicy, block_mass

WITH_PREVIOUS = """
WithPrevious (mass, step) => (total)
{
    # plus half of what the query block before saw in the same column, and half of what it saw at the same distance
    half = Constant <value = float {0.5}> ()
    one1 = Constant <value = int64[1] {1}> ()
    starts = Constant <value = int64[2] {0, 0}> ()
    axes = Constant <value = int64[2] {2, 3}> ()
    no_start = Constant <value = int64[2] {0, 0}> ()
    no_end = Constant <value = int64[4] {0, 0, 0, 0}> ()
    zero1 = Constant <value = int64[1] {0}> ()
    step1 = Reshape (step, one1)
    counts = Shape <start = 2, end = 4> (mass)
    half_mass = Mul (mass, half)
    down = Concat <axis = 0> (no_start, one1, zero1, no_end)
    column_padded = Pad (half_mass, down)
    same_column = Slice (column_padded, starts, counts, axes)
    down_and_right = Concat <axis = 0> (no_start, one1, step1, no_end)
    slash_padded = Pad (half_mass, down_and_right)
    same_distance = Slice (slash_padded, starts, counts, axes)
    with_column = Add (mass, same_column)
    total = Add (with_column, same_distance)
}
"""

SCORE_BY_SLASH = """
ScoreBySlash (q, k, formula, valid, mask, blurred, bias, scaling, softcap, capped, by_mask, with_bias, size_q, size_k)
    => (scores)
{
    # the first query of every group against every key that it sees
    start = Constant <value = int64[1] {0}> ()
    row_axis = Constant <value = int64[1] {2}> ()
    group1 = Constant <value = int64[1] {16}> ()
    step = Div (size_q, size_k)
    q_len1 = Shape <start = 2, end = 3> (q)
    q_len = Squeeze (q_len1)
    rows = Slice (q, start, q_len1, row_axis, group1)
    mass = afbs.BlockMass <span = 1, last = 0>
        (rows, k, scaling, q_len, formula, valid, mask, blurred, softcap, capped, by_mask, with_bias, size_q, size_k)
    total = afbs.WithPrevious (mass, step)
    scores = Log (total)
}
"""


class VerticalSlash(GroupedPolicy):
    """Scores by the columns and distances that probed rows attend."""

    name = "vertical_slash"
    rule = "mass"
    onnx = OnnxBody("ScoreBySlash", (BLOCK_MASS, WITH_PREVIOUS, SCORE_BY_SLASH))

    def features(self, operands: Operands) -> Features:
        """See :func:`~afbs_compile.kernels.policies.features.first_rows`."""
        return first_rows(operands)

    def scores(self, operands: Operands, shape: BlockShape) -> Tensor:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.scores`."""
        mass = block_mass(self.features(operands), operands, shape)
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
