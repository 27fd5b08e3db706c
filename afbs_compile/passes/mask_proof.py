"""Is a dense mask provably the causal one, or one that hides nothing?

A captured graph often carries causality as an ``N x N`` mask built from ``arange`` with ``is_causal=False``. It is
recognised by its value, never by its spelling or by one sample: its subgraph is evaluated, which is a proof only
because :class:`Constants` has shown that nothing else can enter it. Where the length is free,
:mod:`afbs_compile.passes.mask_symbolic` evaluates it with symbols.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from afbs_compile.passes.constants import Constants, NotConstantError, run
from afbs_compile.passes.effects import value_of
from afbs_compile.passes.mask_symbolic import attended_distances

CHUNK = 2**24
"""Mask elements that are compared at once."""


class MaskPattern(enum.Enum):
    """What a mask lets row r of N attend."""

    CAUSAL = "keys 0..r"
    FULL = "all keys"


class MaskProver:
    """Proves the masks of one graph; layers that share a mask share the work."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._proved: dict[tuple[fx.Node, ...], MaskPattern | NotConstantError] = {}

    def program(self, mask: fx.Node, *, site: fx.Node) -> tuple[fx.Node, ...]:
        """Nodes that compute the mask that ``site`` reads, from constants alone. Adds no guard.

        Raises:
            NotConstantError: the mask may change between runs.
        """
        return self._constants.program(mask, before=site)

    def pattern(self, mask: fx.Node, program: tuple[fx.Node, ...], *, length: int | None) -> MaskPattern:
        """What a mask of ``length`` rows and keys hides, from what its program computes; ``None`` is every length.

        Raises:
            NotConstantError: it cannot be evaluated, or hides something else.
        """
        key = (mask, *program)
        if key not in self._proved:
            self._proved[key] = (
                _symbolic_pattern(mask, program) if length is None else _evaluated_pattern(mask, program, length)
            )
        outcome = self._proved[key]
        if isinstance(outcome, NotConstantError):
            raise outcome
        return outcome


def _evaluated_pattern(mask: fx.Node, program: tuple[fx.Node, ...], length: int) -> MaskPattern | NotConstantError:
    try:
        value = run(program, mask)
        pattern = classify(value, length)
    except NotConstantError as error:
        return error
    return pattern or NotConstantError("it was evaluated and is neither causal nor true everywhere")


def _symbolic_pattern(mask: fx.Node, program: tuple[fx.Node, ...]) -> MaskPattern | NotConstantError:
    try:
        past, future = attended_distances(mask, program)
    except NotConstantError as error:
        return error
    if past and not future:
        return MaskPattern.CAUSAL
    if past and future and value_of(mask).dtype == torch.bool:
        return MaskPattern.FULL
    return NotConstantError("it is neither causal nor true everywhere")


def classify(mask: Tensor, length: int) -> MaskPattern | None:
    """Compare a mask with the two patterns, element by element.

    Args:
        mask: bool (true attends) or floating (added to the scores; 0 attends, -inf or the dtype's lowest number hides),
            broadcastable to ``[..., length, length]``, at least 2-D. A floating mask is only taken for the causal one:
            nn.MultiheadAttention makes such a one of every boolean mask; any other is a bias.
        length: rows and keys.

    Returns:
        The pattern that every slice has, or None. A mask of one row and key is FULL when true.
    """
    slices = list(_distinct_slices(mask.expand(*mask.shape[:-2], length, length)))
    boolean = mask.dtype == torch.bool
    for pattern in (MaskPattern.FULL, MaskPattern.CAUSAL) if boolean else (MaskPattern.CAUSAL,):
        if slices and all(_has_pattern(part, pattern) for part in slices):
            return pattern
    return None


def _distinct_slices(mask: Tensor) -> Iterator[Tensor]:
    """The ``[N, N]`` slices of a mask; a dimension that repeats itself by stride 0 is read once."""
    leading = zip(mask.shape[:-2], mask.stride()[:-2], strict=True)
    for index in itertools.product(*(range(min(size, 1) if stride == 0 else size) for size, stride in leading)):
        yield mask[index]


def _has_pattern(mask: Tensor, pattern: MaskPattern) -> bool:
    length = mask.shape[-1]
    rows = max(1, CHUNK // max(1, length))
    for start in range(0, length, rows):
        part = mask[start : start + rows]
        expected = torch.ones(part.shape, dtype=torch.bool, device=mask.device)
        if pattern is MaskPattern.CAUSAL:
            expected = expected.tril(start)
        attended, hidden = _attended_and_hidden(part)
        if not (torch.equal(attended, expected) and torch.equal(hidden, ~expected)):
            return False
    return True


def _attended_and_hidden(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask certainly shows and certainly hides a key; a number in between is a bias and does neither."""
    if mask.dtype == torch.bool:
        return mask, ~mask
    return mask == 0, mask <= torch.finfo(mask.dtype).min
