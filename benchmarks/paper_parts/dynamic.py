"""Selections that the input decides, written here in plain PyTorch: simulated, as they cannot run as block kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_parts.head import BLOCK, Head, by_blocks, largest, width_for

ROUNDS = 4
"""Of hashing, as Reformer uses for evaluation at least."""

STEPS = 4
"""Of k-means."""

RECENT = 0.5
"""Of H2O's budget, as its authors recommend; the rest are heavy hitters."""

DIFFERENCE = 24.0
"""Largest difference of scores that AnchorAttention's knob reaches: below e^-24 of the anchor nothing is left."""


def reformer(head: Head, t: float) -> Tensor:
    """Tokens of a hash bucket (Reformer, Kitaev et al. 2020): sorted by bucket, cut into chunks, own and one before.

    Reformer's queries are its keys; here each are hashed and sorted on their own.
    """
    length, chunk = head.length, max(1, round((1 - t) * head.length / 2))
    q, k = F.normalize(head.q, dim=-1), F.normalize(head.k, dim=-1)
    kept = torch.zeros(length, length, dtype=torch.bool, device=head.device)
    for _ in range(ROUNDS):
        half = max(1, math.ceil(length / chunk / 2))
        turn = torch.randn(q.shape[1], half, generator=head.draw, device=head.device)
        ranks = []
        for x in (q, k):
            bucket = torch.cat([x @ turn, -x @ turn], -1).argmax(-1)
            order = (bucket * length + head.places).argsort()
            ranks.append(torch.empty_like(order).scatter_(0, order, head.places) // chunk)
        back = ranks[0][:, None] - ranks[1]
        kept |= (back == 0) | (back == 1)
    return kept


def routing(head: Head, t: float) -> Tensor:
    """Tokens of a cluster (Routing Transformer, Roy et al. 2021): each centroid takes its nearest queries and keys."""
    length = head.length
    count, size = math.isqrt(length), max(1, round((1 - t) * length))
    q, k = F.normalize(head.q, dim=-1), F.normalize(head.k, dim=-1)
    centres = k[torch.randperm(length, generator=head.draw, device=head.device)[:count]]
    for _ in range(STEPS):
        nearest = (k @ centres.T).argmax(-1)
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, nearest, k) + 1e-6 * centres, dim=-1)
    members = []
    for x in (q, k):
        chosen = (x @ centres.T).topk(min(size, length), 0).indices
        members.append(torch.zeros(length, count, device=head.device).scatter_(0, chosen, 1.0))
    return members[0] @ members[1].T > 0


def heavy_hitters(head: Head, t: float) -> Tensor:
    """Recent keys, and those with the most weight in all rows so far (H2O, Zhang et al. 2023), as a prefill mask.

    What is heavy is decided for 64 rows at a time, from the dense weights of the rows before them.
    """
    budget = width_for(head.length, t)
    heavy = budget - round(RECENT * budget)
    before = by_blocks(head.probability).sum(1).flatten(1).cumsum(0).roll(1, 0)  # [n, N]
    before[0] = 0
    chosen = torch.zeros_like(before, dtype=torch.bool)
    if heavy:
        # Older than what the last row of a block has as recent; its first rows have some of these as both.
        old = head.places < (torch.arange(1, len(before) + 1, device=head.device) * BLOCK - (budget - heavy))[:, None]
        top = before.masked_fill(~old, -1.0).topk(min(heavy, head.length), -1)
        chosen.scatter_(1, top.indices, top.values >= 0)
    return chosen.repeat_interleave(BLOCK, 0) | (head.distance < max(1, budget - heavy))


def eviction(head: Head, t: float) -> Tensor:
    """H2O as its authors run it: keys that leave a cache of fixed size never return; 64 rows are one step."""
    budget = width_for(head.length, t)
    recent = max(1, round(RECENT * budget))
    kept = torch.zeros_like(head.visible)
    there = torch.zeros(head.length, dtype=torch.bool, device=head.device)
    weight = torch.zeros(head.length, device=head.device)
    for first in range(0, head.length, BLOCK):
        rows = slice(first, first + BLOCK)
        there[rows] = True
        kept[rows] = (there & head.visible[rows]) | (head.distance[rows] < 1)
        weight += head.scores[rows].masked_fill(~kept[rows], -torch.inf).softmax(-1).sum(0)
        excess = int(there.sum()) - budget
        if excess > 0:
            old = there & (head.places < first + BLOCK - recent)
            lightest = weight.masked_fill(~old, torch.inf).argsort()[: min(excess, int(old.sum()))]
            there[lightest] = False
    return kept


def top_tokens(head: Head, t: float) -> Tensor:
    """The keys with the most weight in each row: the token oracle."""
    return largest(head.scores, t)


def top_blocks(head: Head, t: float) -> Tensor:
    """The blocks with the most weight in each row of blocks: the block oracle."""
    return largest(head.mass, t)


def pooled_blocks(head: Head, t: float) -> Tensor:
    """The blocks whose means of queries and keys have the largest product, and a row's own."""
    q, k = (x.unflatten(0, (-1, BLOCK)).mean(1) for x in (head.q, head.k))
    return largest((q @ k.T * head.scale).fill_diagonal_(torch.inf), t)


def anchor(head: Head, t: float) -> Tensor:
    """Keys whose score comes near the best of the first and the nearest block (AnchorAttention, 2025), by stripes.

    A row of 64 queries is pooled, as its authors do to find stripes.
    """
    count = head.length // BLOCK
    pooled = head.q.unflatten(0, (count, BLOCK)).mean(1)
    scores = pooled @ head.k.T * head.scale  # [n, N]
    block = head.places // BLOCK
    mine = torch.arange(count, device=head.device)[:, None]
    near = (block == 0) | (block == mine)
    peak = scores.masked_fill(~near | (block > mine), -torch.inf).amax(-1, keepdim=True)
    return ((scores >= peak - (1 - t) * DIFFERENCE) | near).repeat_interleave(BLOCK, 0)
