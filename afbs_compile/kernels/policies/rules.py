"""The rules by which tau selects blocks from a policy's scores, in plain PyTorch: the specification of selection.

For a query block that sees ``n`` key blocks with probabilities ``p``:

- ``"mass"``: keep the smallest set of blocks that holds ``tau`` of the probability (SpargeAttn, XAttention).
- ``"share"``: keep block j when ``p_j * n ** (1/4) > (1 - tau) / tau``. A row whose mass is spread over many blocks
  then drops more of it, a row that concentrates it drops less, which keeps the sum of the errors of all rows small for
  the blocks that are computed. The fourth root of n keeps thresholds usable at other lengths: at +1 % of perplexity on
  documentation a 40M Llama's is 0.023, 0.018 and 0.022 at 4K, 16K and 32K tokens. Without a root it halves (0.0097,
  0.0053, 0.0051); with the square root it grows (0.058, 0.060, 0.083), and one point fewer is skipped.
- ``"strength"``: keep block j when its strength exceeds ``(1 - tau) / tau``; nothing is normalised.

In all of them a larger tau keeps more, tau = 0 keeps only what is always kept and tau >= 1 keeps everything.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["mass", "share", "strength"]

ALWAYS = -1.0
"""Level of a block that every tau keeps."""

BELOW_ONE = 1.0 - 2.0**-24
"""The largest level of a visible block: tau = 1 keeps it."""


def softmax(scores: Tensor, candidates: Tensor) -> Tensor:
    """Softmax over the candidates; a row without any is all 0, NaN stays NaN."""
    scores = scores.masked_fill(~candidates, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(peak == -math.inf, 0.0, peak))
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


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
        # strength_j = p_j * n ** (1/4), n the blocks that take part
        return _levels_of_strength(probability * candidates.sum(-1, keepdim=True) ** 0.25)
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


def select_by_mass(probability: Tensor, tau: Tensor) -> Tensor:
    """The rule ``"mass"`` at one tau a head, with less work than :func:`levels`.

    Block ``j`` is kept when the blocks strictly more probable than it hold less than ``tau``:
    ``sum(p_i for p_i > p_j) < tau``. NaN compares false, so a NaN row keeps everything.

    Args:
        probability: ``[B, H, n_q, n_k]`` fp32; tau: ``[H, 1, 1]`` fp32.

    Returns:
        bool ``[B, H, n_q, n_k]``.
    """
    ordered = probability.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    reached = before >= tau
    # The first block that is not needed closes the set; everything as probable as the one before it stays.
    kept = (~reached).sum(-1, keepdim=True)
    threshold = ordered.gather(-1, (kept - 1).clamp_min(0))
    return ~(probability < threshold) & (kept > 0)
