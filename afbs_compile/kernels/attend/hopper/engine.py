"""The Hopper engine: when it may be used; the kernel is in :mod:`afbs_compile.kernels.attend.hopper.kernel`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from afbs_compile.kernels.attend.hopper.chip import ALIGNMENT, processors
from afbs_compile.kernels.attend.machine import kind
from afbs_compile.kernels.attend.portable.engine import TritonFamily
from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.call import LAMBDA_OFF, SparseCall
from afbs_compile.kernels.masks import band
from afbs_compile.kernels.operands import Operands

HEAD_DIMS = (64, 128)

SHAPES = (BlockShape(128, 128), BlockShape(128, 64), BlockShape(64, 64, heads=2))
"""What a tile may be; others would compute something else."""


def unsuited(operands: Operands, call: SparseCall, accepted: Sequence[BlockShape]) -> str | None:
    """What of a call but its layout no Hopper kernel takes, or ``None``.

    Args:
        operands, call: the call.
        accepted: block shapes that the kernel takes.
    """
    q, shape = operands.q, call.shape
    if processors(q.device) == 0:
        return f"{kind(q.device)} is no NVIDIA GPU of compute capability 9.x"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype is {q.dtype}; accepted: float16, bfloat16"
    if q.shape[3] not in HEAD_DIMS or operands.v.shape[3] != q.shape[3]:
        return f"head_dim is {q.shape[3]}, of v {operands.v.shape[3]}; accepted: {HEAD_DIMS}, the same for both"
    if shape not in accepted:
        return f"blocks are {shape}; accepted: {', '.join(map(str, accepted))}"
    if operands.groups % shape.heads:
        return f"{shape.heads} heads share a selection and {operands.groups} a key head; accepted: a multiple of those"
    if call.uses_lambda:
        return f"lam is {list(call.lam)}; accepted: at most {LAMBDA_OFF} for every head, which skips nothing"
    return None


def misplaced(x: Tensor) -> bool:
    """Whether the copy engine cannot walk ``x``."""
    unit = ALIGNMENT // x.element_size()
    steps = (stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1)
    return x.stride(3) != 1 or _address(x) % ALIGNMENT != 0 or any(s <= 0 or s % unit != 0 for s in steps)


def _address(x: Tensor) -> int:
    """Where ``x`` starts; a fake one in its own memory, which starts at a multiple of :data:`ALIGNMENT`."""
    return int(x.storage_offset()) * x.element_size() if isinstance(x, FakeTensor) else x.data_ptr()


class Hopper(TritonFamily):
    """Warp specialisation in Gluon: fp16 and bf16 on Hopper GPUs; what it refuses the portable kernel takes."""

    name = "hopper"
    title = "the Hopper kernel"
    shapes = SHAPES

    def refusal(self, operands: Operands, call: SparseCall) -> str | None:
        """See :meth:`Engine.refusal`."""
        reason = unsuited(operands, call, SHAPES) or band.extras_refusal(operands, takes_valid=True)
        if reason is not None:
            return reason
        for name, x in (("q", operands.q), ("k", operands.k), ("v", operands.v)):
            if misplaced(x):
                return (
                    f"{name} starts at address {_address(x):#x} with strides {x.stride()}; accepted: the last stride "
                    f"1, the others positive, all of them and the address multiples of {ALIGNMENT} bytes"
                )
        return None

    def attend(self, operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
        """See :meth:`Engine.attend`."""
        from afbs_compile.kernels.attend.hopper import launch  # Triton is not installed everywhere.

        launch.attend(operands, call, lists, out)
