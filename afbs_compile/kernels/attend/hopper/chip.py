"""What the Hopper engines ask of the chip."""

from __future__ import annotations

import functools

import torch

from afbs_compile.kernels.attend.machine import capability

ALIGNMENT = 16
"""Bytes: the copy engine's tensors start, and step from row to row, at multiples of this."""


@functools.cache  # the driver takes its time to answer
def processors(device: torch.device) -> int:
    """Multiprocessors of a Hopper GPU; 0 on every other device."""
    if capability(device) != 9:
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
