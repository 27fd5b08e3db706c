"""Is a dense mask provably one of the masks that are formulas (:mod:`afbs_compile.kernels.masks`)?

A captured graph often carries causality as an ``N x N`` mask built from ``arange`` with ``is_causal=False``. It is
recognised by its value, never by its spelling or by one sample: its subgraph is evaluated, which is a proof only
because :class:`ConstantTensors` has shown that nothing else can enter it. Where the length is free,
:mod:`afbs_compile.passes.mask_symbolic` evaluates it with symbols.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor, fx

from afbs_compile.kernels.blocks import chunks
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.registry import MASKS
from afbs_compile.passes.constants import ConstantTensors, NotConstantError, run
from afbs_compile.passes.mask_symbolic import symbolic_mask
from afbs_compile.passes.sizes import Size, fixed

CHUNK = 2**24
"""Mask elements that are compared at once."""


class MaskProver:
    """Proves the masks of one graph; layers that share a mask share the work."""

    def __init__(self, constants: ConstantTensors) -> None:
        self._constants = constants
        self._proved: dict[Hashable, Mask | NotConstantError] = {}

    def program(self, mask: fx.Node, *, site: fx.Node) -> tuple[fx.Node, ...]:
        """Nodes that compute the mask that ``site`` reads, from constants alone. Adds no guard.

        Raises:
            NotConstantError: the mask may change between runs.
        """
        return self._constants.program(mask, before=site)

    def mask(self, parts: Sequence[tuple[fx.Node, tuple[fx.Node, ...]]], *, lengths: tuple[Size, Size]) -> Mask:
        """Which mask the AND of some constant tensors is, on so many rows and keys.

        Args:
            parts: each tensor and its program. A single one may be floating: 0 shows, -inf or the lowest number hides.
            lengths: rows and keys. Where one is free the mask is proven for every length at once or, inside Dynamo, for
                this one, by a guard.

        Raises:
            NotConstantError: it cannot be evaluated, or hides something else.
        """
        key = (tuple(parts), tuple(map(str, lengths)))
        if key not in self._proved:
            self._proved[key] = _proved(parts, lengths)
        outcome = self._proved[key]
        if isinstance(outcome, NotConstantError):
            raise outcome
        return outcome


Parts = Sequence[tuple[fx.Node, tuple[fx.Node, ...]]]


def _proved(parts: Parts, lengths: tuple[Size, Size]) -> Mask | NotConstantError:
    if any(isinstance(size, torch.SymInt) for size in lengths):
        try:
            return symbolic_mask(parts, lengths)
        except NotConstantError as error:
            outcome = error
        if (rows := fixed(lengths[0])) is None or (keys := fixed(lengths[1])) is None:
            return outcome
        lengths = rows, keys
    try:
        return _evaluated_mask(parts, (int(lengths[0]), int(lengths[1])))
    except NotConstantError as error:
        return error


def _evaluated_mask(parts: Parts, lengths: tuple[int, int]) -> Mask:
    tensors = [run(program, part) for part, program in parts]
    whole = tensors[0]
    for tensor in tensors[1:]:
        whole = whole & tensor
    if (found := classify(whole, *lengths)) is None:
        raise NotConstantError("it was evaluated and is none of the masks that are formulas")
    return found


def classify(tensor: Tensor, q_len: int, k_len: int) -> Mask | None:
    """Compare a mask with the known ones, element by element.

    Args:
        tensor: bool (true attends) or floating (added to the scores; 0 attends, -inf or the dtype's lowest number
            hides), broadcastable to ``[..., q_len, k_len]``.
        q_len: rows; k_len: keys.

    Returns:
        The mask that every slice is, or None. A mask of one row and key that is true hides nothing.
    """
    if tensor.dim() < 2:
        tensor = tensor.expand(1, k_len)
    slices = list(_distinct_slices(tensor.expand(*tensor.shape[:-2], q_len, k_len)))
    if not slices:
        return None
    seen, _ = _attended_and_hidden(slices[0])
    for mask in (mask for kind in MASKS.values() for mask in kind.proposed(seen)):
        if all(_is(part, mask) for part in slices):
            return mask
    return None


def _distinct_slices(mask: Tensor) -> Iterator[Tensor]:
    """The ``[N, N]`` slices of a mask; a dimension that repeats itself by stride 0 is read once."""
    leading = zip(mask.shape[:-2], mask.stride()[:-2], strict=True)
    for index in itertools.product(*(range(min(size, 1) if stride == 0 else size) for size, stride in leading)):
        yield mask[index]


def _is(tensor: Tensor, mask: Mask) -> bool:
    q_len, k_len = tensor.shape
    keys = torch.arange(k_len, device=tensor.device)
    for rows in chunks(q_len, max(1, CHUNK // max(1, k_len))):
        positions = torch.arange(rows.start, rows.stop, device=tensor.device)[:, None] + mask.offset(q_len, k_len)
        expected = mask.sees(positions, keys).expand(rows.stop - rows.start, k_len)
        attended, hidden = _attended_and_hidden(tensor[rows])
        if not (torch.equal(attended, expected) and torch.equal(hidden, ~expected)):
            return False
    return True


def _attended_and_hidden(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask certainly shows and certainly hides a key; a number in between is a bias and does neither."""
    if mask.dtype == torch.bool:
        return mask, ~mask
    return mask == 0, mask <= torch.finfo(mask.dtype).min
