"""``sampled``: the exact mass that one row of 16 gives each block, and what ``cumulant`` says of all rows, averaged.

A sampled row knows exactly where it looks, and nothing of the 15 rows about it; ``cumulant`` knows all rows, and keys
only by their means and variances. They err in different places: at +1 % of perplexity of a 40M Llama and 8,192 tokens
either alone skips 80 to 82 % of the blocks, their mean 84 %, of the 87 % that the true mass skips
(``benchmarks/frontier.py``). The rule is ``"share"``.
"""

from __future__ import annotations

from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.base import OnnxBody, Policy
from afbs_compile.kernels.policies.cumulant import CUMULANT_MASS, GROUP_MOMENTS, Cumulant
from afbs_compile.kernels.policies.features import first_rows
from afbs_compile.kernels.policies.grouped import BLOCK_MASS, block_mass

SCORE_BY_SAMPLES = """
ScoreBySamples (q, k, formula, valid, mask, blurred, bias, scaling, softcap, capped, by_mask, with_bias, size_q,
    size_k) => (scores)
{
    # logit_ab = scale <q[16 a], k[b]>, and that of CumulantMass
    two = Constant <value = float {2}> ()
    start = Constant <value = int64[1] {0}> ()
    row_axis = Constant <value = int64[1] {2}> ()
    group1 = Constant <value = int64[1] {16}> ()
    q_len1 = Shape <start = 2, end = 3> (q)
    q_len = Squeeze (q_len1)
    samples = Slice (q, start, q_len1, row_axis, group1)
    exact = afbs.BlockMass <span = 1, last = 0>
        (samples, k, scaling, q_len, formula, valid, mask, blurred, softcap, capped, by_mask, with_bias, size_q, size_k)
    estimated = afbs.CumulantMass
        (q, k, formula, valid, mask, blurred, scaling, softcap, capped, by_mask, with_bias, size_q, size_k)
    both = Add (exact, estimated)
    mass = Div (both, two)
    scores = Log (mass)
}
"""


class Sampled(Policy):
    """Scores by sampled rows and by means and variances of groups of tokens."""

    name = "sampled"
    rule = "share"
    explored = (-1.0,)
    onnx = OnnxBody("ScoreBySamples", (BLOCK_MASS, GROUP_MOMENTS, CUMULANT_MASS, SCORE_BY_SAMPLES))

    _estimate = Cumulant()

    def scores(self, operands: Operands, shape: BlockShape) -> Tensor:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.scores`."""
        exact = block_mass(first_rows(operands), operands, shape)
        return ((exact + block_mass(self._estimate.features(operands), operands, shape)) / 2).log()

    def write_scores(
        self, operands: Operands, shape: BlockShape, out: Tensor, *, with_similarity: bool = False
    ) -> Tensor | None:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.write_scores`."""
        from afbs_compile.kernels.policies.triton import grouped  # Triton is not installed everywhere.

        if operands.mask.band(operands.q_len, operands.k_len) is None:
            return super().write_scores(operands, shape, out)
        self._estimate.write_scores(operands, shape, out)
        grouped.write_log_mass(first_rows(operands), operands, shape, out, averaged=True)
        return None
