"""Blocks of queries and of keys: their shape, their number, and the lists of live ones that attention kernels walk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class BlockShape(NamedTuple):
    """Rows per block of queries and of keys, powers of two; ``q`` is a multiple of ``k``.

    Attributes:
        heads: neighbouring query heads, of one key head, whose query blocks share a selection: a key block is live for
            all of them where it is for one.
    """

    q: int
    k: int
    heads: int = 1

    @property
    def rows(self) -> tuple[int, int]:
        """Of queries and of keys."""
        return self.q, self.k

    def __str__(self) -> str:
        return f"{self.q}x{self.k}" + (f" of {self.heads} heads" if self.heads > 1 else "")


def block_count(length: int, block: int) -> int:
    """Number of blocks that cover ``length`` rows; the last one may be partial."""
    return -(-length // block)


class Grid(NamedTuple):
    """The blocks of one call: query block ``i`` holds the rows from ``i * shape.q`` on, key blocks likewise."""

    q_len: int
    k_len: int
    shape: BlockShape

    @property
    def count_q(self) -> int:
        """Query blocks, n_q."""
        return block_count(self.q_len, self.shape.q)

    @property
    def count_k(self) -> int:
        """Key blocks, n_k."""
        return block_count(self.k_len, self.shape.k)


class BlockLists(NamedTuple):
    """The live key blocks of each query block: whole ones first, then partial ones, each part in ascending order.

    A block is whole if every row of the query block sees every key of it, so no mask is needed there.

    Attributes:
        whole, partial: int32 ``[B, H, n_q]``, how many of either there are.
        indices: int32 ``[B, H, n_q, n_k]``; the entries after the live blocks are unspecified but lie in
            ``0..n_k - 1``.
    """

    whole: Tensor
    partial: Tensor
    indices: Tensor

    @property
    def counts(self) -> Tensor:
        """int32 ``[B, H, n_q]``, number of live blocks."""
        return self.whole + self.partial

    @classmethod
    def empty(cls, batch: int, heads: int, grid: Grid, device: torch.device) -> BlockLists:
        """Lists of that size, not yet filled."""
        sizes = (batch, heads, grid.count_q)
        whole, partial = (torch.empty(sizes, dtype=torch.int32, device=device) for _ in range(2))
        return cls(whole, partial, torch.empty((*sizes, grid.count_k), dtype=torch.int32, device=device))


def shared(live: Tensor, heads: int) -> Tensor:
    """What is live for any of ``heads`` neighbouring heads, for all of them; bool ``[B, H, n_q, n_k]``."""
    return live if heads == 1 else live.unflatten(1, (-1, heads)).any(2).repeat_interleave(heads, 1)


def lists_of(live: Tensor, whole: Tensor) -> BlockLists:
    """Lists from masks.

    Args:
        live: bool ``[B, H, n_q, n_k]``.
        whole: bool, broadcastable to it: blocks that need no mask.
    """
    first, rest = live & whole, live & ~whole
    counts, others = (part.sum(-1, dtype=torch.int32) for part in (first, rest))
    # A live block goes to the place that the number of live blocks before it names; the others share a place past the
    # end, which is cut off.
    place = torch.where(first, first.cumsum(-1) - 1, live.shape[-1])
    place = torch.where(rest, rest.cumsum(-1) - 1 + counts[..., None], place)
    blocks = torch.arange(live.shape[-1], dtype=torch.int32, device=live.device).expand(live.shape)
    indices = blocks.new_zeros(*live.shape[:-1], live.shape[-1] + 1).scatter_(-1, place, blocks)
    return BlockLists(counts, others, indices[..., :-1].contiguous())


def live_of(lists: BlockLists) -> Tensor:
    """The live blocks, bool ``[B, H, n_q, n_k]``: the inverse of :func:`lists_of`."""
    count_k = lists.indices.shape[-1]
    valid = torch.arange(count_k, device=lists.indices.device) < lists.counts[..., None]
    place = torch.where(valid, lists.indices, count_k).long()
    live = torch.zeros(*lists.indices.shape[:-1], count_k + 1, dtype=torch.bool, device=lists.indices.device)
    return live.scatter_(-1, place, True)[..., :-1]


def chunks(count: int, most: int) -> Iterator[slice]:
    """Slices that cover ``range(count)``, at most ``most`` long each."""
    for first in range(0, count, most):
        yield slice(first, min(first + most, count))
