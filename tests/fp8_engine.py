"""FP8 where there is no Hopper GPU: an engine that computes such heads by the specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.attend import engines
from afbs_compile.kernels.attend.engine import Engine
from afbs_compile.kernels.blocks import BlockLists, BlockShape, live_of
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec import fp8
from afbs_compile.tuner import fp8 as tuner_fp8
from afbs_compile.tuner.clock import Times


class Fp8BySpecification(Engine):
    """Takes any device; blocks of 128 x 128, as the kernel does."""

    name = "fp8 by specification"
    title = "the FP8 specification"
    family = "flex"
    precision = "fp8"

    def serves(self, device: torch.device) -> bool:
        return True

    def refusal(self, operands: Operands, call: SparseCall) -> str | None:
        square = BlockShape(fp8.BLOCK, fp8.BLOCK)
        return None if call.shape == square else f"blocks are {call.shape}; accepted: {square}"

    def select(self, operands: Operands, call: SparseCall) -> BlockLists:
        return engines.engines_on(operands.device)[0].select(operands, call)

    def attend(self, operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
        seen = operands.mask.matrix(operands.q_len, operands.k_len, operands.device)
        out.copy_(fp8.attend(fp8.quantise(operands, call.fp8_constants), live_of(lists), seen))

    def layout(self, operands: Operands, call: SparseCall) -> str:
        return f"{self.name} {call.shape}"


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU have FP8, and let it be the faster precision."""
    monkeypatch.setattr(engines, "ENGINES", [Fp8BySpecification(), *engines.ENGINES])
    monkeypatch.setattr(tuner_fp8, "timed", lambda calls: Times((2.0, 1.0), busy=False))
