"""``meanshare``: the scores of ``meansim`` with the rule ``"share"``; as cheap, and sparser at the same error.

``benchmarks/across_text.py`` compares the rules.
"""

from __future__ import annotations

from afbs_compile.kernels.policies.meansim import BlockMeans


class MeanShare(BlockMeans):
    """Scores by block means, kept by their share of the row."""

    name = "meanshare"
    rule = "share"
    explored = (-1.0,)
