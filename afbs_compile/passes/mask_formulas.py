"""The elements of tensors as formulas in their indices and in the graph's symbolic sizes.

``arange`` is its index, a view moves indices, a comparison of two positions is a condition on their difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from torch import Tensor, fx
from torch._ops import OpOverload

from afbs_compile.passes.constants import READ_LITERAL, NotConstantError
from afbs_compile.passes.effects import value_of

Index = tuple[Any, ...]
Element = Callable[[Index], Any]
"""The formula of a tensor's element: a sympy integer, number or condition, from sympy indices."""

CONDITION = (BooleanAtom, BooleanFunction, Relational)


def evaluated(node: fx.Node, elements: dict[fx.Node, Any]) -> Any:
    """An :data:`Element` for a tensor, an integer expression for a size.

    Args:
        node: to evaluate; elements: what its arguments evaluated to.

    Raises:
        NotConstantError: its operator has no formula.
    """
    recorded = value_of(node)
    if isinstance(recorded, int | torch.SymInt):
        return _size(recorded)
    if node.op == "get_attr":  # a literal: its reader is below
        return None
    target: Any = node.target
    name = target.overloadpacket.__name__ if isinstance(target, OpOverload) else getattr(target, "__name__", target)
    rule = RULES.get(name)
    if rule is None or not isinstance(node.target, OpOverload) or not isinstance(recorded, Tensor):
        raise NotConstantError(f"the length is free: marked dynamic or exported so, and '{name}' has no formula")
    names = [argument.name for argument in node.target._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    given = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return rule(_Call(node, given, elements))


class _Call:
    """One operator call: its arguments, as formulas where they are tensors."""

    def __init__(self, node: fx.Node, given: dict[str, Any], elements: dict[fx.Node, Any]) -> None:
        self.node, self._given, self._elements = node, given, elements
        self.result: Tensor = value_of(node)

    def raw(self, name: str) -> Any:
        return self._given.get(name)

    def shape(self, name: str) -> tuple[Any, ...]:
        return tuple(value_of(self.raw(name)).shape)

    def number(self, name: str, default: Any = 0) -> Any:
        """A scalar argument or a size as an expression."""
        value = self.raw(name)
        if value is None:
            return sympy.sympify(default)
        return self._elements[value] if isinstance(value, fx.Node) else _size(value)

    def dim(self, name: str = "dim", rank: int | None = None) -> int:
        return int(self.raw(name)) % (rank or self.result.dim())

    def element(self, value: Any) -> Element:
        """A tensor argument, broadcast to the result's rank, or a number."""
        if not isinstance(value, fx.Node):
            constant = _scalar(value)
            return lambda index: constant
        if not isinstance(value_of(value), Tensor):
            size = self._elements[value]
            return lambda index: size
        of, sizes = self._elements[value], value_of(value).shape
        return lambda index: of(
            tuple(0 if is_one(n) else i for n, i in zip(sizes, index[len(index) - len(sizes) :], strict=True))
        )

    def tensor(self, name: str) -> Element:
        return self.element(self.raw(name))


def _size(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return sympy.sympify(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, float) and value in (float("-inf"), float("inf")):
        return sympy.oo if value > 0 else -sympy.oo
    return sympy.sympify(value)


def is_one(size: Any) -> bool:
    """Whether a dimension has one element at every run, so that it is broadcast."""
    return isinstance(size, int) and size == 1


def free_index(place: int) -> sympy.Symbol:
    """Any index of the dimension at that place."""
    return sympy.Symbol(f"index_{place}", integer=True, nonnegative=True)


def _integers_only(call: _Call) -> None:
    if call.result.dtype.is_floating_point:
        raise NotConstantError(f"'{call.node.name}' computes with rounded numbers")


def _arange(call: _Call) -> Element:
    _integers_only(call)
    start, step = call.number("start"), call.number("step", 1)
    return lambda index: start + index[0] * step


def _filled(value: Any) -> Callable[[_Call], Element]:
    def rule(call: _Call) -> Element:
        constant = _scalar(call.raw("fill_value") if value is None else value)
        if call.result.dtype == torch.bool:
            constant = sympy.true if constant else sympy.false
        return lambda index: constant

    return rule


def _literal(call: _Call) -> Element:
    value: Any = call.node.graph.owning_module
    for part in str(call.raw("self").target).split("."):
        value = getattr(value, part)
    if value.numel() != 1:
        raise NotConstantError(f"'{call.node.name}' is a table")
    constant = _scalar(value.item())
    return lambda index: constant


def _arithmetic(combine: Callable[[Any, Any], Any]) -> Callable[[_Call], Element]:
    def rule(call: _Call) -> Element:
        _integers_only(call)
        a, b = call.tensor("self"), call.tensor("other")
        if call.number("alpha", 1) != 1:
            raise NotConstantError(f"'{call.node.name}' has a factor")
        return lambda index: sympy.expand(combine(a(index), b(index)))

    return rule


def _compare(relation: Callable[[Any, Any], Any]) -> Callable[[_Call], Element]:
    def rule(call: _Call) -> Element:
        a, b = call.tensor("self"), call.tensor("other")

        def element(index: Index) -> Any:
            # A condition on c - r: the row cancels where both sides are positions.
            left, right = sympy.sympify(a(index)), sympy.sympify(b(index))
            if left.has(sympy.Piecewise) or right.has(sympy.Piecewise):
                raise NotConstantError(f"'{call.node.name}' compares cases")
            if isinstance(left, CONDITION) or isinstance(right, CONDITION):
                raise NotConstantError(f"'{call.node.name}' compares conditions")
            return relation(sympy.expand(left - right), 0)

        return element

    return rule


def _logic(combine: Callable[..., Any], *names: str) -> Callable[[_Call], Element]:
    def rule(call: _Call) -> Element:
        operands = [call.tensor(name) for name in names]

        def element(index: Index) -> Any:
            values = [sympy.sympify(operand(index)) for operand in operands]
            if not all(isinstance(value, CONDITION) for value in values):
                raise NotConstantError(f"'{call.node.name}' combines numbers bit by bit")
            return combine(*values)

        return element

    return rule


def _choice(condition: Any, then: Any, otherwise: Any) -> Any:
    """``then`` where the condition holds; conditions stay conditions."""
    if isinstance(then, CONDITION) and isinstance(otherwise, CONDITION):
        return sympy.Or(sympy.And(condition, then), sympy.And(sympy.Not(condition), otherwise))
    return sympy.Piecewise((then, condition), (otherwise, True))


def _where(call: _Call) -> Element:
    condition, then, otherwise = (call.tensor(name) for name in ("condition", "self", "other"))
    return lambda index: _choice(condition(index), then(index), otherwise(index))


def _masked_fill(call: _Call) -> Element:
    mask, value, old = call.tensor("mask"), call.tensor("value"), call.tensor("self")
    if call.result.dtype == torch.bool:
        return lambda index: _choice(mask(index), sympy.true if value(index) else sympy.false, old(index))
    return lambda index: _choice(mask(index), value(index), old(index))


def _triangle(keeps: Callable[[Any, Any], Any]) -> Callable[[_Call], Element]:
    def rule(call: _Call) -> Element:
        old, diagonal = call.tensor("self"), call.number("diagonal")
        zero = sympy.false if call.result.dtype == torch.bool else sympy.Integer(0)
        return lambda index: _choice(keeps(sympy.expand(index[-1] - index[-2] - diagonal), 0), old(index), zero)

    return rule


def _same(call: _Call) -> Element:
    """A copy, perhaps in another type."""
    of, old, new = call.tensor("self"), value_of(call.raw("self")).dtype, call.result.dtype
    if old == new or (old == torch.bool and not new.is_complex):
        number = old == torch.bool != new
        return lambda index: _choice(of(index), sympy.Integer(1), sympy.Integer(0)) if number else of(index)
    raise NotConstantError(f"'{call.node.name}' converts {old} to {new}")


def _unsqueeze(call: _Call) -> Element:
    of, dim = call._elements[call.raw("self")], call.dim()
    return lambda index: of((*index[:dim], *index[dim + 1 :]))


def _select(call: _Call) -> Element:
    of, dim, at = call._elements[call.raw("self")], call.dim(rank=call.result.dim() + 1), call.number("index")
    _check_not_negative(at)
    return lambda index: of((*index[:dim], at, *index[dim:]))


def _slice(call: _Call) -> Element:
    of, dim = call._elements[call.raw("self")], call.dim()
    start, step = call.number("start"), call.number("step", 1)
    _check_not_negative(start)
    return lambda index: of((*index[:dim], start + step * index[dim], *index[dim + 1 :]))


def _permute(call: _Call) -> Element:
    of = call._elements[call.raw("self")]
    order = list(range(call.result.dim()))
    if call.raw("dims") is not None:
        order = [dim % len(order) for dim in call.raw("dims")]
    else:
        a, b = (call.dim(name) for name in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
    return lambda index: of(tuple(index[order.index(place)] for place in range(len(order))))


def _view(call: _Call) -> Element:
    """Only dimensions of size 1 come or go."""
    of, before, after = call._elements[call.raw("self")], call.shape("self"), tuple(call.result.shape)
    if [n for n in before if not is_one(n)] != [n for n in after if not is_one(n)]:
        raise NotConstantError(f"'{call.node.name}' folds dimensions")

    def element(index: Index) -> Any:
        kept = iter([i for n, i in zip(after, index, strict=True) if not is_one(n)])
        return of(tuple(0 if is_one(n) else next(kept) for n in before))

    return element


def _index(call: _Call) -> Element:
    """``x[indices]`` with one tensor of indices for each dimension."""
    of, indices = call._elements[call.raw("self")], call.raw("indices")
    if len(indices) != len(call.shape("self")) or any(at is None for at in indices):
        raise NotConstantError(f"'{call.node.name}' indexes a part of the dimensions")
    places = [call.element(at) for at in indices]

    def element(index: Index) -> Any:
        at = tuple(place(index) for place in places)
        for value in at:
            _check_not_negative(value)
        return of(at)

    return element


def _diff(call: _Call) -> Element:
    """First differences, with one element put before the first."""
    _integers_only(call)
    dim = call.dim()
    if call.raw("prepend") is None or call.raw("append") is not None or call.raw("n") != 1:
        raise NotConstantError(f"'{call.node.name}' is another difference")
    of, before = call._elements[call.raw("self")], call.tensor("prepend")
    if not is_one(call.shape("prepend")[dim]):
        raise NotConstantError(f"'{call.node.name}' is another difference")

    def element(index: Index) -> Any:
        place = free_index(len(index))
        at = lambda i: of((*index[:dim], i, *index[dim + 1 :]))  # noqa: E731
        step = sympy.expand(at(place) - at(place - 1))
        first = sympy.expand(at(sympy.Integer(0)) - before((*index[:dim], 0, *index[dim + 1 :])))
        if sympy.expand(step.subs(place, 0) - first) != 0:
            raise NotConstantError(f"'{call.node.name}' begins with another step")
        return step.subs(place, index[dim])

    return element


def _cumsum(call: _Call) -> Element:
    """A running sum of one and the same number."""
    _integers_only(call)
    of, dim = call.tensor("self"), call.dim()

    def element(index: Index) -> Any:
        place = free_index(len(index))
        summand = sympy.sympify(of((*index[:dim], place, *index[dim + 1 :])))
        if isinstance(summand, CONDITION):
            if summand not in (sympy.true, sympy.false):
                raise NotConstantError(f"'{call.node.name}' counts a condition")
            summand = sympy.Integer(int(bool(summand)))
        if place in summand.free_symbols:
            raise NotConstantError(f"'{call.node.name}' sums what changes")
        return summand * (index[dim] + 1)

    return element


def _check_not_negative(index: Any) -> None:
    """A negative index counts from the end; one that is too large is an error of the graph itself."""
    if not sympy.sympify(index).is_nonnegative:
        raise NotConstantError("it indexes with what may be negative")


_ONES, _ZEROS, _FULL = _filled(1), _filled(0), _filled(None)
_AND, _OR = _logic(sympy.And, "self", "other"), _logic(sympy.Or, "self", "other")
_NOT = _logic(sympy.Not, "self")

RULES: dict[str, Callable[[_Call], Element]] = {
    "arange": _arange,
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _ONES),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _ZEROS),
    **dict.fromkeys(("full", "full_like", "new_full"), _FULL),
    READ_LITERAL.overloadpacket.__name__: _literal,
    "add": _arithmetic(lambda a, b: a + b),
    "sub": _arithmetic(lambda a, b: a - b),
    "rsub": _arithmetic(lambda a, b: b - a),
    "mul": _arithmetic(lambda a, b: a * b),
    "le": _compare(sympy.Le),
    "lt": _compare(sympy.Lt),
    "ge": _compare(sympy.Ge),
    "gt": _compare(sympy.Gt),
    "eq": _compare(sympy.Eq),
    "ne": _compare(sympy.Ne),
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), _AND),
    **dict.fromkeys(("__or__", "bitwise_or", "logical_or"), _OR),
    **dict.fromkeys(("bitwise_not", "logical_not"), _NOT),
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle(sympy.Le),
    "triu": _triangle(sympy.Ge),
    **dict.fromkeys(("to", "_to_copy", "clone", "contiguous", "alias", "detach", "detach_", "expand"), _same),
    "unsqueeze": _unsqueeze,
    "select": _select,
    "slice": _slice,
    **dict.fromkeys(("permute", "transpose"), _permute),
    **dict.fromkeys(("view", "reshape", "squeeze"), _view),
    "index": _index,
    "diff": _diff,
    "cumsum": _cumsum,
}
"""The operators that have a formula, by the name of their packet."""
