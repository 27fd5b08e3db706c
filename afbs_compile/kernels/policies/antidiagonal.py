"""``antidiagonal``: XAttention's score, sums of Q K^T along strided antidiagonals, with the rule ``"mass"``.

Of every 16 x 16 square of Q K^T the products on its antidiagonal are averaged; a softmax over the squares of a row of
squares gives each its mass (Xu et al., "XAttention", 2025, Algorithm 1, stride 16). The diagonal squares take part
whole, as there: a query group sees its own 16 keys.
"""

from __future__ import annotations

from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.base import OnnxBody
from afbs_compile.kernels.policies.features import GROUP, Features
from afbs_compile.kernels.policies.grouped import BLOCK_MASS, GroupedPolicy

SCORE_BY_ANTIDIAGONAL = """
ScoreByAntidiagonal (q, k, formula, valid, mask, blurred, bias, scaling, softcap, capped, by_mask, with_bias, size_q,
    size_k) => (scores)
{
    # logit_ab = scale / 16 * sum_t <q[a 16 + 15 - t], k[b 16 + t]>
    group = Constant <value = int64 {16}> ()
    group_float = Constant <value = float {16}> ()
    backwards = Constant <value = int64[16] {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}> ()
    same = Constant <value = int64[3] {0, 0, 0}> ()
    group1 = Constant <value = int64[1] {16}> ()
    dim1 = Shape <start = 3, end = 4> (q)
    features1 = Mul (dim1, group1)
    shape = Concat <axis = 0> (same, features1)
    scaled_down = Div (scaling, group_float)
    q_len1 = Shape <start = 2, end = 3> (q)
    q_len = Squeeze (q_len1)
    q_groups, sizes_q = afbs.InBlocks (q, group)
    k_groups, sizes_k = afbs.InBlocks (k, group)
    q_reversed = Gather <axis = 3> (q_groups, backwards)
    rows = Reshape (q_reversed, shape)
    cols = Reshape (k_groups, shape)
    mass = afbs.BlockMass <span = 16, last = 15>
        (rows, cols, scaled_down, q_len, formula, valid, mask, blurred, softcap, capped, by_mask, with_bias, size_q,
        size_k)
    scores = Log (mass)
}
"""


class Antidiagonal(GroupedPolicy):
    """Scores by strided antidiagonals."""

    name = "antidiagonal"
    rule = "mass"
    onnx = OnnxBody("ScoreByAntidiagonal", (BLOCK_MASS, SCORE_BY_ANTIDIAGONAL))

    def features(self, operands: Operands) -> Features:
        """The tokens themselves: the t-th key of a group meets the t-th last query; keys that are not valid are 0."""
        # logit_ab = scale / S * sum_t <q[a S + S - 1 - t], k[b S + t]>
        keys, valid = operands.k, operands.valid
        keys = keys if valid is None else keys.masked_fill(~valid[:, None, :, None], 0.0)
        return Features(operands.q, keys, operands.scale / GROUP, parts=GROUP, reverse=True, span=GROUP, last=GROUP - 1)
