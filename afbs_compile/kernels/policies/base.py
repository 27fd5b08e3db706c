"""What a policy is: a score for every (query block, key block), and the rule by which tau selects.

Rules, for a query block that sees ``n`` key blocks with probabilities ``p``:

- ``"mass"``: keep the smallest set of blocks that holds ``tau`` of the probability (SpargeAttn, XAttention).
- ``"share"``: keep block j when ``p_j * sqrt(n) > (1 - tau) / tau``. A row whose mass is spread over many blocks then
  drops more of it, a row that concentrates it drops less, which is what keeps the sum of the errors of all rows small
  for the blocks that are computed; the root of n keeps thresholds usable at lengths other than the calibrated one.
- ``"strength"``: keep block j when its strength exceeds ``(1 - tau) / tau``; nothing is normalised.

In all of them a larger tau keeps more, tau = 0 keeps only what is always kept (the diagonal blocks and those of
:class:`afbs_compile.kernels.reference.Kept`) and tau >= 1 keeps everything.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

Rule = Literal["mass", "share", "strength"]

ALWAYS = -1.0
"""Level of a block that every tau keeps."""

BELOW_ONE = 1.0 - 2.0**-24
"""The largest level of a visible block: tau = 1 keeps it."""


class Policy(Protocol):
    """One policy.

    Attributes:
        name: what recipes and graphs call it.
        rule: how tau selects.
    """

    name: str
    rule: Rule

    def scores(self, q: Tensor, k: Tensor, *, causal: bool, scale: float, block_q: int, block_k: int) -> Tensor:
        """Score every block, in plain PyTorch: the specification.

        Causality: the row of a query block depends on no token after it.

        Args:
            q: ``[B, H, N, D]``; k: ``[B, H_kv, N, D]``.
            causal: whether row r attends keys 0..r only.
            scale: softmax scale.
            block_q, block_k: rows per block.

        Returns:
            fp32 ``[B, H, n_q, n_k]``: the logarithm of the probability, up to a constant per row (of the strength, as
            it is, where that is the rule). Entries of blocks that are not visible are unspecified. A row with NaN
            keeps every block.
        """
        ...

    def write_scores(
        self, q: Tensor, k: Tensor, out: Tensor, *, causal: bool, scale: float, block_q: int, block_k: int
    ) -> None:
        """Compute :meth:`scores` on the GPU, deterministically, without a tensor of N x N and without waiting for it.

        Args:
            q, k, causal, scale, block_q, block_k: as in :meth:`scores`.
            out: int32 ``[B, H, n_q, n_k]``, contiguous; gets the bits of the fp32 scores.
        """
        ...


def levels(scores: Tensor, rule: Rule, candidates: Tensor) -> Tensor:
    """The tau from which each block is live: it is when its level lies below tau.

    Args:
        scores: fp32 ``[B, H, n_q, n_k]``, what :meth:`Policy.scores` returns.
        rule: of the policy.
        candidates: bool, broadcastable to the scores: the blocks that take part.

    Returns:
        fp32 like the scores, in [0, 1); :data:`ALWAYS` in rows with NaN. Of blocks that take no part: unspecified.
    """
    if rule == "strength":
        return _levels_of_strength(scores.masked_fill(~candidates, -math.inf).exp())
    probability = softmax(scores, candidates)
    if rule == "share":
        # strength_j = p_j * sqrt(n), n the blocks that take part
        return _levels_of_strength(probability * candidates.sum(-1, keepdim=True).sqrt())
    ordered, block = probability.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    # Equal blocks stay or go together: all of them have the level of the first.
    first = torch.nn.functional.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)
    level = torch.where(first, before, 0.0).cummax(-1).values.clamp(0.0, BELOW_ONE)
    level = torch.empty_like(level).scatter_(-1, block, level)
    return torch.where(probability.isnan().any(-1, keepdim=True), ALWAYS, level)


def _levels_of_strength(strength: Tensor) -> Tensor:
    # s > (1 - tau) / tau   <=>   tau > 1 / (1 + s)
    level = (1.0 / (1.0 + strength)).clamp_max(BELOW_ONE)
    return torch.where(strength.isnan().any(-1, keepdim=True), ALWAYS, level)


def softmax(scores: Tensor, candidates: Tensor) -> Tensor:
    """Softmax over the candidates; a row without any is all 0, NaN stays NaN."""
    scores = scores.masked_fill(~candidates, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(peak == -math.inf, 0.0, peak))
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
