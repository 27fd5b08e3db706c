"""``meansim``: softmax of the products of block means, with the rule ``"mass"`` (SpargeAttn, Zhang et al. 2025).

It alone has a theta, a threshold on the self-similarity of blocks
(:func:`afbs_compile.kernels.spec.selection.block_levels`).
"""

from __future__ import annotations

from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.base import OnnxBody, Policy
from afbs_compile.kernels.policies.statistics import block_means
from afbs_compile.kernels.sight import adjusted

BLOCK_MEANS = """
BlockMeans (x, valid, size) => (means)
{
    row_axis = Constant <value = int64[1] {-2}> ()
    rows, unused = afbs.InBlocks (x, size)
    sizes = afbs.ValidSizes (valid, size)
    total = ReduceSum <keepdims = 0> (rows, row_axis)
    means = Div (total, sizes)
}
"""

SCORE_BY_MEANS = """
ScoreByMeans (q, k, formula, valid, mask, blurred, bias, scaling, softcap, capped, by_mask, with_bias, size_q, size_k)
    => (scores)
{
    rows_valid = afbs.AllRows (q)
    mean_q = afbs.BlockMeans (q, rows_valid, size_q)
    mean_k = afbs.BlockMeans (k, valid, size_k)
    columns = Transpose <perm = [0, 1, 3, 2]> (mean_k)
    products = MatMul (mean_q, columns)
    scaled = Mul (products, scaling)
    bent = afbs.Capped (scaled, softcap, capped)
    scores = Add (bent, bias)
}
"""


class BlockMeans(Policy):
    """Scores by block means; subclasses say how tau selects."""

    onnx = OnnxBody("ScoreByMeans", (BLOCK_MEANS, SCORE_BY_MEANS))

    def scores(self, operands: Operands, shape: BlockShape) -> Tensor:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.scores`."""
        mean_q, mean_k = block_means(operands.q, shape.q), block_means(operands.k, shape.k, operands.valid)
        # score_ij = scale * <mean of q's rows in i, mean of k's rows in j>
        products = mean_q @ mean_k.repeat_interleave(operands.groups, 1).transpose(-1, -2) * operands.scale
        return adjusted(operands, shape, products)

    def write_scores(
        self, operands: Operands, shape: BlockShape, out: Tensor, *, with_similarity: bool = False
    ) -> Tensor | None:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.write_scores`."""
        from afbs_compile.kernels.policies.triton import means  # Triton is not installed everywhere.

        similarity = means.pooled_scores(operands, shape, out, with_similarity=with_similarity)
        return similarity if self.has_theta else None


class MeanSim(BlockMeans):
    """Scores by block means, kept by mass, with a theta."""

    name = "meansim"
    rule = "mass"
    has_theta = True
    explored = (-1.0, 0.45)
