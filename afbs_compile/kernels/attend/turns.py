# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Whether other processes take turns at a GPU: kernels of known length in a row, which say when each began and ended.

A GPU that several processes use works for one of them at a time. Whether it goes to the next in the middle of a kernel
or between two, a row of kernels takes longer than they are long. Processes that share it by MPS run at once, which this
does not show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

KERNELS, NANOSECONDS = 60, 200_000
"""So many in a row, each so long: in all more than the few milliseconds of a turn."""


@triton.jit
def _now():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["number", "nanoseconds"])
def _spin_kernel(times, number, nanoseconds):
    """Wait for the GPU's clock, and write when that began and ended."""
    began = _now()
    now = began
    while now - began < nanoseconds:
        now = _now()
    tl.store(times + 2 * number, began)
    tl.store(times + 2 * number + 1, now)


def interruption(device: torch.device) -> float:
    """How much longer kernels in a row take on an NVIDIA GPU than they are long, as a share; waits for them."""
    times = torch.zeros(KERNELS + 1, 2, dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        for number in range(KERNELS + 1):  # the first one is compiled and loaded, and counts for nothing
            _spin_kernel[(1,)](times, number, NANOSECONDS, num_warps=1)
    began, ended = times[1, 0].item(), times[-1, 1].item()
    return (ended - began) / (KERNELS * NANOSECONDS) - 1
