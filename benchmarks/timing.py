"""Times of calls that take turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE_SECONDS = 0.03
"""A sample repeats its call back to back until it fills about this much: the host's work then hides behind the
device's as far as it does in a model, and no further."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call over several samples: median, least and greatest."""

    median: float
    low: float
    high: float


def times(calls: Mapping[str, Call], rounds: int = 7, sample_seconds: float = SAMPLE_SECONDS) -> dict[str, Times]:
    """Time every call ``rounds`` times, in turns, after a call that compiles and a sample that warms up."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(sample_seconds * 1e3 / max(_sample(call, 1), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_sample(call, repeats[name]))
    return {name: Times(statistics.median(s), min(s), max(s)) for name, s in samples.items()}


def _sample(call: Call, repeats: int) -> float:
    """Milliseconds per call, on the device's own clock where there is one."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - began) * 1e3 / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def replayed(call: Call) -> Call:
    """The call as a CUDA graph: its time is the device's alone."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def matrix_tflops(dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product on random data: the ceiling that rooflines refer to."""
    gpu = torch.cuda.is_available()
    size = 8192 if gpu else 2048
    a, b = (torch.randn(size, size, device="cuda" if gpu else "cpu", dtype=dtype) for _ in range(2))
    return 2 * size**3 / times({"product": lambda: a @ b})["product"].median / 1e9
