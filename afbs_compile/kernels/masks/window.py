"""Masks by distance: a row sees keys near its own, or those of its chunk. The last row's own key is the last one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.masks.base import Band, BandMask, Mask


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"width is {width}; accepted: 1 or more")


class _AtTheEnd(BandMask):
    """Rows are aligned with the last keys, as behind a cache."""

    def offset(self, q_len: int, k_len: int) -> int:
        """See :meth:`Mask.offset`."""
        return k_len - q_len


@dataclass(frozen=True)
class Window(_AtTheEnd):
    """A row sees its own key and the ``width - 1`` before it (Mistral, Gemma)."""

    width: int

    name = "window"
    words = "causal in a sliding window"
    local = True

    def __post_init__(self) -> None:
        _check_width(self.width)

    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        """See :meth:`Mask.sees`."""
        return (keys <= positions) & (keys > positions - self.width)

    def band(self, q_len: int, k_len: int) -> Band:
        """See :meth:`Mask.band`."""
        return Band(self.offset(q_len, k_len), width=self.width)

    @classmethod
    def proposed(cls, seen: Tensor) -> Iterable[Mask]:
        """The last row sees as many keys as any row does, unless the window is wider than the keys."""
        width = int(seen[-1:].sum())
        return (cls(width),) if 0 < width < seen.shape[1] else ()


@dataclass(frozen=True)
class Chunk(_AtTheEnd):
    """A row sees the keys up to its own in its chunk of ``width`` keys, counted from the first key (Llama 4)."""

    width: int

    name = "chunk"
    words = "causal in chunks"
    local = True

    def __post_init__(self) -> None:
        _check_width(self.width)

    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        """See :meth:`Mask.sees`."""
        own, its = (torch.div(x, self.width, rounding_mode="floor") for x in (positions, keys))
        return (keys <= positions) & (own == its)

    def band(self, q_len: int, k_len: int) -> Band:
        """See :meth:`Mask.band`."""
        return Band(self.offset(q_len, k_len), width=self.width, chunked=True)

    @classmethod
    def proposed(cls, seen: Tensor) -> Iterable[Mask]:
        """The row before the first one that forgets sees a whole chunk; where none does, all rows are in one chunk."""
        forgets = (seen[:-1] & ~seen[1:]).any(1).nonzero()
        width = int(seen[int(forgets[0])].sum()) if len(forgets) else int(seen[:1].int().argmax())
        return (cls(width),) if 0 < width < seen.shape[1] else ()


@dataclass(frozen=True)
class Around(_AtTheEnd):
    """A row sees its own key, ``behind`` keys before it and ``ahead`` after it: a window that looks both ways."""

    behind: int
    ahead: int

    name = "around"
    words = "a window both ways"
    local = False

    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        """See :meth:`Mask.sees`."""
        return (keys >= positions - self.behind) & (keys <= positions + self.ahead)

    def band(self, q_len: int, k_len: int) -> Band:
        """See :meth:`Mask.band`."""
        return Band(self.offset(q_len, k_len) + self.ahead, width=self.behind + self.ahead + 1)

    @classmethod
    def proposed(cls, seen: Tensor) -> Iterable[Mask]:
        """The first row has the keys ahead, the last one those behind."""
        if not seen.numel():
            return ()
        furthest, nearest = (
            int((seen[0] * torch.arange(seen.shape[1], device=seen.device)).max()),
            int(seen[-1].int().argmax()),
        )
        ahead, behind = furthest - (seen.shape[1] - seen.shape[0]), seen.shape[1] - 1 - nearest
        return (cls(behind, ahead),) if ahead > 0 else ()
