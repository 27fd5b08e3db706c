"""``meansim``: softmax of the products of block means, with the rule ``"mass"`` (SpargeAttn, Zhang et al. 2025).

Its self-similarity threshold theta is not a score: :func:`afbs_compile.kernels.reference.predict_mask` applies it.
"""

from __future__ import annotations

from torch import Tensor

from afbs_compile.kernels import reference
from afbs_compile.kernels.policies.base import Rule


class MeanSim:
    """Scores by block means."""

    name = "meansim"
    rule: Rule = "mass"

    def scores(self, q: Tensor, k: Tensor, *, causal: bool, scale: float, block_q: int, block_k: int) -> Tensor:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.scores`."""
        mean_q, _ = reference.block_statistics(q, block_q)
        mean_k, _ = reference.block_statistics(k, block_k)
        groups = q.shape[1] // k.shape[1]
        # score_ij = scale * <mean of q's rows in i, mean of k's rows in j>
        return mean_q @ mean_k.repeat_interleave(groups, 1).transpose(-1, -2) * scale

    def write_scores(
        self, q: Tensor, k: Tensor, out: Tensor, *, causal: bool, scale: float, block_q: int, block_k: int
    ) -> None:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.write_scores`."""
        from afbs_compile.kernels import predict_triton  # Triton is not installed everywhere.

        predict_triton.pooled_scores(
            q, k, out, has_theta=False, causal=causal, scale=scale, block_q=block_q, block_k=block_k
        )
