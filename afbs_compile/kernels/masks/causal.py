"""``causal``: a row sees the keys up to its own, the first row the first key, as with SDPA's ``is_causal=True``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels.masks.base import Band, BandMask


@dataclass(frozen=True)
class Causal(BandMask):
    """Row r sees keys 0..r."""

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
