"""The portable engine: block-sparse attention in Triton, for every GPU and every call whose mask is a band.

Triton is not installed everywhere, so what needs it is imported where a call is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afbs_compile.kernels.attend.engine import Engine
from afbs_compile.kernels.attend.machine import kind, runs_triton
from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks import band
from afbs_compile.kernels.operands import Operands

LISTS_SHARE = 0.035
"""Largest part of the memory of q, k, v and the output that block lists may take; at 128K tokens they and the block
means then stay under a twentieth of it. One key head's lists are the least that is held at a time."""


class TritonFamily(Engine):
    """What the engines whose predictor runs on Triton share."""

    family = "triton"

    def serves(self, device: torch.device) -> bool:
        """See :meth:`Engine.serves`."""
        return runs_triton(device)

    def select(self, operands: Operands, call: SparseCall) -> BlockLists:
        """See :meth:`Engine.select`."""
        from afbs_compile.kernels.select import triton

        return triton.select(operands, call)

    def heads_at_once(self, operands: Operands, call: SparseCall) -> int:
        """Query heads whose block lists take at most :data:`LISTS_SHARE` of the memory of q, k, v and the output.

        All of them at moderate lengths: the lists of a head grow with the square of the length.
        """
        q, k, grid = operands.q, operands.k, operands.grid(call.shape)
        lists = q.shape[0] * operands.groups * grid.count_q * grid.count_k * torch.int32.itemsize
        memory = 2 * (q.numel() + k.numel()) * q.element_size()
        parts = -(-k.shape[1] // max(1, int(LISTS_SHARE * memory / lists)))
        return operands.groups * -(-k.shape[1] // parts)

    def layout(self, operands: Operands, call: SparseCall) -> str:
        """See :meth:`Engine.layout`."""
        return f"{self.name} {call.shape}"


class Portable(TritonFamily):
    """The kernel of :mod:`afbs_compile.kernels.attend.portable.kernel`.

    Half precisions multiply in their own precision and accumulate in fp32; fp32 operands keep fp32's accuracy. Where
    the blocks do not fit the machine they are cut into smaller tiles, and ``lam`` is then ignored: nothing is skipped.
    """

    name = "portable"
    title = "the portable kernel"
    shapes = (BlockShape(128, 128), BlockShape(128, 64), BlockShape(64, 64))

    def refusal(self, operands: Operands, call: SparseCall) -> str | None:
        """See :meth:`Engine.refusal`."""
        if not self.serves(operands.device):
            return f"{kind(operands.device)} is no GPU that Triton compiles for"
        return band.band_refusal(operands)

    def attend(self, operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
        """See :meth:`Engine.attend`; q, k and v may have any strides."""
        from afbs_compile.kernels.attend.portable import launch

        launch.attend(operands, call, lists, out)

    def layout(self, operands: Operands, call: SparseCall) -> str:
        """See :meth:`Engine.layout`.

        On GPUs other than Hopper this is the first guess until a call of at least
        :data:`afbs_compile.kernels.attend.portable.tiling.SHORTEST_TIMED` tokens has timed it against its neighbours.
        """
        from afbs_compile.kernels.attend.portable import launch

        return launch.described(operands, call)
