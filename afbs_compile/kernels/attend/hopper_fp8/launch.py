"""The launches of the FP8 engine: operands are rounded, then attended."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from afbs_compile.kernels.attend.hopper.launch import CONSUMER_REGISTERS, PRODUCER_REGISTERS, programs, walk
from afbs_compile.kernels.attend.hopper_fp8.kernel import forward_kernel
from afbs_compile.kernels.attend.hopper_fp8.rounding import quantise
from afbs_compile.kernels.blocks import BlockLists
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.band import told
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.fp8 import BLOCK

STAGES = 4
"""Steps whose keys and values are kept."""


@functools.cache
def _copy_layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """How a copy of bytes lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], gl.float8e4nv)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy engine knows of ``x``: it fills what lies past the end with zeros."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, columns], _copy_layout(rows, columns))


def attend(operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
    """:meth:`afbs_compile.kernels.attend.hopper_fp8.engine.HopperFp8.attend`."""
    dim = out.shape[3]
    with torch.cuda.device_of(out):  # Triton launches on the current device.
        rounded = quantise(operands, call.fp8_constants)
        forward_kernel[programs(operands, call.shape)](
            _descriptor(rounded.q, BLOCK // 2, dim),
            _descriptor(rounded.k, BLOCK, dim),
            _descriptor(rounded.v, dim, BLOCK // 2),
            rounded.q_scale,
            rounded.k_scale.view(torch.int32),
            rounded.v_scale.view(torch.int32),
            out,
            *lists,
            torch.zeros(1, dtype=torch.int32, device=out.device),
            *out.stride()[:3],
            **walk(operands, call.shape, rounded.k.element_size()),
            BOUNDED=told(operands).bounded,
            HEAD_DIM=dim,
            STAGES=STAGES,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS,
            PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4,
        )
