"""A budget on the model's output: which change of it is counted, how much, and how sure a measurement of it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.stats import t as student

from afbs_compile.tuner.end_to_end import OutputChange

Quantity = Literal["kl", "perplexity", "output"]
QUANTITIES: tuple[str, ...] = get_args(Quantity)

CONFIDENCE = 0.95
"""Of the upper end of a measured cost."""


@dataclass(frozen=True)
class Budget:
    """What the output may change by.

    Attributes:
        quantity: ``"kl"``: mean KL(dense || sparse) of the next-token distributions, nats. ``"perplexity"``: relative
            rise of the perplexity. ``"output"``: relative L1 error of the output, ``sum|y - y_dense| / sum|y_dense|``.
        limit: largest accepted value, e.g. 0.01.
    """

    quantity: Quantity
    limit: float

    def cost(self, changes: Sequence[OutputChange]) -> float:
        """The quantity over several pieces of output, which have about as many positions each."""
        return self._as_told(float(np.mean(self._values(changes))))

    def upper(self, changes: Sequence[OutputChange]) -> float | None:
        """The upper end of the one-sided confidence interval of :meth:`cost`; ``None`` with fewer than two pieces.

        Student's t over the pieces' paired differences between the dense and the sparse model. Pieces of one sample
        differ in how far they look back, which makes the interval wider than chance alone would.
        """
        values = self._values(changes)
        if len(values) < 2:
            return None
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
        return self._as_told(float(np.mean(values)) + float(student.ppf(CONFIDENCE, len(values) - 1)) * error)

    def _values(self, changes: Sequence[OutputChange]) -> list[float]:
        name = "loss" if self.quantity == "perplexity" else self.quantity
        return [getattr(change, name) for change in changes]

    def _as_told(self, value: float) -> float:
        return math.expm1(value) if self.quantity == "perplexity" else value
