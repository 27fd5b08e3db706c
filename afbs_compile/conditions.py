"""What must be equal for a cached recipe to be used."""

from __future__ import annotations

from typing import Any

import torch

from afbs_compile.kernels.attend import machine
from afbs_compile.kernels.spec.selection import PREDICTOR_VERSION
from afbs_compile.options import Options
from afbs_compile.recipe import SCHEMA_VERSION
from afbs_compile.tuner import measure
from afbs_compile.version import __version__


def conditions(device: torch.device, settings: Options, **model: Any) -> dict[str, Any]:
    """Everything that decides what calibration would find, as JSON has it.

    Args:
        device: that the calls run on; settings: options.
        model: what tells the model and its calls.
    """
    return {
        "version": __version__,  # another one may know better candidates
        "schema": SCHEMA_VERSION,
        "predictor": PREDICTOR_VERSION,
        "device": machine.identity(device),
        "torch": torch.__version__,
        "shapes": settings.tuning.shapes_on(device),
        "kept": measure.LOCAL_KEPT,
        **model,
        **{f"option {name}": value for name, value in settings.key.items()},
    }
