"""``antidiagonal``: XAttention's score, sums of Q K^T along strided antidiagonals, with the rule ``"mass"``.

Of every 16 x 16 square of Q K^T the products on its antidiagonal are averaged; a softmax over the squares of a row of
squares gives each its mass (Xu et al., "XAttention", 2025, Algorithm 1, stride 16). The diagonal squares take part
whole, as there: a query group sees its own 16 keys.
"""

from __future__ import annotations

from torch import Tensor

from afbs_compile.kernels.policies.features import GROUP, Features
from afbs_compile.kernels.policies.grouped import GroupedPolicy


class Antidiagonal(GroupedPolicy):
    """Scores by strided antidiagonals."""

    name = "antidiagonal"
    rule = "mass"

    def features(self, q: Tensor, k: Tensor, scale: float) -> Features:
        """The tokens themselves: the t-th key of a group meets the t-th last query."""
        # logit_ab = scale / S * sum_t <q[a S + S - 1 - t], k[b S + t]>
        return Features(q, k, scale / GROUP, parts=GROUP, reverse=True, span=GROUP, last=GROUP - 1)
