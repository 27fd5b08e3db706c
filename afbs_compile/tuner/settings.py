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

AUTOMATIC = Budget("kl", 0.01)
"""What a language model may change by where the user says nothing. KL is known with less noise than perplexity: of a
40M Llama at 8K tokens this is +0.2 to +0.45 % of it, on four kinds of text (``benchmarks/frontier.py``)."""


@dataclass(frozen=True)
class TuneSettings:
    """How to tune: see :mod:`afbs_compile.options` for what the user says.

    Attributes:
        budget: of the output, instead of the tolerance.
        automatic: whether a graph that returns the logits of its tokens gets :data:`AUTOMATIC` instead.
        shapes: block shapes to compare, those of the device's engines by default; ``method="paper"`` takes the first.
        reduced: whether a model is calibrated again, for which ``method="paper"`` has a smaller budget of evaluations.
        asked: what the recipe records of the user's options.
    """

    tolerance: float = 0.055
    method: Method = "afbs"
    parameterization: Parameterization = "corrected"
    budget: Budget | None = None
    automatic: bool = False
    precision: str = "own"
    shapes: tuple[BlockShape, ...] | None = None
    reduced: bool = False
    asked: Mapping[str, Any] = field(default_factory=dict)

    def shapes_on(self, device: torch.device) -> tuple[BlockShape, ...]:
        """Block shapes to compare on a device."""
        return self.shapes or shapes_on(device)
