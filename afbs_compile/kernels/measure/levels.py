"""The tau from which each block is live, by the kernels that the device has: the order of a pass over an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.attend.machine import runs_triton
from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.call import THETA_OFF
from afbs_compile.kernels.masks.band import selection_refusal
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.base import Policy
from afbs_compile.kernels.policies.registry import policy_named
from afbs_compile.kernels.spec.selection import Similarities, block_levels, per_head, similarities


class Places(NamedTuple):
    """Of some query blocks the visible key blocks, those that are always kept and blurred ones.

    Bool ``[B or 1, H or 1, m, n_k]`` each; ``rows`` says which query blocks, int64 ``[m]``; ``None``: all.
    """

    visible: Tensor
    always: Tensor
    blurred: Tensor
    rows: Tensor | None = None


def levels_of(
    operands: Operands, shape: BlockShape, policy: str, places: Places, theta: Sequence[float] | None = None
) -> Tensor:
    """The tau from which each block is live: at any tau above its level.

    Args:
        operands: of the call, resolved; shape: rows per block.
        policy: by name; theta: one number per query head, for a policy that has one; ``None`` is off.
        places: of the query blocks wanted.

    Returns:
        fp32 ``[B, H, m, n_k]``, as :func:`afbs_compile.kernels.spec.selection.block_levels` says.

    Raises:
        ValueError: there is no such policy, or it has no theta.
    """
    chosen, limits = policy_named(policy), [THETA_OFF] * operands.heads if theta is None else list(theta)
    if max(limits) >= 0.0 and not chosen.has_theta:
        raise ValueError(f"theta is {max(limits)} for policy {policy}; accepted: negative, it has none")
    by_triton = runs_triton(operands.device) and selection_refusal(operands, shape) is None
    score = scored_by_triton if by_triton else _scored_by_torch
    scores, similar = score(chosen, operands, shape, with_similarity=max(limits) >= 0.0)
    if places.rows is not None:
        scores = scores[:, :, places.rows]
        similar = None if similar is None else (similar[0][:, :, places.rows], similar[1])
    # Constants that differ go to the device, and a GPU is waited for.
    limit = limits[0] if len(set(limits)) == 1 else per_head(limits, operands.device)
    return block_levels(scores, chosen.rule, places[:3], similar, limit)


Scored = tuple[Tensor, Similarities | None]
"""Scores, and of a policy that has a theta the self-similarities that it is about."""


def _scored_by_torch(policy: Policy, operands: Operands, shape: BlockShape, *, with_similarity: bool) -> Scored:
    return policy.scores(operands, shape), similarities(operands, shape) if policy.has_theta else None


def scored_by_triton(policy: Policy, operands: Operands, shape: BlockShape, *, with_similarity: bool) -> Scored:
    """Scores on Triton, whatever the device.

    Args:
        policy, operands, shape: as in :func:`levels_of`.
        with_similarity: whether self-similarities are wanted; else they only tell what is not finite.
    """
    batch, heads = operands.q.shape[:2]
    out = BlockLists.empty(batch, heads, operands.grid(shape), operands.device).indices
    similarity = policy.write_scores(operands, shape, out, with_similarity=with_similarity)
    scores = out.view(torch.float32)
    if similarity is None:
        return scores, None
    of_q, of_k = similarity.split([out[..., 0].numel(), similarity.numel() - out[..., 0].numel()])
    return scores, (of_q.view(out.shape[:3]), of_k.view(*operands.k.shape[:2], -1))
