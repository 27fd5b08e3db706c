"""What the host does for Triton kernels: constants on the device, and launches that cost little.

``kernel[grid](...)`` inspects every argument at every launch, to find what it must be compiled for: tens of
microseconds, and a sparse call launches four kernels. What Triton compiles for follows from dtype and alignment of the
tensors and from the other arguments; where those are as in an earlier call, its compiled kernel is launched directly.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; Triton compiles another kernel for pointers that are not multiples of it."""

MOST_KINDS = 1024
"""Kinds remembered per kernel. Every length is one; past this many all are forgotten, which costs time only."""


@functools.cache
def device_constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copy per-head constants to the device, once for each distinct tuple.

    The tensors are never evicted: a captured CUDA graph may hold their address. The first call for a tuple
    synchronises with the device, so it must not fall into a CUDA graph capture (run the function once before).

    Returns:
        fp32 ``[len(values)]``.
    """
    # On a thread of its own, because during the warm-up of its CUDA graphs inductor sends every allocation of the
    # calling thread to the graph's pool, and takes a tensor that outlives the call for an error.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.tensor, values, dtype=torch.float32, device=device).result()


def padded(size: int) -> int:
    """The power of two, at least 16, that holds ``size``: what Triton takes as an extent of a tile."""
    return max(16, 1 << (size - 1).bit_length())


def layout(x: Tensor) -> Hashable:
    """All of a tensor but its data that Triton may compile for, and its sizes and strides."""
    return x.device.index, x.dtype, x.shape, x.stride(), x.data_ptr() % ALIGNMENT == 0


class Launcher:
    """One jitted kernel.

    Args:
        kernel: what ``triton.jit`` returned; it is called with all its arguments by position.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, kind: Hashable, programs: int, *arguments: Any, warps: int, stages: int = 1) -> None:
        """Launch on the current device, which must be that of the tensors.

        Args:
            kind: calls with equal kinds have equal arguments, but for the data of tensors: it holds the
                :func:`layout` of every tensor that the caller did not allocate for this call, and every number.
            programs: size of the grid.
            arguments: the kernel's arguments, compile-time constants included.
            warps, stages: warps per program, depth of the software pipeline.
        """
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[programs, 1, 1](*arguments)
            return
        if len(self._compiled) >= MOST_KINDS:
            self._compiled.clear()
        compiled = self.kernel[programs,](*arguments, num_warps=warps, num_stages=stages)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._compiled[kind] = compiled
