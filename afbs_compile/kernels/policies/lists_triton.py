"""Block lists of calls whose heads have a policy each, on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels import predict_triton
from afbs_compile.kernels.policies.base import Policy
from afbs_compile.kernels.policies.select_triton import select_by_strength
from afbs_compile.kernels.policy import heads_of, in_order, operands_of, policy_named
from afbs_compile.kernels.predict import BlockLists
from afbs_compile.kernels.reference import DIAGONAL_ONLY, THETA_OFF, Kept


def predict_with(
    policy: Policy,
    q: Tensor,
    k: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    *,
    scale: float,
    kept: Kept = DIAGONAL_ONLY,
    **blocks: Any,
) -> BlockLists:
    """The lists of heads that share a policy.

    Args:
        policy: of all heads.
        q, k, tau, theta, scale, kept: as in :func:`afbs_compile.kernels.predict.predict_blocks`.
        blocks: ``causal``, ``block_q`` and ``block_k``, as there.
    """
    if policy.name == "meansim":  # the only one with a theta
        return predict_triton.predict_blocks(q, k, tau, theta, scale=scale, kept=kept, **blocks)
    lists = predict_triton.empty_lists(q, blocks["block_q"], blocks["block_k"])
    if lists.counts.numel() == 0:
        return lists
    policy.write_scores(q, k, lists.indices, scale=scale, **blocks)
    chosen: dict[str, Any] = {"length": q.shape[2], "kept": kept, **blocks}
    if policy.rule == "mass":
        batch, heads, count_q, count_k = lists.indices.shape
        coherent = q.new_ones(batch * heads * (count_q + count_k), dtype=torch.float32)
        predict_triton.select_by_mass(lists, coherent, heads, tau, [THETA_OFF] * heads, **chosen)
    else:
        select_by_strength(lists, tau, share=policy.rule == "share", **chosen)
    return lists


def predict_blocks(
    q: Tensor, k: Tensor, tau: Sequence[float], theta: Sequence[float], policy: Sequence[str], **call: Any
) -> BlockLists:
    """:func:`afbs_compile.kernels.predict.predict_blocks` on Triton, whatever the device, for named policies.

    Heads that differ in policy are copied together by policy, and so are their lists.
    """
    parts = []
    for name, heads in heads_of(policy).items():
        taus, thetas = [tau[h] for h in heads], [theta[h] for h in heads]
        parts.append(predict_with(policy_named(name), *operands_of(q, k, heads), taus, thetas, **call))
    return BlockLists(
        in_order([lists.counts for lists in parts], policy), in_order([lists.indices for lists in parts], policy)
    )
