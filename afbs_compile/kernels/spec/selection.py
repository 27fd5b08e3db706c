"""The specification of which blocks are live, in plain PyTorch: every policy, every mask.

Sources: SpargeAttn's two-stage filter as the paper's section III-A describes it, with the corrections that
docs/limits.md ("What a threshold means", "What the paper's own method lacks") lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape, block_count, shared
from afbs_compile.kernels.call import Kept, SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import heads_by, policy_named
from afbs_compile.kernels.policies.rules import ALWAYS, Rule, levels
from afbs_compile.kernels.policies.statistics import self_similarity
from afbs_compile.kernels.sight import Sight, resolved, sight_of

PREDICTOR_VERSION = 2
"""Raised whenever the same thresholds would select other blocks; a recipe of another version is refused."""


def per_head(values: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Per-head constants as fp32 ``[H, 1, 1]``."""
    return torch.as_tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def near_blocks(operands: Operands, shape: BlockShape, sight: Sight, local_keys: int = 0) -> Tensor:
    """Key blocks that hold positions of the query block, or the ``local_keys`` before them.

    A row's position is its own key by the formula, or else the last key that the mask lets it see; past the end of the
    keys it is the last one.

    Returns:
        bool ``[B or 1, H or 1, n_q, n_k]``.
    """
    grid, device = operands.grid(shape), operands.device
    first_k = torch.arange(grid.count_k, device=device) * shape.k
    if sight.ends is None:
        first_q = torch.arange(grid.count_q, device=device)[:, None] * shape.q + operands.offset
        first_q = first_q.clamp_max(grid.k_len - 1)[None, None]
        end_q = first_q + shape.q
    else:
        first_q, end_q = sight.ends[..., :1], sight.ends[..., 1:] + 1
    return (first_k < end_q) & (first_q < first_k + shape.k + local_keys)


def first_whole_block(q_len: int, block_q: int, last_rows: int) -> int:
    """The first query block that holds one of the last ``last_rows`` rows; it and those after it keep every block.

    The number of query blocks where ``last_rows`` is 0.
    """
    return max(0, q_len - last_rows) // block_q if last_rows > 0 else block_count(q_len, block_q)


def kept_blocks(operands: Operands, shape: BlockShape, kept: Kept) -> Tensor:
    """The visible blocks that every tau keeps: blurred ones, those near the query block, and all of the last rows.

    A query block that sees none of those keeps the first block that it sees.

    Args:
        operands: of the call, :func:`~afbs_compile.kernels.sight.resolved`.

    Returns:
        bool ``[B or 1, H or 1, n_q, n_k]``.
    """
    sight = sight_of(operands, shape)
    blocks = near_blocks(operands, shape, sight, kept.local_keys) & sight.visible | sight.blurred
    last = first_whole_block(operands.q_len, shape.q, kept.last_rows)
    blocks[:, :, last:] = sight.visible[:, :, last:]
    first = sight.visible & (sight.visible.cumsum(-1) == 1)
    return torch.where(blocks.any(-1, keepdim=True), blocks, first)


Similarities = tuple[Tensor, Tensor]
"""Self-similarities fp32 ``[B, H, n_q]`` and ``[B, H_kv, n_k]`` of the blocks of q and of k."""


def similarities(operands: Operands, shape: BlockShape) -> Similarities:
    """Self-similarities of all blocks."""
    return self_similarity(operands.q, shape.q), self_similarity(operands.k, shape.k, operands.valid)


def block_levels(
    scores: Tensor,
    rule: Rule,
    places: tuple[Tensor, Tensor, Tensor],
    similar: Similarities | None = None,
    theta: Tensor | float = 0.0,
) -> Tensor:
    """The tau from which each block is live: at any tau above its level.

    A key block less self-similar than ``theta`` is poorly described by its mean: it is kept and takes no part in
    the softmax. A query block less self-similar than ``theta`` keeps every block.

    Args:
        scores: fp32 ``[B, H, m, n_k]`` of some query blocks; rule: of their policy.
        places: of these query blocks, those that are visible, those that are always kept, and those that are blurred,
            bool, broadcastable to the scores.
        similar: self-similarities, of a policy that has a theta; theta: fp32 ``[H, 1, 1]`` or one number.

    Returns:
        fp32 ``[B, H, m, n_k]``: ``ALWAYS`` (-1) for blocks that every tau keeps (rows with NaN among them), infinity
        for invisible ones, in [0, 1) for the others.
    """
    visible, always, blurred = places
    candidates = visible & ~blurred
    if similar is not None:
        of_q, of_k = similar
        coherent_k = of_k.repeat_interleave(of_q.shape[1] // of_k.shape[1], 1)[..., None, :] >= theta
        candidates, always = candidates & coherent_k, always | ~coherent_k | ~(of_q[..., None] >= theta)
    level = levels(scores, rule, candidates)
    return torch.where(always, ALWAYS, level).masked_fill(~visible, math.inf)


def live_blocks(operands: Operands, call: SparseCall) -> Tensor:
    """Which key blocks each query block attends: bool ``[B, H, n_q, n_k]``.

    Causality: statistics are per block and no block of which a query block does not see every key enters its softmax,
    so a key alters no row of blocks in query blocks that do not see it.
    """
    operands = resolved(operands, call.shape)
    grid, device = operands.grid(call.shape), operands.device
    sight = sight_of(operands, call.shape)
    places = sight.visible, kept_blocks(operands, call.shape, call.kept), sight.blurred
    live = torch.empty(*operands.q.shape[:2], grid.count_q, grid.count_k, dtype=torch.bool, device=device)
    for name, heads in heads_by(call.policy).items():
        policy, part = policy_named(name), operands.taken(heads)
        similar = similarities(part, call.shape) if policy.has_theta else None
        theta, tau = (per_head([values[head] for head in heads], device) for values in (call.theta, call.tau))
        visible, always, blurred = (x if x.shape[1] == 1 else x[:, heads] for x in places)
        scores = policy.scores(part, call.shape)
        level = block_levels(scores, policy.rule, (visible, always, blurred), similar, theta)
        live[:, heads] = level < tau.clamp_max(1.0)
    return shared(live, call.shape.heads) & sight.visible
