"""The specification: predictor and block-sparse attention in plain PyTorch.

Every other engine (Triton, FlexAttention) is tested against this file. It favours clarity over speed and may
hold an N x N tensor. Shapes: ``q [B, H, N, D]``, ``k, v [B, H_kv, N, D]`` with ``H = groups * H_kv``; query
block ``i`` covers rows ``[i * block_q, (i + 1) * block_q)``, key block ``j`` likewise with ``block_k``.

Sources: SpargeAttn's two-stage filter as the paper's section III-A describes it, with the corrections that
README.md ("What a threshold means") lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PREDICTOR_VERSION = 1
"""Raised whenever the same thresholds would select other blocks; a recipe of another version is refused."""

KEEP_ALL = 1.0
"""``tau`` at or above this keeps every block of the head: the head is DENSE."""

THETA_OFF = -1.0
"""Self-similarity lies in [0, 1], so no block is ever below a negative ``theta``."""

LAMBDA_OFF = -1000.0
"""2**-1000 is zero in every dtype we take, so this ``lam`` skips nothing that could be seen: DENSE-lambda, what
calibration chooses. Testing tiles costs more than skipping them saves (``benchmarks/kernels.py --cases lambda``)."""

LOG2_E = math.log2(math.e)


class Kept(NamedTuple):
    """The blocks that every tau keeps, beside those on the diagonal.

    Attributes:
        last_rows: 0 or more; every block of a query block that holds one of this many last rows. Those rows answer:
            what a language model says next is read off the last one, and they have the whole text to find it in.
        local_keys: 0 or more; the blocks that hold one of this many keys right before a query block. Its first rows
            have few keys of their own block to look back at, and what came just before a token matters to it the most.
    """

    last_rows: int = 0
    local_keys: int = 0


DIAGONAL_ONLY = Kept()
"""Of calls that were not calibrated, and of ``method="paper"``."""


def block_count(length: int, block: int) -> int:
    """Number of blocks that cover ``length`` rows; the last one may be partial."""
    return -(-length // block)


def per_head(values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Per-head constants as fp32 ``[H, 1, 1]`` on the device of ``like``."""
    return torch.as_tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)


