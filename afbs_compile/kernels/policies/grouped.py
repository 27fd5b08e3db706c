"""Scores from a coarser attention: groups of query tokens against groups of key tokens, summed into blocks.

A group of query tokens takes a softmax over the groups of keys that it may see; the mass that falls into a key block,
averaged over the query groups of a query block, is that block's probability. Policies differ in the features whose
products are the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.policies.base import Rule
from afbs_compile.kernels.reference import block_count

GROUP = 16
"""Query tokens of a group; every block is a multiple of it."""

LOGITS_AT_ONCE = 1 << 24
"""Elements of the coarse attention that the PyTorch version holds at a time, per batch element and head group."""


@dataclass(frozen=True)
class Features:
    """What the logits are made of.

    The logit of query group a and key group b is ``scale * sum_t <q[a * parts + t'], k[b * parts + t]>`` over the
    ``parts`` rows of each, with ``t' = parts - 1 - t`` where ``reverse``, else t. Rows past the end are zeros.

    Attributes:
        q: ``[B, H, rows, D]``; k: ``[B, H_kv, rows', D]``, same dtype, any strides.
        parts: feature rows of a group.
        reverse: whether the rows of a query group are taken backwards.
        span: key tokens of a key group.
        last: the last token of a query group that decides what the group sees: key group b is seen by query group a
            when ``b * span <= a * GROUP + last``.
    """

    q: Tensor
    k: Tensor
    scale: float
    parts: int
    reverse: bool
    span: int
    last: int


class GroupedPolicy:
    """Base of the policies of this kind: subclasses make the features."""

    name: str
    rule: Rule

    def features(self, q: Tensor, k: Tensor, scale: float) -> Features:
        """The features of ``q [B, H, N, D]`` and ``k [B, H_kv, N, D]``; of a token's own group only."""
        raise NotImplementedError

    def features_on_gpu(self, q: Tensor, k: Tensor, scale: float) -> Features:
        """The same without large temporary tensors."""
        return self.features(q, k, scale)

    def scores(self, q: Tensor, k: Tensor, *, causal: bool, scale: float, block_q: int, block_k: int) -> Tensor:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.scores`."""
        features = self.features(q, k, scale)
        return block_mass(features, q.shape[2], causal=causal, block_q=block_q, block_k=block_k).log()

    def write_scores(
        self, q: Tensor, k: Tensor, out: Tensor, *, causal: bool, scale: float, block_q: int, block_k: int
    ) -> None:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.write_scores`."""
        from afbs_compile.kernels.policies import grouped_triton  # Triton is not installed everywhere.

        features = self.features_on_gpu(q, k, scale)
        # Sums of half precision numbers are worth no more digits than the numbers have.
        grouped_triton.write_log_mass(
            features, out, q.shape[2], exact=q.dtype == torch.float32, causal=causal, block_q=block_q, block_k=block_k
        )


def block_mass(features: Features, length: int, *, causal: bool, block_q: int, block_k: int) -> Tensor:
    """Mass of every key block, fp32 ``[B, H, n_q, n_k]``; rows sum to 1.

    Args:
        features: of the call.
        length: tokens.
        causal: whether query groups see no later key group.
        block_q, block_k: tokens per block.
    """
    heads = features.q.shape[1]
    groups_q, groups_k = block_count(length, GROUP), block_count(length, features.span)
    rows = _grouped(features.q, groups_q, features.parts, features.reverse)
    cols = _grouped(features.k, groups_k, features.parts, False).repeat_interleave(heads // features.k.shape[1], 1)
    per_q, per_k = block_q // GROUP, block_k // features.span
    count_q, count_k = block_count(length, block_q), block_count(length, block_k)
    mass = rows.new_zeros(*rows.shape[:2], count_q, count_k)
    step = max(1, LOGITS_AT_ONCE // (heads * groups_k * per_q))
    for first in range(0, count_q, step):
        part = slice(first * per_q, min((first + step) * per_q, groups_q))
        logits = rows[:, :, part] @ cols.transpose(-1, -2) * features.scale
        if causal:
            tokens = torch.arange(part.start, part.stop, device=rows.device)[:, None] * GROUP + features.last
            logits = logits.masked_fill(torch.arange(groups_k, device=rows.device) * features.span > tokens, -math.inf)
        groups = part.stop - part.start
        weights = torch.nn.functional.pad(logits.softmax(-1), (0, count_k * per_k - groups_k, 0, -groups % per_q))
        blocks = weights.unflatten(-1, (count_k, per_k)).sum(-1).unflatten(-2, (-1, per_q)).sum(-2)
        mass[:, :, first : first + blocks.shape[2]] = blocks
    # The last query block may have fewer groups.
    sizes = torch.full((count_q, 1), per_q, device=mass.device)
    sizes[-1] = groups_q - (count_q - 1) * per_q
    return mass / sizes


def _grouped(x: Tensor, groups: int, parts: int, reverse: bool) -> Tensor:
    """fp32 ``[B, H, groups, parts * D]``."""
    x = torch.nn.functional.pad(x.float(), (0, 0, 0, groups * parts - x.shape[2])).unflatten(2, (groups, parts))
    return (x.flip(3) if reverse else x).flatten(3)
