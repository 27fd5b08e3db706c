"""Products of two tensors read as ``left [.., rows, inner] @ right [.., inner, columns]``, however they are spelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from afbs_compile.passes.build import NodeBuilder, aten
from afbs_compile.passes.effects import function_name, value_of
from afbs_compile.passes.sizes import known

MATMULS = frozenset({"matmul", "bmm", "__matmul__"})
LAST_TWO_SWAPPED = frozenset({"transpose", "swapaxes", "swapdims", "mT", "adjoint", "permute", "t", "T"})


@dataclass(frozen=True, eq=False)
class View:
    """A node with its dimensions in another order.

    Attributes:
        order: for each dimension of the view, the dimension of ``node`` or ``None`` for a new one of size 1.
    """

    node: fx.Node
    order: tuple[int | None, ...]

    @classmethod
    def whole(cls, node: fx.Node) -> View:
        """The node as it is."""
        return cls(node, tuple(range(value_of(node).dim())))

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes of the view."""
        sizes = value_of(self.node).shape
        return tuple(1 if dim is None else known(sizes[dim]) for dim in self.order)

    def transposed(self) -> View:
        """The last two dimensions swapped; of a node that only swaps them, its input."""
        *leading, rows, columns = self.order
        swapped = View(self.node, (*leading, columns, rows))
        inner = swapped.node.args[0] if swapped.node.args else None
        if isinstance(inner, fx.Node) and function_name(self.node) in LAST_TWO_SWAPPED and _swaps_last_two(self.node):
            rank = value_of(inner).dim()
            through = (*range(rank - 2), rank - 1, rank - 2)
            return View(inner, tuple(None if dim is None else through[dim] for dim in swapped.order))
        return swapped

    def build(self, build: NodeBuilder) -> fx.Node:
        """The view as a node."""
        kept = [dim for dim in self.order if dim is not None]
        node = self.node
        if kept != list(range(len(kept))):
            node = build.call(aten.permute.default, (node, kept))
        for place, dim in enumerate(self.order):
            if dim is None:
                node = build.call(aten.unsqueeze.default, (node, place))
        return node


@dataclass(frozen=True, eq=False)
class Product:
    """``result`` is ``left @ right`` with its dimensions in another order.

    Attributes:
        node: what computes it.
        left, right: ``[.., rows, inner]`` and ``[.., inner, columns]``.
        order: for each dimension of ``node``, the dimension of ``left @ right``.
    """

    node: fx.Node
    left: View
    right: View
    order: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether the node's dimensions are those of ``left @ right``."""
        return self.order == tuple(range(len(self.order)))


def product(node: fx.Node, left: fx.Node | None = None) -> Product | None:
    """How a node multiplies two tensors; ``None`` where it does not, or not like matrices.

    Args:
        left: the operand that has the rows; the first one by default.
    """
    name = function_name(node)
    if name in MATMULS and len(node.args) >= 2:
        a, b = node.args[:2]
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node) and left in (None, a)):
            return None
        rank = value_of(a).dim()
        if rank < 2 or value_of(b).dim() != rank:
            return None
        return Product(node, View.whole(a), View.whole(b), tuple(range(rank)))
    if name != "einsum":
        return None
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not all(isinstance(x, fx.Node) for x in operands):
        return None
    return _from_equation(node, equation, operands, left)


def _from_equation(node: fx.Node, equation: str, operands: Sequence[Any], left: fx.Node | None) -> Product | None:
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != 2:
        return None
    pairs = list(zip(operands, terms, strict=True))
    if left is not None and left is not operands[0]:
        pairs.reverse()
    (a, of_a), (b, of_b) = pairs
    if any(len(set(term)) != len(term) for term in (of_a, of_b, out)) or left not in (None, a):
        return None
    inner = [letter for letter in of_a if letter in of_b and letter not in out]
    columns = [letter for letter in out if letter not in of_a]
    rows = (out if left is None else of_a)[-2:-1]
    if len(inner) != 1 or len(columns) != 1 or rows not in set(out) & set(of_a) - set(of_b):
        return None
    leading = [letter for letter in (out if left is None else of_a) if letter not in (rows, columns[0], inner[0])]
    full = [*leading, rows, columns[0]]
    if set(full) != set(out) or set(of_a + of_b) != {*full, inner[0]}:
        return None
    return Product(
        node,
        _arranged(a, of_a, [*leading, rows, inner[0]]),
        _arranged(b, of_b, [*leading, inner[0], columns[0]]),
        tuple(full.index(letter) for letter in out),
    )


def _arranged(node: fx.Node, term: str, wanted: Sequence[str]) -> View:
    return View(node, tuple(term.index(letter) if letter in term else None for letter in wanted))


def _swaps_last_two(node: fx.Node) -> bool:
    """Whether the node's result is its input with the last two dimensions swapped, and nothing else."""
    value: Any = value_of(node)
    inner: Any = fx.node.map_arg(node.args[0], value_of)
    rank = inner.dim()
    if rank < 2:
        return False
    name, dims = function_name(node), [arg for arg in node.args[1:] if isinstance(arg, int)]
    if name in ("mT", "adjoint") or (name in ("t", "T") and rank == 2):
        return not value.is_complex()
    if name == "permute":
        given = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
        order = [dim % rank for dim in given if isinstance(dim, int)]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    return len(dims) == 2 and {dim % rank for dim in dims} == {rank - 1, rank - 2}
