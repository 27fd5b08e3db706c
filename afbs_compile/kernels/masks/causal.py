"""Causal masks: a row sees the keys up to its own; they differ in which key is a row's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels.masks.base import Band, BandMask


@dataclass(frozen=True)
class Causal(BandMask):
    """Row r sees keys 0..r: the first row the first key, as with SDPA's ``is_causal=True``."""

    name = "causal"
    words = "causal"
    local = True

    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        """See :meth:`Mask.sees`."""
        return keys <= positions

    def band(self, q_len: int, k_len: int) -> Band:
        """See :meth:`Mask.band`."""
        return Band(self.offset(q_len, k_len))

    def sdpa_arguments(self, q_len: int, k_len: int, device: torch.device) -> dict[str, Any]:
        """See :meth:`Mask.sdpa_arguments`."""
        return {"is_causal": True}


@dataclass(frozen=True)
class CausalEnd(Causal):
    """The last row sees the last key: a chunk of queries behind a cache. With as many rows as keys it is causal."""

    name = "causal_end"
    words = "causal, aligned at the end"

    def offset(self, q_len: int, k_len: int) -> int:
        """See :meth:`Mask.offset`."""
        return k_len - q_len

    def sdpa_arguments(self, q_len: int, k_len: int, device: torch.device) -> dict[str, Any]:
        """See :meth:`Mask.sdpa_arguments`: PyTorch's flag aligns the first row with the first key."""
        return {"is_causal": True} if q_len == k_len else {"attn_mask": self.matrix(q_len, k_len, device)}
