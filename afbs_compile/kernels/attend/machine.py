"""What the rest of the package asks of a device; only engines and this module know kinds of devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Result = TypeVar("Result")

ROUND_SECONDS = {"cuda": 0.001}
"""Calls shorter than this are repeated within a round of timing until they fill it; 0.02 on other devices."""

ROUNDS, ROUNDS_OF_LONG_CALLS = 3, 1
"""Rounds of short calls, and of long ones, which average the noise themselves. Other work disturbs a CPU; a GPU has
none, and is better spent elsewhere."""


def kind(device: torch.device) -> str:
    """What a recipe records of a device."""
    return device.type


def identity(device: torch.device) -> list[Any]:
    """What must be equal for a measured speed to hold: the chip, or the kind of device and the threads."""
    return [torch.cuda.get_device_name(device)] if runs_triton(device) else [device.type, torch.get_num_threads()]


def runs_triton(device: torch.device) -> bool:
    """Whether predictors, passes and attention run on Triton there."""
    return device.type == "cuda"


def reads_freely(device: torch.device) -> bool:
    """Whether the host reads values there without waiting for anything."""
    return device.type == "cpu"


def is_nvidia(device: torch.device) -> bool:
    """Whether it is a GPU of NVIDIA's."""
    return runs_triton(device) and torch.version.hip is None


def capability(device: torch.device) -> int:
    """Major compute capability of an NVIDIA GPU; 0 on every other device."""
    return torch.cuda.get_device_capability(device)[0] if is_nvidia(device) else 0


def fp32_products(device: torch.device) -> str:
    """How Triton multiplies fp32 operands.

    Three tf32 products carry 22 to 24 bits of each operand, as much as fp32 rounding leaves of a sum, on the tensor
    cores. Plain IEEE products run on the scalar units and need tiles too small for them.
    """
    return "tf32x3" if is_nvidia(device) else "ieee"


def loads_as_saved(device: torch.device) -> bool:
    """Whether half precisions are fast there, so that a checkpoint's own dtype is kept."""
    return device.type != "cpu"


def indices(values: Iterable[Any]) -> list[int]:
    """Indices of the GPUs that hold some of the values, whose random state a run may move."""
    return sorted({value.device.index or 0 for value in values if isinstance(value, Tensor) and value.is_cuda})


def is_recording(device: torch.device) -> bool:
    """Whether what is launched there is recorded into a CUDA graph, where the host has no say at a replay."""
    return runs_triton(device) and torch.cuda.is_current_stream_capturing()


def wait(values: Any) -> None:
    """Return once the tensors among the values are there."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            torch.accelerator.synchronize(leaf.device)
            return


def without_autocast(device: torch.device) -> torch.autocast:
    """Context in which the operands' dtype decides: autocast would predict, and return, in another one."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def autocast_kept(device: torch.device) -> Iterator[None]:
    """Run without autocast, and give the surrounding program its own autocast state back."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    torch.set_autocast_enabled(device.type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device.type, enabled)
        torch.set_autocast_dtype(device.type, dtype)


def is_shared(device: torch.device) -> bool:
    """Whether other processes take time from calls there as they please, which only their CPU time does not show."""
    return device.type == "cpu"


def round_seconds(device: torch.device) -> float:
    """Seconds that a round of timing fills at least."""
    return ROUND_SECONDS.get(device.type, 0.02)


def rounds(device: torch.device, *, long: bool) -> int:
    """Rounds of timing after the first."""
    if runs_triton(device):
        return 0 if long else 1
    return ROUNDS_OF_LONG_CALLS if long else ROUNDS


def clocked(call: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], float]]:
    """A call's result, and what gives its milliseconds: nothing waits for a GPU before that is asked for."""
    if not runs_triton(device):
        began = time.perf_counter()
        result = call()
        ms = (time.perf_counter() - began) * 1e3
        return result, lambda: ms
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = call()
        end.record()

    def elapsed() -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))

    return result, elapsed


def compile_key(device: torch.device, dtype: torch.dtype, head_dim: int) -> Hashable:
    """Calls that a compiler takes alike."""
    return device.type, dtype, head_dim
