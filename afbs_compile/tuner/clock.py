"""Milliseconds of calls, such that other work on the machine does not decide which of them is the faster one.

On a CPU every round says how long its threads waited for a processor (Linux counts it:
``/proc/[pid]/task/[tid]/schedstat``). Where even the best round was disturbed, wall-clock times say little: a call of
many short parallel loops waits at the end of each for the thread that was put off, and burns time while it does. What
is left is what a call computes: its CPU time in one thread, which nobody can put off and which waits for nobody. On a
GPU there is no such time. Whether another process uses it is asked of kernels in a row (:func:`is_busy`); then the
least time of single calls counts, which may fit between the turns of others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from afbs_compile.kernels.attend.machine import clocked, is_nvidia, is_shared, round_seconds, rounds

BUSY = 0.1
"""A round is disturbed in which threads waited for a processor for more than this share of it; others use a GPU on
which kernels in a row take so much longer than they are long."""

PROBE_SECONDS = 0.02
"""What it takes to see whether a machine is busy."""

CPU_ROUNDS = 3

SINGLE_CALLS = 20
"""Of each call, on a GPU that others use."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Times:
    """Of some calls that were timed together.

    Attributes:
        ms: milliseconds of each; busy: whether the machine had other work: they are CPU times, or those of a GPU that
            other processes use.
    """

    ms: tuple[float, ...]
    busy: bool


def timed(calls: Sequence[Call], *, crowded: bool = False) -> Times:
    """Milliseconds of each call, synchronised on accelerators: the best of rounds in which the calls take turns.

    Other work on the machine only ever adds time, and taking turns lets it hit all calls alike. Where it hit all
    rounds, the CPU time of one thread over the number of threads stands in.

    Args:
        calls: to time; crowded: whether other processes use the GPU, as :func:`is_busy` says.
    """
    device, *_ = [call().device for call in calls]  # compiles, allocates
    if crowded:
        rounds_of_one = [[clocked(call, device)[1]() for call in calls] for _ in range(SINGLE_CALLS)]
        return Times(tuple(map(min, zip(*rounds_of_one, strict=True))), busy=True)
    times = [[_round(call, 1) for call in calls]]
    repeats = [max(1, round(round_seconds(device) / first.seconds)) for first in times[0]]
    further = rounds(device, long=max(repeats) == 1)
    times += [[_round(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(further)]
    best = [min(column) for column in zip(*times, strict=True)]
    if is_shared(device) and any(each.is_disturbed for each in best):
        return Times(_cpu_ms(calls), busy=True)
    return Times(tuple(each.seconds * 1e3 for each in best), busy=False)


def is_busy(device: torch.device) -> bool:
    """Whether calls have to wait for other work on a device at the moment; false where the system does not say."""
    if is_nvidia(device):
        from afbs_compile.kernels.attend.turns import interruption  # Triton is not installed everywhere.

        return interruption(device) > BUSY
    if not is_shared(device):
        return False
    x = torch.ones(256, 256)
    began, waited = time.perf_counter(), _waited_seconds()
    while (gone := time.perf_counter() - began) < PROBE_SECONDS:
        x @ x
    return _waited_seconds() - waited > BUSY * gone


@dataclass(frozen=True, order=True)
class _Round:
    """Mean of the calls in one round: seconds that passed, and that threads waited for a processor."""

    seconds: float
    waited: float

    @property
    def is_disturbed(self) -> bool:
        return self.waited > BUSY * self.seconds


def _round(call: Call, repeats: int) -> _Round:
    from torch.utils.benchmark import Timer  # looks for compilers as it is imported, and may print what it lacks

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    waited = _waited_seconds()
    seconds = timer.timeit(repeats).mean
    return _Round(seconds, (_waited_seconds() - waited) / repeats)


def _waited_seconds() -> float:
    """Seconds that the threads of this process have waited for a processor so far; 0 where the system does not say."""
    waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(thread.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # it has just ended
            continue
    return waited * 1e-9


def _cpu_ms(calls: Sequence[Call]) -> tuple[float, ...]:
    """Milliseconds of CPU time in one thread over the number of threads, best of rounds in which calls take turns."""
    threads = torch.get_num_threads()
    best = [float("inf")] * len(calls)
    torch.set_num_threads(1)
    try:
        for call in calls:
            call()  # FlexAttention compiles for the number of threads
        for _ in range(CPU_ROUNDS):
            for place, call in enumerate(calls):
                began = time.thread_time()
                call()
                best[place] = min(best[place], time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    return tuple(seconds * 1e3 / threads for seconds in best)
