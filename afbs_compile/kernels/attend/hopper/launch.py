"""The launch of the Hopper kernel, and what its FP8 sibling launches alike."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from afbs_compile.kernels.attend.hopper.chip import ALIGNMENT, processors
from afbs_compile.kernels.attend.hopper.common import CHUNK, ROWS
from afbs_compile.kernels.attend.hopper.kernel import forward_kernel
from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.band import as_band, partial_at_most, seen_by_blocks
from afbs_compile.kernels.masks.band_triton import form
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.attention import LOG2_E

CACHED_BYTES = 24 << 20
"""Keys and values that are read at the same time: half of the 50 MB cache, for each half of it keeps its own copy."""

CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
"""Registers a thread of the second consumer and of the producer; the first consumer has what they leave of 504."""


def stages(head_dim: int) -> int:
    """Steps of keys and values that fit the 227 KB of shared memory beside a tile of queries; four are enough."""
    return 3 if head_dim == 128 else 4


def section(k_len: int, head_dim: int, groups: int, element_bytes: int) -> int:
    """Query heads whose keys and values fit :data:`CACHED_BYTES` together.

    They are worked on in turns. Heads that share keys and values stay together.
    """
    return groups * max(1, CACHED_BYTES // (2 * element_bytes * k_len * head_dim))


@functools.cache
def _copy_layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """How a copy of two-byte elements lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], gl.bfloat16)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy engine knows of ``x``: it fills rows past the end with zeros."""
    # A dimension of one element is never stepped along, and its stride may be anything.
    strides = [s if size > 1 else ALIGNMENT for size, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns], _copy_layout(rows, columns))


def walk(operands: Operands, shape: BlockShape, element_bytes: int) -> dict[str, Any]:
    """What a kernel's warp groups are told of sizes and of the mask's bound; heads that share a selection are one.

    Args:
        operands: of the call; shape: rows per block.
        element_bytes: of a key's element as the kernel reads it.
    """
    grid, band, (batch, _, _, dim) = operands.grid(shape), as_band(operands), operands.q.shape
    heads, groups = operands.heads // shape.heads, operands.groups // shape.heads
    return {
        "q_len": grid.q_len,
        "k_len": grid.k_len,
        "upper": band.upper,
        "heads": heads,
        "groups": groups,
        "planes": batch * heads,
        "section": section(grid.k_len, dim, groups, element_bytes),
        "count_q": grid.count_q,
        "count_k": grid.count_k,
    }


def programs(operands: Operands, shape: BlockShape) -> tuple[int]:
    """A launch grid of programs that stay on their multiprocessor."""
    tiles = operands.q.shape[0] * operands.heads // shape.heads * operands.grid(shape).count_q
    return (min(processors(operands.device), tiles),)


def attend(operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
    """:meth:`afbs_compile.kernels.attend.hopper.engine.Hopper.attend`.

    Lists are walked from their ends, so sums are rounded in another order than by the portable kernel. No host
    synchronisation; may be captured into a CUDA graph; the same inputs give the same bits.
    """
    operands, valid = operands.with_positive_scale(), operands.valid
    band, clean = as_band(operands), not seen_by_blocks(operands, call.shape)
    scale, dim = operands.scale * LOG2_E, operands.q.shape[3]
    with torch.cuda.device_of(out):  # Triton launches on the current device.
        forward_kernel[programs(operands, call.shape)](
            _descriptor(operands.q, ROWS.value, dim),
            _descriptor(operands.k, call.shape.k, CHUNK.value),
            _descriptor(operands.v, call.shape.k, CHUNK.value),
            out,
            *lists,
            torch.zeros(1, dtype=torch.int32, device=out.device),
            scale,
            2.0 ** math.ceil(math.log2(scale)),
            *out.stride()[:3],
            **walk(operands, call.shape, operands.k.element_size()),
            valid=lists.whole if valid is None else valid.contiguous().view(torch.uint8),
            stride_valid=operands.k_len,
            width=max(band.width, 1),
            FORM=form(band),
            HEAD_DIM=dim,
            HEADS=call.shape.heads,
            BLOCK_K=call.shape.k,
            MORE_MASKS=clean or partial_at_most(operands, call.shape) > 1,
            VALID=valid is not None,
            CLEAN=clean,
            STAGES=stages(dim),
            CONSUMER_REGISTERS=CONSUMER_REGISTERS,
            PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4,
        )
