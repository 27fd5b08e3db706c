"""The policies, and what every caller of one needs: levels, masks, and heads that differ in policy.

A policy predicts which key blocks matter to a query block; :mod:`afbs_compile.kernels.policies` holds one file each. To
add one, write a class with the interface of :class:`afbs_compile.kernels.policies.base.Policy` and name it here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels import predict, reference
from afbs_compile.kernels.policies import base
from afbs_compile.kernels.policies.antidiagonal import Antidiagonal
from afbs_compile.kernels.policies.base import ALWAYS, Policy
from afbs_compile.kernels.policies.cumulant import Cumulant
from afbs_compile.kernels.policies.meanshare import MeanShare
from afbs_compile.kernels.policies.meansim import MeanSim
from afbs_compile.kernels.policies.sink_window import SinkWindow
from afbs_compile.kernels.policies.vertical_slash import VerticalSlash

_POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (MeanSim(), MeanShare(), Cumulant(), Antidiagonal(), VerticalSlash(), SinkWindow())
}

DEFAULT = "meansim"
"""The policy of a call that names none."""

POLICIES: tuple[str, ...] = tuple(_POLICIES)


def policy_named(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _POLICIES:
        raise ValueError(f"policy is {name!r}; accepted: {', '.join(POLICIES)}")
    return _POLICIES[name]


def check_policies(policy: Sequence[str], theta: Sequence[float]) -> None:
    """Refuse names that do not fit a call.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """
    if len(policy) != len(theta):
        raise ValueError(f"policy has {len(policy)} names; accepted: one for each of the {len(theta)} query heads")
    for name, value in zip(policy, theta, strict=True):
        policy_named(name)
        if name != DEFAULT and value >= 0.0:
            raise ValueError(
                f"theta is {value} for a head of policy {name}; accepted: negative, only {DEFAULT} has one"
            )


def levels(
    policy: str,
    q: Tensor,
    k: Tensor,
    theta: Sequence[float] | Tensor | None = None,
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    kept: reference.Kept = reference.DIAGONAL_ONLY,
    places: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The tau from which each block is live: at any tau above its level.

    Args:
        policy: one of :data:`POLICIES`.
        q: ``[B, H, N, D]``; k: ``[B, H_kv, N, D]``; any floating dtype, any strides.
        theta: one number per query head, for ``meansim`` only; ``None`` is off.
        causal: whether row r attends keys 0..r only.
        scale: softmax scale; ``None`` means ``D ** -0.5``.
        block_q, block_k: rows per block, powers of two from 16; ``block_q`` is a multiple of ``block_k``.
        kept: which blocks every tau keeps, beside those on the diagonal.
        places: the visible blocks and those that are always kept, bool ``[m, n_k]`` each, of a caller that has them;
            ``kept`` is not looked at then.
        rows: int64 ``[m]``, the query blocks wanted, with ``places`` of them; all by default.

    Returns:
        fp32 ``[B, H, m, n_k]``: ``ALWAYS`` (-1) for blocks that every tau keeps (diagonal ones, those of ``kept``,
        those that theta keeps, rows with NaN), infinity for invisible ones, in [0, 1) for the others.

    Raises:
        ValueError: there is no such policy, or it has no theta.
    """
    chosen = policy_named(policy)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocks: dict[str, Any] = {"causal": causal, "scale": scale, "block_q": block_q, "block_k": block_k}
    if places is None:
        counts = reference.block_count(q.shape[2], block_q), reference.block_count(q.shape[2], block_k)
        sizes = (*counts, block_q, block_k)
        places = (
            reference.visible_blocks(*sizes, causal, q.device),
            reference.kept_blocks(q.shape[2], block_q, block_k, kept, q.device),
        )
    visible, always = places
    candidates = visible
    limits = [reference.THETA_OFF] * q.shape[1] if theta is None else torch.as_tensor(theta).tolist()
    check_policies([policy] * q.shape[1], limits)
    score = scored_by_triton if q.device.type == "cuda" else _scored_by_torch
    scores, similarities = score(chosen, q, k, has_theta=max(limits) >= 0.0, **blocks)
    if rows is not None:
        scores = scores[:, :, rows]
    if similarities is not None:
        similarity_q, similarity_k = similarities
        similarity_q = similarity_q if rows is None else similarity_q[:, :, rows]
        # Constants that differ go to the device, and a GPU is waited for.
        limit = limits[0] if len(set(limits)) == 1 else reference.per_head(limits, q)
        coherent_k = similarity_k.repeat_interleave(q.shape[1] // k.shape[1], 1)[..., None, :] >= limit
        candidates, always = visible & coherent_k, always | ~coherent_k | ~(similarity_q[..., None] >= limit)
    level = base.levels(scores, chosen.rule, candidates)
    return torch.where(always, ALWAYS, level).masked_fill(~visible, math.inf)


Scored = tuple[Tensor, tuple[Tensor, Tensor] | None]
"""Scores, and for ``meansim`` the self-similarities ``[B, H, n_q]`` and ``[B, H_kv, n_k]`` that theta is about."""


def _scored_by_torch(policy: Policy, q: Tensor, k: Tensor, *, has_theta: bool, **call: Any) -> Scored:
    scores = policy.scores(q, k, **call)
    if policy.name != DEFAULT:
        return scores, None
    _, similarity_q = reference.block_statistics(q, call["block_q"])
    _, similarity_k = reference.block_statistics(k, call["block_k"])
    return scores, (similarity_q, similarity_k)


def scored_by_triton(policy: Policy, q: Tensor, k: Tensor, *, has_theta: bool, **call: Any) -> Scored:
    """Scores on Triton, whatever the device; without ``has_theta`` the self-similarities only tell what is not finite.

    Args:
        policy: which one.
        q, k, call: as for :meth:`Policy.write_scores`.
        has_theta: whether self-similarities are wanted.
    """
    from afbs_compile.kernels import predict_triton  # Triton is not installed everywhere.

    out = predict_triton.empty_lists(q, call["block_q"], call["block_k"]).indices
    scores = out.view(torch.float32)
    if policy.name != DEFAULT:
        policy.write_scores(q, k, out, **call)
        return scores, None
    similarity = predict_triton.pooled_scores(q, k, out, has_theta=has_theta, **call)
    of_q, of_k = similarity.split([out[..., 0].numel(), similarity.numel() - out[..., 0].numel()])
    return scores, (of_q.view(out.shape[:3]), of_k.view(*k.shape[:2], -1))


def predict_mask(
    q: Tensor, k: Tensor, tau: Sequence[float], theta: Sequence[float], policy: Sequence[str] | None, **call: Any
) -> Tensor:
    """Which key blocks each query block attends, in plain PyTorch.

    Args:
        q, k, tau, theta, call: as in :func:`afbs_compile.kernels.reference.predict_mask`.
        policy: one name per query head; ``None`` is ``meansim`` for all.

    Returns:
        bool ``[B, H, n_q, n_k]``.
    """
    if policy is None:
        return predict.predict_mask(q, k, tau, theta, **call)
    parts = []
    for name, heads in heads_of(policy).items():
        mine = operands_of(q, k, heads)
        taus, thetas = [tau[h] for h in heads], [theta[h] for h in heads]
        if name == DEFAULT:
            parts.append(predict.predict_mask(*mine, taus, thetas, **call))
        else:
            parts.append(levels(name, *mine, **call) < reference.per_head(taus, q).clamp_max(1.0))
    return in_order(parts, policy)


def heads_of(policy: Sequence[str]) -> dict[str, list[int]]:
    """The query heads of each policy that occurs."""
    return {name: [h for h, mine in enumerate(policy) if mine == name] for name in dict.fromkeys(policy)}


def operands_of(q: Tensor, k: Tensor, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``q`` and ``k`` of some query heads; as they are if those are all, else a copy with a key head for each."""
    if len(heads) == q.shape[1]:
        return q, k
    groups = q.shape[1] // k.shape[1]
    # Slices and not an index: on a GPU that would have to be copied there, and waited for.
    return torch.cat([q[:, h : h + 1] for h in heads], 1), torch.cat([k[:, h // groups][:, None] for h in heads], 1)


def in_order(parts: Sequence[Tensor], policy: Sequence[str]) -> Tensor:
    """Put results of :func:`heads_of`'s heads, ``[B, heads, ...]`` each, back into the order of the heads."""
    if len(parts) == 1:
        return parts[0]
    places = heads_of(policy)
    rows = {
        h: part[:, n : n + 1] for heads, part in zip(places.values(), parts, strict=True) for n, h in enumerate(heads)
    }
    return torch.cat([rows[h] for h in range(len(policy))], 1)
