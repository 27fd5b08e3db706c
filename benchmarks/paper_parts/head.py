"""One head of one call, and what selections are made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""The paper's block size."""


@dataclass(frozen=True, eq=False)
class Head:
    """Queries and keys of one head, ``[N, D]`` fp32, causal, as many queries as keys.

    Attributes:
        q, k: ``[N, D]``; scale: of the softmax; draw: random numbers of this head alone; name: of site and head.
    """

    q: Tensor
    k: Tensor
    scale: float
    draw: torch.Generator
    name: str = ""

    @property
    def length(self) -> int:
        """N."""
        return len(self.q)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.q.device

    @functools.cached_property
    def places(self) -> Tensor:
        """``[N]``, positions."""
        return torch.arange(self.length, device=self.device)

    @functools.cached_property
    def distance(self) -> Tensor:
        """``[N, N]``: how far back each key lies, negative ahead."""
        return self.places[:, None] - self.places

    @functools.cached_property
    def visible(self) -> Tensor:
        """bool ``[N, N]``."""
        return self.distance >= 0

    @functools.cached_property
    def scores(self) -> Tensor:
        """``[N, N]`` fp32, -inf ahead."""
        return (self.q @ self.k.T * self.scale).masked_fill_(~self.visible, -torch.inf)

    @functools.cached_property
    def probability(self) -> Tensor:
        """``[N, N]``, dense attention's weights."""
        return self.scores.softmax(-1)

    @functools.cached_property
    def mass(self) -> Tensor:
        """``[n, n]``: the weight of each block of keys, mean over the rows of a block of queries."""
        return by_blocks(self.probability).sum(-1).mean(1)


Keep = Callable[[Head, float], Tensor]
"""What a method keeps, bool ``[N, N]`` or ``[n, n]`` in blocks, given a knob from 0 (all) to 1 (next to nothing)."""


def by_blocks(x: Tensor) -> Tensor:
    """``[N, N]`` as ``[n, 64, n, 64]``; N is a multiple of 64."""
    return x.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))


def width_for(length: int, t: float) -> int:
    """How many keys a row may see for a share ``t`` of all causal pairs to be left out: w N - w (w - 1) / 2 pairs."""
    pairs = (1 - t) * length * (length + 1) / 2
    b = 2 * length + 1
    return max(1, round((b - math.sqrt(max(b * b - 8 * pairs, 0.0))) / 2))


def shares_of_rows(rows: int, t: float) -> Tensor:
    """How many of ``1, 2, .. rows`` candidates each row keeps: ``1 - t`` of all, rounded along the way, 1 at least."""
    seen = torch.arange(1, rows + 1, dtype=torch.float64)
    total = ((1 - t) * seen.cumsum(0)).round()
    return torch.diff(total, prepend=total.new_zeros(1)).clamp_min(1).long()


def largest(scores: Tensor, t: float) -> Tensor:
    """bool: the largest causal entries of each row of ``[n, n]``, as many as :func:`shares_of_rows` says."""
    rows = len(scores)
    counts = shares_of_rows(rows, t).to(scores.device)
    ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
    order = scores.masked_fill(ahead, -torch.inf).sort(-1, descending=True)
    kept = torch.arange(rows, device=scores.device) < counts[:, None]
    return torch.zeros_like(ahead).scatter_(1, order.indices, kept) & ~ahead
