"""The model that faults are tried on: two attention layers, compiled and calibrated in a second or two."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from afbs_compile.cache import ENVIRONMENT_VARIABLE
from afbs_compile.found import FoundGraph
from afbs_compile.passes.record import record_graphs
from tests.toy import Toy, drifting, without_a_clock

LENGTH, MIN_LENGTH = 512, 128
OPTIONS = {"min_length": MIN_LENGTH, "tolerance": 0.055}


def model() -> Toy:
    """Always with the same weights."""
    return Toy().eval()


def inputs() -> Tensor:
    """Always the same."""
    return drifting(LENGTH)


def compiled() -> Tensor:
    """The output of the first call of the model compiled anew: what it calibrates or finds in the cache decides."""
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output: Tensor = torch.compile(model(), backend="afbs", options=OPTIONS)(inputs())
    return output


def graph() -> FoundGraph:
    """The model as the backend sees it."""
    with torch.no_grad():
        (captured,) = record_graphs(model(), [inputs()])
        return FoundGraph.of(captured.gm, captured.samples[0], MIN_LENGTH)


@contextmanager
def cache_in(folder: Path) -> Iterator[Path]:
    """Let the cache be in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, str(folder))
        yield folder


@contextmanager
def without_clock() -> Iterator[None]:
    """Every sparse call is found to pay, whatever else this machine does."""
    with pytest.MonkeyPatch.context() as patch:
        without_a_clock(patch)
        yield


def in_child(work: Callable[[], object]) -> int:
    """Begin something in a forked process, which ends with 0 if it succeeds; its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended_well(child: int) -> bool:
    """Wait for a process; whether it succeeded."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def kill(child: int) -> bool:
    """Kill a process by SIGKILL; whether it was still at work."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
