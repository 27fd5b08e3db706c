"""The engines in order: the first that does not refuse computes a call; what the others say a reader is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from afbs_compile.kernels.attend.engine import Engine
from afbs_compile.kernels.attend.flex.engine import Flex
from afbs_compile.kernels.attend.hopper.engine import Hopper
from afbs_compile.kernels.attend.hopper_fp8.engine import HopperFp8
from afbs_compile.kernels.attend.portable.engine import Portable
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import heads_by

ENGINES: list[Engine] = [HopperFp8(), Hopper(), Portable(), Flex()]
"""The quickest first. To add one, write it in a folder of its own and name it here; other packages insert theirs."""


class Kernel(NamedTuple):
    """A kernel and how it is laid out, for a reader.

    Attributes:
        name: ``"hopper 128x128"``, ``"fp8 128x128"``, ``"portable 64x64 tiles, 4 warps, 2 stages"`` or
            ``"flex 64x64 tiles"``, say.
        reason: why it is not a quicker one; ``None`` where there is none.
    """

    name: str
    reason: str | None


def engines_on(device: torch.device) -> list[Engine]:
    """The engines for devices of this kind that compute heads in the operands' precision, in order."""
    return [engine for engine in ENGINES if engine.precision == "own" and engine.serves(device)]


def family_on(device: torch.device) -> str:
    """The family of the first engine on a device: a recipe belongs to it."""
    return engines_on(device)[0].family


def shapes_on(device: torch.device) -> tuple[BlockShape, ...]:
    """The block shapes that calibration compares on a device."""
    family = family_on(device)
    shapes = [shape for engine in engines_on(device) if engine.family == family for shape in engine.shapes]
    return tuple(dict.fromkeys(shapes))


def engine_of(operands: Operands, call: SparseCall) -> tuple[Engine, list[tuple[Engine, str]]]:
    """The engine that computes a call whose heads have one precision, and what those before it said.

    Raises:
        ValueError: all refuse; their sentences.
    """
    precision = call.precision[0]
    refused: list[tuple[Engine, str]] = []
    for engine in ENGINES:
        if engine.precision == precision:
            reason = engine.refusal(operands, call)
            if reason is None:
                return engine, [(other, why) for other, why in refused if other.serves(operands.device)]
            refused.append((engine, reason))
    raise ValueError(f"precision is {precision}, and {'; '.join(reason for _, reason in refused)}")


def precision_refusal(operands: Operands, call: SparseCall, precision: str) -> str | None:
    """Why no engine computes the call's heads in a precision, or ``None`` if one does."""
    reasons = [engine.refusal(operands, call) for engine in ENGINES if engine.precision == precision]
    return None if None in reasons else "; ".join(reason for reason in reasons if reason)


def parts_of(operands: Operands, call: SparseCall) -> Iterator[tuple[list[int], SparseCall]]:
    """The heads of each precision, and the call of them alone."""
    for heads in heads_by(call.precision).values():
        yield heads, call.taken(heads, operands.k.shape[1])


def kernel_of(operands: Operands, call: SparseCall) -> Kernel:
    """What computes a call now.

    On GPUs other than Hopper the portable kernel's launch shape is a first guess until a call of at least
    :data:`afbs_compile.kernels.attend.portable.tiling.SHORTEST_TIMED` tokens has timed it against its neighbours.

    Args:
        operands: of the call; no data is read, so fake tensors do.
        call: its constants.
    """
    names, reasons = [], []
    for _, part in sorted(parts_of(operands, call), key=lambda each: each[1].precision[0] == "own"):
        engine, refused = engine_of(operands, part)
        names.append(engine.layout(operands, part))
        reasons += [f"not {other.title}: {reason}" for other, reason in refused]
        reasons += [note for note in [engine.note(operands)] if note is not None]
    return Kernel(" and ".join(names), "; ".join(reasons) or None)
