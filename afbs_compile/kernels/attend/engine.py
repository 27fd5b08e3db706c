"""What an engine is: something that chooses a call's live blocks and attends over them, or says why it does not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands


class Engine(ABC):
    """One engine; it has no state.

    Attributes:
        name: of the engine; title: what a sentence calls it.
        family: engines that select alike and share recipes.
        precision: the heads that it computes, as :data:`afbs_compile.kernels.call.PRECISIONS` names them.
        shapes: block shapes that calibration compares where the engine is the first of its device; those of several
            heads only where it is the one that computes the call.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    family: ClassVar[str]
    precision: ClassVar[str] = "own"
    shapes: ClassVar[tuple[BlockShape, ...]] = ()

    @abstractmethod
    def serves(self, device: torch.device) -> bool:
        """Whether it is made for devices of this kind; where it is not, its refusals are of no interest."""

    @abstractmethod
    def refusal(self, operands: Operands, call: SparseCall) -> str | None:
        """Why it does not take a call, or ``None`` if it does. No data is read, so fake tensors do.

        Returns:
            A sentence that names what came and what is accepted.
        """

    @abstractmethod
    def select(self, operands: Operands, call: SparseCall) -> BlockLists:
        """The live blocks of a call, in fp32 whatever the operands; engines of a family agree."""

    @abstractmethod
    def attend(self, operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
        """Attention over the live blocks; nothing else of k and v enters.

        Args:
            operands: of a call that is not refused; call: its constants.
            lists: from :meth:`select`; empty only where a query block's rows may see nothing.
            out: ``[B, H, q_len, D]`` to write into, its last dimension contiguous.
        """

    @abstractmethod
    def layout(self, operands: Operands, call: SparseCall) -> str:
        """The kernel and how it is laid out, for a reader: ``"hopper 128x128"``, say."""

    def note(self, operands: Operands) -> str | None:
        """What else a reader should know of the kernel, if anything."""
        return None

    def heads_at_once(self, operands: Operands, call: SparseCall) -> int:
        """Query heads, whole groups, whose lists are held at a time; by default all."""
        return operands.heads
