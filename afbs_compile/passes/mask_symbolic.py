"""What a mask hides at EVERY length, from a graph whose length is free (torch.export with dynamic shapes).

No value can be computed there, so each tensor of the mask's program becomes a formula
(:mod:`afbs_compile.passes.mask_formulas`). The formula of the mask at row r and key c must depend on ``d = c - r``
alone, by conditions such as ``d <= 0``; between and beyond the finitely many numbers that d is compared with, it is
constant, so looking at each of them and one further on both sides is a proof for all d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch import fx

from afbs_compile.passes.constants import NotConstantError
from afbs_compile.passes.effects import value_of
from afbs_compile.passes.mask_formulas import evaluated, free_index, is_one

ROW, KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("row", "key"))
DISTANCE = sympy.Symbol("distance", integer=True)


def attended_distances(mask: fx.Node, program: Sequence[fx.Node]) -> tuple[bool, bool]:
    """Whether a mask shows every key with ``c <= r``, and every key with ``c > r``, at every length.

    Args:
        mask: bool, or floating where 0 shows and the lowest number or -inf hides; ``[..., N, N]``, N symbolic.
        program: the nodes that compute it from constants, in graph order.

    Raises:
        NotConstantError: an operator has no formula here, or the mask is neither of the patterns such an answer can
            describe: it must show all, or none, of each of the two kinds of key.
    """
    formula = _formula_at_distance(mask, program)
    answers = {d: _shows(formula, d, value_of(mask).dtype) for d in _telling_distances(formula)}
    past = {shown for d, shown in answers.items() if d <= 0}
    future = {shown for d, shown in answers.items() if d > 0}
    if len(past) != 1 or len(future) != 1:
        raise NotConstantError("it is neither causal nor true everywhere at every length")
    return past.pop(), future.pop()


def _formula_at_distance(mask: fx.Node, program: Sequence[fx.Node]) -> Any:
    """The mask's element at row r and key r + ``DISTANCE``, which must not depend on anything else."""
    elements: dict[fx.Node, Any] = {}
    for node in program:
        elements[node] = evaluated(node, elements)
    shape = value_of(mask).shape
    leading = tuple(0 if is_one(n) else free_index(place) for place, n in enumerate(shape[:-2]))
    row, key = (0 if is_one(n) else at for n, at in zip(shape[-2:], (ROW, KEY), strict=True))
    formula = sympy.sympify(elements[mask]((*leading, row, key))).subs(KEY, ROW + DISTANCE)
    if formula.free_symbols - {DISTANCE}:
        raise NotConstantError("what it hides depends on more than the distance between query and key")
    return formula


def _telling_distances(formula: Any) -> range:
    """Distances of which each class between the compared numbers has one, 0 and 1 included."""
    turns = [0, 1]
    for relation in formula.atoms(Relational):
        gap = sympy.Poly(relation.lhs - relation.rhs, DISTANCE)
        if gap.degree() != 1 or abs(gap.LC()) != 1:
            raise NotConstantError("it compares positions by more than their distance")
        turns.append(int(-gap.coeff_monomial(1) / gap.LC()))
    return range(min(turns) - 1, max(turns) + 2)


def _shows(formula: Any, distance: int, dtype: torch.dtype) -> bool:
    value = formula.subs(DISTANCE, distance)
    if dtype == torch.bool:
        return bool(value)
    if float(value) == 0:
        return True
    if float(value) <= torch.finfo(dtype).min:
        return False
    raise NotConstantError("it adds a number to some scores")
