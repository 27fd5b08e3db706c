"""Masks from outside the package, for tests."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from afbs_compile.kernels.masks.base import Mask


@dataclass(frozen=True)
class Dilated(Mask):
    """A row sees its own key and every ``step``-th one before it: no band."""

    name = "dilated"
    words = "dilated"
    local = True
    step: int

    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        return (keys <= positions) & ((positions - keys) % self.step == 0)
