"""Calibration where memory does not suffice: the model runs dense, and a sentence says why."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from faults_model import OPTIONS, cache_in, ended_well, in_child, model, without_clock

from afbs_compile import backend
from afbs_compile.reasons import NO_MEMORY
from tests.toy import drifting

LENGTH = 4096
ROOM = tuple(range(0, 40, 4))
"""MiB that calibration may take; it needs more."""


def _limited(calibrate: Callable[..., Any], room: int) -> Callable[..., Any]:
    def limited(*arguments: Any) -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room * 2**20, hard))
        try:
            return calibrate(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    return limited


@torch.no_grad()
def _dense_and_said(room: int) -> None:
    torch._dynamo.reset()
    x = drifting(LENGTH)
    limited = patch.object(backend, "calibrate_graph", _limited(backend.calibrate_graph, room))
    with limited, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = torch.compile(model(), backend="afbs", options=OPTIONS)(x)
    if not any(NO_MEMORY in str(warning.message) for warning in caught):
        raise AssertionError("nothing was said")
    torch.testing.assert_close(output, model()(x))


def campaign(folder: Path) -> list[str]:
    """Calibrate with too little memory; with how little it went wrong."""
    with without_clock(), cache_in(folder / "memory"):
        return [f"{room} MiB" for room in ROOM if not ended_well(in_child(lambda room=room: _dense_and_said(room)))]
