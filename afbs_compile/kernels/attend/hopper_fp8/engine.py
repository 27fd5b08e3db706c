"""The FP8 engine on Hopper GPUs; its rule is :mod:`afbs_compile.kernels.spec.fp8`."""

from __future__ import annotations

from torch import Tensor

from afbs_compile.kernels.attend.hopper.engine import unsuited
from afbs_compile.kernels.attend.portable.engine import TritonFamily
from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.band import partial_at_most, refusal
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.fp8 import BLOCK


class HopperFp8(TritonFamily):
    """Attention on operands rounded to E4M3: two kernels, and memory for q, k and v at a byte an element."""

    name = "fp8"
    title = "the FP8 kernel"
    precision = "fp8"
    shapes = (BlockShape(BLOCK, BLOCK),)

    def refusal(self, operands: Operands, call: SparseCall) -> str | None:
        """See :meth:`Engine.refusal`."""
        reason = unsuited(operands, call, self.shapes) or refusal(operands)
        if reason is None and partial_at_most(operands, call.shape) > 1:
            return f"mask is {operands.mask}; accepted: masks that cross one key block of a query block at most"
        return reason

    def attend(self, operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
        """See :meth:`Engine.attend`; q, k and v may have any strides.

        No host synchronisation once the constants are on the device; may be captured into a CUDA graph; the same
        inputs give the same bits.
        """
        from afbs_compile.kernels.attend.hopper_fp8 import launch  # Triton is not installed everywhere.

        launch.attend(operands, call, lists, out)
