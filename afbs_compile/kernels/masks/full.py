"""``full``: every row sees every key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels.masks.base import Band, BandMask


@dataclass(frozen=True)
class Full(BandMask):
    """Nothing is hidden."""

    name = "full"
    words = "not causal"
    local = False
    hides_nothing = True

    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        """See :meth:`Mask.sees`."""
        return (positions >= positions) & (keys >= keys)

    def band(self, q_len: int, k_len: int) -> Band:
        """See :meth:`Mask.band`."""
        return Band(bounded=False)

    def sdpa_arguments(self, q_len: int, k_len: int, device: torch.device) -> dict[str, Any]:
        """See :meth:`Mask.sdpa_arguments`."""
        return {}