def block_statistics(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean row and self-similarity of each block of rows.

    Args:
        x: ``[B, H, N, D]``, any floating dtype, any strides.
        block: rows per block; rows missing from the last block do not count.

    Returns:
        ``mean [B, H, n, D]`` and ``similarity [B, H, n]`` in [0, 1], both fp32. Zero rows have no direction and
        add nothing to the similarity.
    """
    batch, heads, length, dim = x.shape
    count = block_count(length, block)
    rows = torch.nn.functional.pad(x.float(), (0, 0, 0, count * block - length)).view(batch, heads, count, block, dim)
    sizes = torch.full((count, 1), block, device=x.device)
    sizes[-1] = length - (count - 1) * block
    mean = rows.sum(-2) / sizes
    # unit = (x / max|x|) / ||x / max|x|||: dividing by the largest entry first keeps the squares finite.
    scaled = rows / rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    unit = scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    # Mean pairwise cosine: 1/n^2 sum_ab cos(x_a, x_b) = ||mean of unit rows||^2.
    similarity = (unit.sum(-2) / sizes).square().sum(-1)
    return mean, similarity


def visible_blocks(
    count_q: int, count_k: int, block_q: int, block_k: int, causal: bool, device: torch.device
) -> Tensor:
    """``[n_q, n_k]`` bool: key blocks that hold at least one key which some row of the query block may attend."""
    if not causal:
        return torch.ones(count_q, count_k, dtype=torch.bool, device=device)
    last_row = torch.arange(1, count_q + 1, device=device) * block_q - 1
    return torch.arange(count_k, device=device) * block_k <= last_row[:, None]


def diagonal_blocks(
    count_q: int, count_k: int, block_q: int, block_k: int, device: torch.device, local_keys: int = 0
) -> Tensor:
    """``[n_q, n_k]`` bool: key blocks that overlap the rows of the query block, or the ``local_keys`` before them."""
    first_q = torch.arange(count_q, device=device)[:, None] * block_q
    first_k = torch.arange(count_k, device=device) * block_k
    return (first_k < first_q + block_q) & (first_q < first_k + block_k + local_keys)


def first_whole_block(length: int, block_q: int, last_rows: int) -> int:
    """The first query block that holds one of the last ``last_rows`` rows; it and those after it keep every block.

    The number of query blocks where ``last_rows`` is 0.
    """
    return max(0, length - last_rows) // block_q if last_rows > 0 else block_count(length, block_q)


def kept_limits(length: int, block_q: int, kept: Kept) -> tuple[int, int]:
    """``local_keys``, at most the length, and :func:`first_whole_block`: what a kernel that selects is told."""
    return min(kept.local_keys, length), first_whole_block(length, block_q, kept.last_rows)


def kept_blocks(length: int, block_q: int, block_k: int, kept: Kept, device: torch.device) -> Tensor:
    """``[n_q, n_k]`` bool: the blocks that every tau keeps: those on the diagonal, local ones, all of the last rows."""
    count_q, count_k = block_count(length, block_q), block_count(length, block_k)
    blocks = diagonal_blocks(count_q, count_k, block_q, block_k, device, kept.local_keys)
    blocks[first_whole_block(length, block_q, kept.last_rows) :] = True
    return blocks


def block_probabilities(mean_q: Tensor, mean_k: Tensor, candidates: Tensor, *, scale: float) -> Tensor:
    """Softmax over the candidate blocks of the pooled scores.

    Args:
        mean_q: ``[B, H, n_q, D]``; mean_k: ``[B, H_kv, n_k, D]``, fp32.
        candidates: bool, broadcastable to ``[B, H, n_q, n_k]``; the others get probability 0.
        scale: the softmax scale of the attention call.

    Returns:
        ``[B, H, n_q, n_k]`` fp32. A row without candidates is all 0. NaN scores stay NaN.
    """
    groups = mean_q.shape[1] // mean_k.shape[1]
    scores = mean_q @ mean_k.repeat_interleave(groups, 1).transpose(-1, -2) * scale
    scores = scores.masked_fill(~candidates, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(peak == -math.inf, 0.0, peak))
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def select_blocks(probability: Tensor, tau: Tensor) -> Tensor:
    """Keep the smallest set of blocks whose probabilities reach ``tau``; equal blocks stay or go together.

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
    keep = ~(probability < threshold) & (kept > 0)
    return keep


def predict_mask(
    q: Tensor,
    k: Tensor,
    tau: Sequence[float] | Tensor,
    theta: Sequence[float] | Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    kept: Kept = DIAGONAL_ONLY,
) -> Tensor:
    """Which key blocks each query block attends: the two filters of SpargeAttn and the blocks that are always kept.

    A key block less self-similar than ``theta`` is poorly described by its mean: it is kept and takes no part in
    the softmax. A query block less self-similar than ``theta`` keeps every block. ``tau >= 1`` keeps every block.

    Causality: statistics are per block and no later block enters a row's softmax, so a change at token t alters no
    row of blocks in query blocks that end before t.

    Args:
        q: ``[B, H, N, D]``; k: ``[B, H_kv, N, D]``.
        tau, theta: one number per query head.
        causal: whether row r attends keys 0..r only.
        scale: softmax scale; ``None`` means ``D ** -0.5``.
        block_q, block_k: rows per block; ``block_q`` is a multiple of ``block_k``.
        kept: which blocks every tau keeps, beside those on the diagonal.

    Returns:
        bool ``[B, H, n_q, n_k]``, true where the block is live.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tau, theta = per_head(tau, q), per_head(theta, q)
    groups = q.shape[1] // k.shape[1]
    mean_q, similarity_q = block_statistics(q, block_q)
    mean_k, similarity_k = block_statistics(k, block_k)
    count_q, count_k = mean_q.shape[2], mean_k.shape[2]
    visible = visible_blocks(count_q, count_k, block_q, block_k, causal, q.device)
    always = kept_blocks(q.shape[2], block_q, block_k, kept, q.device)

    coherent_k = similarity_k.repeat_interleave(groups, 1)[..., None, :] >= theta
    coherent_q = similarity_q[..., None] >= theta
    probability = block_probabilities(mean_q, mean_k, visible & coherent_k, scale=scale)
    live = (select_blocks(probability, tau) & coherent_k) | ~coherent_k | ~coherent_q | (tau >= KEEP_ALL) | always
    return live & visible


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    live: Tensor,
    lam: Sequence[float] | Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Tensor:
    """Attention over the live blocks only, visited in ascending order with a running maximum (online softmax).

    The softmax weights of a block always enter the row sum; a row skips their product with V when its maximum in the
    block lies more than ``-lam`` (log2 units) under its running maximum. Only the row's own scores decide, so no later
    token can.

    Args:
        q, k, v: as in :func:`predict_mask`; computed in the dtype given, or fp32 for half precisions.
        live: bool ``[B, H, n_q, n_k]``. Each query block needs at least one visible key for each of its rows.
        lam: one number per query head, at most 0; :data:`LAMBDA_OFF` skips nothing.

    Returns:
        ``[B, H, N, D]`` in the dtype of ``q``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    length = q.shape[2]
    k, v_full = (x.to(work).repeat_interleave(groups, 1) for x in (k, v))
    lam = per_head(lam, q)[..., 0]
    scores = q.to(work) @ k.transpose(-1, -2) * (scale * LOG2_E)
    allowed = live.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[..., :length, :length]
    if causal:
        rows = torch.arange(length, device=q.device)
        allowed = allowed & (rows <= rows[:, None])
    scores = scores.masked_fill(~allowed, -math.inf)

    running = scores.new_full(scores.shape[:-1], -math.inf)
    total = torch.zeros_like(running)
    out = torch.zeros_like(q, dtype=work)
    for start in range(0, length, block_k):
        tile = scores[..., start : start + block_k]
        tile_max = tile.amax(-1)
        new = torch.maximum(running, tile_max)
        base = torch.where(new == -math.inf, 0.0, new)
        # l <- l * 2^(m_old - m_new) + rowsum(2^(s - m_new)),   o <- o * 2^(m_old - m_new) + 2^(s - m_new) V
        decay = torch.exp2(running - base)
        weights = torch.exp2(tile - base[..., None])
        total = total * decay + weights.sum(-1)
        out = out * decay[..., None]
        gap = torch.where(tile_max == -math.inf, -math.inf, tile_max - base)
        needed = ~(gap < lam)
        out = out + torch.where(needed[..., None], weights @ v_full[..., start : start + block_k, :], 0.0)
        running = new
    result: Tensor = (out / total[..., None]).to(q.dtype)
    return result


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    lam: Sequence[float],
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    kept: Kept = DIAGONAL_ONLY,
) -> Tensor:
    """Predict the live blocks, then attend over them: what ``afbs::sparse_attention`` computes."""
    live = predict_mask(q, k, tau, theta, causal=causal, scale=scale, block_q=block_q, block_k=block_k, kept=kept)
    return masked_attention(q, k, v, live, lam, causal=causal, scale=scale, block_q=block_q, block_k=block_k)
