"""What a mask is made of: a formula AND a vector of keys AND whatever else it hides or adds.

A model builds its mask from parts: ``causal & padding[:, None, None, :]`` or ``bias + causal``, say. Each part is
asked by itself: a tensor of constants is compared with the masks that are formulas; one that has a row for all queries
says which keys are valid. If these are all parts, nobody reads the mask itself, and what built it goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.full import Full
from afbs_compile.passes.constants import ConstantTensors, NotConstantError
from afbs_compile.passes.effects import function_name, storage_of, value_of
from afbs_compile.passes.mask_proof import MaskProver
from afbs_compile.passes.sizes import Size

CONJUNCTIONS = frozenset({"and_", "__and__", "bitwise_and", "logical_and"})
SUMS = frozenset({"add", "__add__", "__radd__"})
UNCHANGED = frozenset({
    "expand", "expand_as", "broadcast_to", "to", "_to_copy", "contiguous", "clone", "detach", "alias", "bool",
})  # fmt: skip
"""Functions that keep the values of a bool tensor; they may repeat them along dimensions of one element."""


@dataclass(frozen=True)
class MaskParts:
    """What hides keys in one attention call.

    Attributes:
        mask: by formula.
        valid: bool node, which keys are valid: one row for all queries and heads, ``[.., 1, k_len]`` or ``[k_len]``.
        attn_mask: node of a dense mask, which says everything that the other two do not.
    """

    mask: Mask
    valid: fx.Node | None = None
    attn_mask: fx.Node | None = None


class MaskReader:
    """Takes the masks of one graph apart; layers that share a mask share the work."""

    def __init__(self, constants: ConstantTensors) -> None:
        self._constants = constants
        self._prover = MaskProver(constants)
        self._read: dict[tuple[Any, ...], MaskParts] = {}

    def parts(self, mask: fx.Node, *, site: fx.Node, lengths: tuple[Size, Size]) -> MaskParts:
        """The parts of the mask that ``site`` reads.

        Args:
            mask: broadcastable to ``[.., q_len, k_len]``.
            site: the attention call; lengths: its q_len and k_len.
        """
        written = self._is_written(mask, site)
        key = (mask, written, tuple(map(str, lengths)), self._constants.writes.position[site] if written else 0)
        if key not in self._read:
            leaves = [mask] if written else list(dict.fromkeys(_leaves_of([mask])))
            read = self._of_bools if _is_bool_tensor(mask) else self._of_addends
            self._read[key] = read(mask, leaves, site, lengths)
        return self._read[key]

    def _of_addends(self, mask: fx.Node, leaves: list[fx.Node], site: fx.Node, lengths: tuple[Size, Size]) -> MaskParts:
        """A sum: one of its parts may be a formula, the rest is a bias."""
        if len(leaves) > 1 and (whole := self._formula(mask, site, lengths)) is not None:
            return MaskParts(whole)
        formula: Mask = Full()
        others: list[fx.Node] = []
        for leaf in leaves:
            found = self._formula(leaf, site, lengths)
            if found is None or Full() not in (formula, found):
                others.append(leaf)
            formula = found if found is not None and formula == Full() else formula
        if len(others) < 2:
            return MaskParts(formula, None, *others)
        return MaskParts(formula, None, mask)

    def _formula(self, part: fx.Node, site: fx.Node, lengths: tuple[Size, Size]) -> Mask | None:
        """The formula that a tensor is, ``None`` where it is none."""
        try:
            return self._prover.mask([(part, self._prover.program(part, site=site))], lengths=lengths)
        except NotConstantError:
            return None

    def _of_bools(self, mask: fx.Node, leaves: list[fx.Node], site: fx.Node, lengths: tuple[Size, Size]) -> MaskParts:
        constant: list[tuple[fx.Node, tuple[fx.Node, ...]]] = []
        vectors: list[fx.Node] = []
        others: list[fx.Node] = []
        for leaf in leaves:
            try:
                constant.append((leaf, self._prover.program(leaf, site=site)))
            except NotConstantError:
                (vectors if _is_vector(value_of(leaf)) else others).append(leaf)
        formula: Mask = Full()
        if constant:
            try:
                formula = self._prover.mask(constant, lengths=lengths)
            except NotConstantError:
                others += [leaf for leaf, _ in constant]
        valid = vectors[0] if len(vectors) == 1 else None
        if others or len(vectors) > 1:
            return MaskParts(formula, valid, mask)
        return MaskParts(formula, valid)

    def _is_written(self, mask: fx.Node, site: fx.Node) -> bool:
        """Whether anything writes into the mask, or into one of its parts, before the call."""
        pending, storages = [mask], set()
        while pending:
            node = pending.pop()
            storages.add(storage_of(node))
            if node not in _leaves_of([node]):
                pending += _inputs(node)
        known = {storage for storage in storages if storage is not None}
        return None in storages or bool(self._constants.writes.into(known, before=site))


def _leaves_of(pending: list[fx.Node]) -> list[fx.Node]:
    """The tensors whose AND or sum some masks are, each broadcastable to them."""
    found = []
    while pending:
        node = pending.pop(0)
        inputs = _inputs(node)
        if inputs:
            pending = [*inputs, *pending]
        else:
            found.append(node)
    return found


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors whose AND or sum a node is; none where it is no such thing."""
    name, value = function_name(node), value_of(node)
    if not isinstance(value, Tensor):
        return []
    if value.dtype != torch.bool:
        inputs = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
        is_sum = (
            name in SUMS and len(inputs) == 2 and not set(node.kwargs) - {"alpha"} and node.kwargs.get("alpha", 1) == 1
        )
        return inputs if is_sum and all(_is_like(used, value) for used in inputs) else []
    if name in CONJUNCTIONS:
        inputs = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
        return inputs if len(inputs) == 2 and all(map(_is_bool_tensor, inputs)) else []
    if name in UNCHANGED and isinstance(node.args[0], fx.Node) and _is_bool_tensor(node.args[0]):
        return [node.args[0]] if value_of(node.args[0]).device == value.device else []
    return []


def _is_like(node: fx.Node, result: Tensor) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and (value.dtype, value.device) == (result.dtype, result.device)


def _is_bool_tensor(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _is_vector(value: Any) -> bool:
    """Whether a tensor has one row for all queries and for all heads."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or not 1 <= value.dim() <= 4:
        return False
    middle = value.shape[1:-1] if value.dim() == 4 else value.shape[:-1]
    return all(isinstance(size, int) and size == 1 for size in middle) and not _is_one(value.shape[-1])


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
