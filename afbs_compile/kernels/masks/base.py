"""What a mask is: which keys a row sees, which blocks that makes visible, and what a kernel is told.

    row r sees key c   <=>   0 <= c < k_len  and  sees(r + offset, c)

``offset`` places the rows on the axis of the keys. The number of queries and that of keys are two numbers everywhere.
A mask is a value: masks of a kind with equal parameters are equal, and :func:`str` names kind and parameters as the
operator, the recipe and a reader know them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import Grid


class Band(NamedTuple):
    """A mask that a kernel computes from positions: row r sees the keys from :meth:`start` to ``r + upper``.

    Attributes:
        upper: how far ahead of its own index a row sees; bounded: whether it is; where it is not, every key is seen.
        width: how many keys back a row sees, its last one included; 0 for all of them.
        chunked: whether it is not the last ``width`` keys that a row sees, but those of its chunk: keys are cut into
            chunks of ``width``, and the row's last key says which is its own.
    """

    upper: int = 0
    bounded: bool = True
    width: int = 0
    chunked: bool = False

    def start(self, rows: Tensor) -> Tensor:
        """The first key that each row sees, where the band is bounded; 0 or less for all from the first key on."""
        last = rows + self.upper
        if self.chunked:
            return torch.div(last, self.width, rounding_mode="floor") * self.width
        return last - self.width + 1 if self.width else torch.zeros_like(last)


class Visibility(NamedTuple):
    """What a mask makes of blocks.

    Attributes:
        visible: bool ``[n_q, n_k]``, some row of the query block sees some key of the key block.
        whole: bool ``[n_q, n_k]``, every row sees every key, and no key is missing at the end.
        blurred: bool ``[n_q, n_k]``, visible, and some key of the key block is seen by no row of the query block: what
            is known of the key block as a whole must not say anything about it.
    """

    visible: Tensor
    whole: Tensor
    blurred: Tensor


@dataclass(frozen=True)
class Mask(ABC):
    """Which keys a row sees. A kind is a frozen dataclass whose fields are its parameters, whole numbers.

    Attributes:
        name: of the kind. words: the kind as a reader is told.
        local: whether rows look back: the keys right before a row matter, and the last rows have seen everything, so
            calibration keeps blocks for both; and the first rows of an input are a shorter input.
        hides_nothing: whether every row sees every key.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    local: ClassVar[bool]
    hides_nothing: ClassVar[bool] = False

    @abstractmethod
    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        """The specification, element by element.

        Args:
            positions: of rows, ``r + offset``; keys: indices that exist. Integers that broadcast to each other.

        Returns:
            bool, of their common shape.
        """

    @classmethod
    def proposed(cls, seen: Tensor) -> Iterable[Mask]:
        """The masks of the kind that a matrix may be, to be compared with it element by element.

        Args:
            seen: bool ``[q_len, k_len]``.
        """
        return () if fields(cls) else (cls(),)

    def offset(self, q_len: int, k_len: int) -> int:
        """Position of row 0 among the keys."""
        return 0

    def band(self, q_len: int, k_len: int) -> Band | None:
        """The mask as kernels compute it; ``None`` where it is no band."""
        return None

    def matrix(self, q_len: int, k_len: int, device: torch.device) -> Tensor:
        """bool ``[q_len, k_len]``, true where the row sees the key."""
        rows = torch.arange(q_len, device=device)[:, None] + self.offset(q_len, k_len)
        return self.sees(rows, torch.arange(k_len, device=device)).expand(q_len, k_len)

    def visibility(self, grid: Grid, device: torch.device) -> Visibility:
        """What the mask makes of every block, by looking at all of its rows and keys."""
        keys = torch.arange(grid.k_len, device=device)
        missing = grid.count_k * grid.shape.k - grid.k_len
        exists = torch.nn.functional.pad(keys >= 0, (0, missing)).view(grid.count_k, grid.shape.k)
        parts = []
        for first in range(0, grid.q_len, grid.shape.q):
            rows = torch.arange(first, min(first + grid.shape.q, grid.q_len), device=device)
            seen = self.sees(rows[:, None] + self.offset(grid.q_len, grid.k_len), keys).expand(len(rows), -1)
            seen = torch.nn.functional.pad(seen, (0, missing)).unflatten(1, (grid.count_k, grid.shape.k))
            somewhere = seen.any(0)
            visible = somewhere.any(1)
            parts.append((visible, seen.all(2).all(0), visible & (exists & ~somewhere).any(1)))
        return Visibility(*(torch.stack(part) for part in zip(*parts, strict=True)))

    def work(self, q_len: int, k_len: int) -> int:
        """How many (row, key) pairs are seen."""
        return int(self.matrix(q_len, k_len, torch.device("cpu")).sum())

    def sdpa_arguments(self, q_len: int, k_len: int, device: torch.device) -> dict[str, Any]:
        """The mask as ``F.scaled_dot_product_attention`` takes it."""
        return {"attn_mask": self.matrix(q_len, k_len, device)}

    def __str__(self) -> str:
        parameters = ",".join(str(getattr(self, field.name)) for field in fields(self))
        return f"{self.name}({parameters})" if parameters else self.name


@dataclass(frozen=True)
class BandMask(Mask):
    """A mask that is a band: its blocks follow from the positions of their first and last rows and keys."""

    @abstractmethod
    def band(self, q_len: int, k_len: int) -> Band:
        """The band."""

    def visibility(self, grid: Grid, device: torch.device) -> Visibility:
        """See :meth:`Mask.visibility`."""
        first_row = torch.arange(grid.count_q, device=device)[:, None] * grid.shape.q
        last_row = (first_row + grid.shape.q).clamp_max(grid.q_len) - 1
        first_key = torch.arange(grid.count_k, device=device) * grid.shape.k
        end_key = first_key + grid.shape.k
        everything = torch.ones(grid.count_q, grid.count_k, dtype=torch.bool, device=device)
        whole = everything & (end_key <= grid.k_len)
        band = self.band(grid.q_len, grid.k_len)
        if not band.bounded:
            return Visibility(everything, whole, ~everything)
        last_key = end_key.clamp_max(grid.k_len) - 1
        # Rows see more and more distant keys: of the rows that reach the block, the first looks back the furthest.
        nearest_row = torch.maximum(first_row, first_key - band.upper)
        visible = (nearest_row <= last_row) & (band.start(nearest_row) <= last_key)
        whole = whole & (end_key - 1 <= first_row + band.upper) & (band.start(last_row) <= first_key)
        covered = (band.start(first_row) <= first_key) & (last_key <= last_row + band.upper)
        return Visibility(visible, whole, visible & ~covered)

    def work(self, q_len: int, k_len: int) -> int:
        """See :meth:`Mask.work`."""
        band = self.band(q_len, k_len)
        if not band.bounded:
            return q_len * k_len
        rows = torch.arange(q_len)
        ends = (rows + band.upper + 1).clamp_max(k_len)
        return int((ends - band.start(rows).clamp_min(0)).clamp_min(0).sum())
