"""What a mask hides at EVERY length, from a graph whose length is free (torch.export with dynamic shapes).

No value can be computed there, so each tensor of the mask's program becomes a formula
(:mod:`afbs_compile.passes.mask_formulas`). The formula of the mask at row r and key c must depend on the distance
``d = c - r`` alone, counted from the end of both or from their start, by conditions such as ``d <= 0``; between and
beyond the finitely many numbers that d is compared with it is constant, so looking at each of them and one further on
both sides is a proof for all d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch import fx

from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.causal import Causal, CausalEnd
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.masks.window import Around, Window
from afbs_compile.passes.constants import NotConstantError
from afbs_compile.passes.effects import value_of
from afbs_compile.passes.mask_formulas import evaluated, free_index, is_one
from afbs_compile.passes.mask_trace import in_basic_operators
from afbs_compile.passes.sizes import Size

ROW, KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("row", "key"))
DISTANCE = sympy.Symbol("distance", integer=True)


def symbolic_mask(parts: Sequence[tuple[fx.Node, Sequence[fx.Node]]], lengths: tuple[Size, Size]) -> Mask:
    """The mask that the AND of some tensors is at every length.

    Args:
        parts: tensors, each with the nodes that compute it from constants, in graph order; bool, or a single floating
            one, where 0 shows and the lowest number or -inf hides; broadcastable to ``[..., q_len, k_len]``.
        lengths: q_len and k_len.

    Raises:
        NotConstantError: an operator has no formula here, or the mask is no band.
    """
    parts = [in_basic_operators(mask, program) for mask, program in parts]
    end = _expression(lengths[1]) - _expression(lengths[0])
    for offset in dict.fromkeys((end, sympy.Integer(0))):
        found = _mask_about(parts, offset)
        if found == Causal():
            return Causal() if offset == 0 else CausalEnd()
        if found == Full() or (found is not None and offset == end):
            return found
    raise NotConstantError("it is no band about the diagonal at every length")


def _mask_about(parts: Sequence[tuple[fx.Node, Sequence[fx.Node]]], offset: Any) -> Mask | None:
    """The band that the AND of some tensors is where row r's own key is ``r + offset``, if it is one."""
    formulas = [(_formula_at_distance(mask, program, offset), value_of(mask).dtype) for mask, program in parts]
    if any(formula.free_symbols - {DISTANCE} for formula, _ in formulas):
        return None
    distances = sorted({d for formula, _ in formulas for d in _telling_distances(formula)} | {-1, 0, 1})
    return _band([d for d in distances if all(_shows(formula, d, dtype) for formula, dtype in formulas)], distances)


def _band(seen: list[int], distances: list[int]) -> Mask | None:
    """The mask that shows the keys at some of the distances ``key - row``; beyond the outer ones nothing changes."""
    if seen == distances:
        return Full()
    if not seen or seen != distances[distances.index(seen[0]) : distances.index(seen[-1]) + 1]:
        return None
    before, after = seen[0] == distances[0], seen[-1] == distances[-1]
    if before and not after and seen[-1] == 0:
        return Causal()
    if before or after:
        return None
    if seen[-1] == 0:
        return Window(1 - seen[0])
    return Around(-seen[0], seen[-1]) if seen[-1] > 0 else None


def _expression(size: Size) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _formula_at_distance(mask: fx.Node, program: Sequence[fx.Node], offset: Any) -> Any:
    """The mask's element at row r and key r + offset + ``DISTANCE``."""
    elements: dict[fx.Node, Any] = {}
    for node in program:
        elements[node] = evaluated(node, elements)
    shape = value_of(mask).shape
    leading = tuple(0 if is_one(n) else free_index(place) for place, n in enumerate(shape[:-2]))
    places = (ROW, KEY)[max(0, 2 - len(shape)) :]
    last = tuple(0 if is_one(n) else at for n, at in zip(shape[-2:], places, strict=True))
    return sympy.sympify(elements[mask]((*leading, *last))).subs(KEY, ROW + offset + DISTANCE)


def _telling_distances(formula: Any) -> set[int]:
    """Distances of which each class between the compared numbers has one: the numbers, and one more on both sides."""
    found = set()
    for relation in formula.atoms(Relational):
        gap = sympy.Poly(relation.lhs - relation.rhs, DISTANCE)
        if gap.degree() != 1 or abs(gap.LC()) != 1:
            raise NotConstantError("it compares positions by more than their distance")
        turn = int(-gap.coeff_monomial(1) / gap.LC())
        found |= {turn - 1, turn, turn + 1}
    return found


def _shows(formula: Any, distance: int, dtype: torch.dtype) -> bool:
    value = formula.subs(DISTANCE, distance)
    if dtype == torch.bool:
        return bool(value)
    if float(value) == 0:
        return True
    if float(value) <= torch.finfo(dtype).min:
        return False
    raise NotConstantError("it adds a number to some scores")
