"""Stage 3 of ``method="afbs"``: check every input and step back until all pass, or make the head DENSE."""

from __future__ import annotations

import torch

from afbs_compile.kernels.reference import LAMBDA_OFF
from afbs_compile.tuner.measure import Measurement, Meter
from afbs_compile.tuner.space import Thresholds

STEP_BACK = 0.75
"""A failing head keeps this share of its 1 - tau."""

MAX_STEPS_BACK = 6


def validate(meter: Meter, thresholds: Thresholds, tolerance: float) -> tuple[Thresholds, Measurement]:
    """Thresholds that hold the tolerance on every input of the meter, and their measurement.

    Unlike the paper's single step back, every step is measured again; a head that still fails becomes DENSE, whose
    error is 0 by definition.
    """
    measured = meter(thresholds)
    for _ in range(MAX_STEPS_BACK):
        failing = _failing(thresholds, measured, tolerance)
        if not failing.any():
            break
        retreat = Thresholds(
            1 - STEP_BACK * (1 - thresholds.tau), thresholds.theta, torch.full_like(thresholds.lam, LAMBDA_OFF)
        )
        thresholds = retreat.where(failing, thresholds)
        measured = meter(thresholds)
    passing = ~_failing(thresholds, measured, tolerance) & ~thresholds.is_dense
    thresholds = thresholds.where(passing, Thresholds.dense(meter.heads))
    return thresholds, measured.only(passing)


def _failing(thresholds: Thresholds, measured: Measurement, tolerance: float) -> torch.Tensor:
    return ~(measured.worst <= tolerance) & ~thresholds.is_dense
