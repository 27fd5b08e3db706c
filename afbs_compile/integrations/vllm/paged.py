"""Keys and values out of vLLM's pages, contiguous: what is copied is counted."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.integrations.vllm.stats import STATS

DIGIT = 128
"""Whole numbers below it are exact in every dtype of a cache."""


@dataclass(frozen=True)
class Order:
    """How one page of one key head lies in memory.

    Attributes:
        kind: ``"rows"``: token after token; ``"columns"``: dimension after dimension; ``"other"``: as ``places`` says.
        places: int64 ``[tokens * D]``, where element (token, dimension) of a page lies; ``None`` unless ``"other"``.
    """

    kind: str
    places: Tensor | None = None

    @staticmethod
    def of(written: list[Tensor]) -> Order | None:
        """The order, from what was written into one page; ``None`` where it is none.

        Args:
            written: four pages ``[tokens, D]`` as they lie in memory, of which each element is, in turn, its token's
                number over and modulo :data:`DIGIT`, and its dimension's.
        """
        tokens, dim = written[0].shape
        high, low, far, near = (page.flatten().long() for page in written)
        element = (high * DIGIT + low) * dim + far * DIGIT + near
        natural = torch.arange(tokens * dim)
        if element.equal(natural):
            return Order("rows")
        if element.equal(natural.view(tokens, dim).t().flatten()):
            return Order("columns")
        places = element.argsort()
        return Order("other", places) if element[places].equal(natural) else None

    def gather(self, pages: Tensor, numbers: Tensor, out: Tensor) -> None:
        """Copy pages.

        Args:
            pages: ``[pages, H_kv, tokens, D]``, with memory in this order; numbers: int ``[n]``, which ones.
            out: ``[n, tokens, H_kv, D]``, contiguous.
        """
        if self.places is None:
            if self.kind == "columns":
                pages = pages.view(*pages.shape[:2], pages.shape[3], pages.shape[2]).transpose(2, 3)
            torch.index_select(pages.transpose(1, 2), 0, numbers, out=out)
        else:
            found = pages.flatten(2).index_select(0, numbers)[..., self.places]
            out.copy_(found.view(len(numbers), *pages.shape[1:]).transpose(1, 2))


@dataclass(frozen=True)
class Pages:
    """The cache of one layer.

    Attributes:
        k, v: ``[pages, H_kv, tokens, D]``, views; k_order, v_order: of their memory.
    """

    k: Tensor
    v: Tensor
    k_order: Order
    v_order: Order

    def gathered(self, table: Tensor, first: int, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Keys and values of a request.

        Args:
            table: int ``[>= pages of the request]``, its pages in order.
            first: tokens that it had computed before this step, which are in the pages.
            k, v: ``[rows, H_kv, D]``, those of this step.
            window: keys that a row sees, its own included; pages that no row sees may be gone, and are not read.

        Returns:
            Both ``[1, H_kv, keys, D]``: all of the request's keys, or the last ones, as far as any row sees them.
        """
        if first == 0:
            return k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        began = time.perf_counter()
        size = self.k.shape[2]
        skipped = 0 if window is None else max(0, first - window + 1) // size
        numbers = table[skipped : -(-first // size)].long()
        done = first - skipped * size
        keys = self._with(self.k, self.k_order, numbers, done, k)
        values = self._with(self.v, self.v_order, numbers, done, v)
        STATS.gathered_bytes += 2 * done * k.shape[1] * k.shape[2] * k.element_size()
        STATS.gather_seconds += time.perf_counter() - began
        return keys, values

    @staticmethod
    def _with(pages: Tensor, order: Order, numbers: Tensor, done: int, new: Tensor) -> Tensor:
        """Some pages, of which ``done`` tokens count, and the new tokens after them, ``[1, H_kv, keys, D]``."""
        rows, heads, dim = new.shape
        stored = len(numbers) * pages.shape[2]
        out = new.new_empty(max(done + rows, stored), heads, dim)
        order.gather(pages, numbers, out[:stored].view(len(numbers), pages.shape[2], heads, dim))
        out[done : done + rows] = new
        return out[: done + rows].transpose(0, 1)[None]
