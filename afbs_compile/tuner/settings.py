"""What the tuner is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from afbs_compile.kernels.attend.engines import shapes_on
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.recipe import Method
from afbs_compile.tuner.budget import Budget
from afbs_compile.tuner.space import Parameterization


@dataclass(frozen=True)
class TuneSettings:
    """How to tune: see :mod:`afbs_compile.options` for what the user says.

    Attributes:
        budget: of the output, instead of the tolerance.
        shapes: block shapes to compare, those of the device's engines by default; ``method="paper"`` takes the first.
        asked: what the recipe records of the user's options.
    """

    tolerance: float = 0.055
    method: Method = "afbs"
    parameterization: Parameterization = "corrected"
    budget: Budget | None = None
    precision: str = "own"
    shapes: tuple[BlockShape, ...] | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)

    def shapes_on(self, device: torch.device) -> tuple[BlockShape, ...]:
        """Block shapes to compare on a device."""
        return self.shapes or shapes_on(device)
