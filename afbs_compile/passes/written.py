"""Find attention that a model writes out, ``softmax(q @ k.T * scale + mask) @ v``, by what its operators compute.

From each softmax the scores are walked back to the product of q and k: scales, masks, biases, a cap
(``tanh(x / cap) * cap``), one more logit per head (attention sinks), casts and reshapes on the way are what the call
does. Forward, casts, an inactive dropout and reshapes lead to the product with v. What is found is marked on that last
product; the graph computes what it did before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from afbs_compile.passes.effects import Writes, function_name, storage_of, value_of, written_nodes
from afbs_compile.passes.einsum import Product, View, product
from afbs_compile.passes.kv_heads import COPIES, EXPANDS, RESHAPES
from afbs_compile.passes.sizes import same_sizes

SOFTMAX = frozenset({"softmax", "_softmax"})
KEEP_VALUES = frozenset({
    *COPIES, "alias", "float", "half", "bfloat16", "double", "type", "type_as",
})  # fmt: skip
"""Functions that keep every value but for rounding."""

MULTIPLY = frozenset({"mul", "mul_", "imul", "multiply", "__mul__", "__rmul__"})
DIVIDE = frozenset({"div", "div_", "truediv", "itruediv", "true_divide", "__truediv__"})
ADD = frozenset({"add", "add_", "iadd", "__add__", "__radd__"})
SUBTRACT = frozenset({"sub", "sub_", "isub", "__sub__"})
FILL = frozenset({"masked_fill", "masked_fill_"})
CAP = frozenset({"tanh", "tanh_"})
DROPOUTS = frozenset({"dropout", "dropout_"})
LARGEST = frozenset({"max", "amax"})
BOUND_BELOW = frozenset({"max", "maximum", "clamp", "clamp_min"})

STEPS_BACK = 12
"""Functions behind a softmax among which a product makes it attention that is not understood."""

HIDES = -1e3
"""A score from which on a key has no weight beside one that is seen."""

Number = int | float


@dataclass(frozen=True, eq=False)
class Factor:
    """A tensor or a size by which all scores of a row are multiplied, or divided."""

    node: fx.Node
    divides: bool


@dataclass(frozen=True, eq=False)
class Term:
    """What is added to the scores, or put in their place.

    Attributes:
        node: what is added; where ``filled`` is a number, bool: the scores that become this number.
        inverted: whether ``node`` is rather True at the scores that stay.
        like: the node whose shape the term is broadcast to.
        factor, factors: what the sum is multiplied by afterwards; ``factor`` is negative for a difference.
    """

    node: fx.Node
    like: fx.Node
    factor: float = 1.0
    factors: tuple[Factor, ...] = ()
    filled: float | None = None
    inverted: bool = False


@dataclass(frozen=True, eq=False)
class Scores:
    """What stands between a softmax and the product of q and k, as far as it is walked back.

    Attributes:
        path: the nodes passed, from the softmax on. factor, factors: of the product. terms: masks and biases.
        softcap: 0 for none. sinks: of each head, as the graph has them before they are broadcast.
        qk: the product, once it is reached.
    """

    path: tuple[fx.Node, ...] = ()
    factor: float = 1.0
    factors: tuple[Factor, ...] = ()
    terms: tuple[Term, ...] = ()
    softcap: float = 0.0
    sinks: fx.Node | None = None
    qk: Product | None = None

    @property
    def is_bare(self) -> bool:
        """Whether nothing was done to the scores yet."""
        return self.factor == 1.0 and not (self.factors or self.terms or self.softcap or self.sinks)

    @property
    def may_be_capped(self) -> bool:
        """Whether what follows is a cap's own factor."""
        return self.factor > 0 and not self.factors and not self.softcap


@dataclass(frozen=True, eq=False)
class Weights:
    """What stands between a softmax and the product with v.

    Attributes:
        path: the nodes passed, from the softmax on. dropped: probability of a dropout in effect.
        used: whether anything else reads the weights. pv: the product.
    """

    path: tuple[fx.Node, ...]
    dropped: float
    used: bool
    pv: Product


@dataclass(frozen=True, eq=False)
class Unread:
    """Attention that is written out in a way that cannot be read: its last product, and a clause that says why."""

    node: fx.Node
    reason: str


@dataclass(frozen=True, eq=False)
class Written:
    """One attention call that is written out."""

    scores: Scores
    weights: Weights


def written_calls(graph: fx.Graph) -> Iterator[Written | Unread]:
    """Every attention call of a graph that is written out, in graph order, each read as the graph then is."""
    writes: Writes | None = None
    for softmax in [node for node in graph.nodes if function_name(node) in SOFTMAX and _is_over_keys(node)]:
        scores = _scores(softmax.args[0], Scores(), softmax)
        weights = _weights(softmax, Scores() if scores is None else scores)
        if weights is None:
            continue
        if scores is None:
            if (reason := _why_unread(softmax)) is not None:
                yield Unread(weights.pv.node, reason)
            continue
        writes = writes or Writes(graph)
        written = Written(scores, weights)
        if _is_written_into(written, writes):
            yield Unread(weights.pv.node, "a tensor that it reads is written into on its way")
        else:
            yield written


def _why_unread(softmax: fx.Node) -> str | None:
    """What is not known behind a softmax, if there is a product of two tensors behind that; else it is no attention."""
    square, step = value_of(softmax).shape[-2:], None
    pending = [softmax.args[0]]
    for _ in range(STEPS_BACK):
        node = pending.pop(0) if pending else None
        if not isinstance(node, fx.Node) or not isinstance(value_of(node), Tensor):
            continue
        if (found := product(node)) is not None and found.plain:
            if not same_sizes(value_of(node).shape[-2:], square):
                return None
            if step is None:
                return "its scale, masks and cap come in an order that no single call has"
            return f"its scores pass through '{function_name(step)}' ({step.name})"
        inner = [used for used, _ in _undone(node, Scores())]
        step = step if inner or step is not None else node
        pending += inner or node.all_input_nodes
    return None


def _is_over_keys(node: fx.Node) -> bool:
    """Whether a softmax runs over the last of at least two dimensions."""
    value, dim = value_of(node), node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return (
        isinstance(value, Tensor) and value.dim() >= 2 and isinstance(dim, int) and dim % value.dim() == value.dim() - 1
    )


def _scores(node: Any, so_far: Scores, reader: fx.Node) -> Scores | None:
    """Walk back from what a softmax is given; the first reading that ends in a product of two tensors."""
    if not isinstance(node, fx.Node) or not _is_floating(value_of(node)):
        return None
    node = _last_written(node, reader)
    here = replace(so_far, path=(*so_far.path, node))
    if (qk := product(node)) is not None:
        return replace(here, qk=qk) if qk.plain else None
    if function_name(node) == "baddbmm":
        return _added_product(node, here)
    readings = (_scores(inner, before, node) for inner, before in _undone(node, here))
    return next((found for found in readings if found is not None), None)


def _undone(node: fx.Node, after: Scores) -> Iterator[tuple[Any, Scores]]:
    """The readings of one step: which input are the scores, and what is known once the step is undone."""
    name = function_name(node)
    args: tuple[Any, ...] = node.args
    if name in KEEP_VALUES or (name in RESHAPES and _keeps_matrices(node, args[0])):
        yield args[0], after
    elif name in MULTIPLY:
        yield from _unscaled(args[0], args[1], after, divides=False)
        yield from _unscaled(args[1], args[0], after, divides=False)
    elif name in DIVIDE and "rounding_mode" not in node.kwargs:
        yield from _unscaled(args[0], args[1], after, divides=True)
    elif name in CAP and after.may_be_capped:
        yield args[0], replace(after, softcap=after.factor)
    elif name in ADD and node.kwargs.get("alpha", 1) == 1:
        yield from _without_term(args[0], args[1], node, after)
        yield from _without_term(args[1], args[0], node, after)
    elif name in SUBTRACT and node.kwargs.get("alpha", 1) == 1:
        if _is_largest_of(args[1], args[0]):  # softmax does not see what is taken from all scores of a row
            yield args[0], after
        else:
            yield from _without_term(args[0], args[1], node, after, sign=-1.0)
    elif name in FILL and len(args) == 3:
        yield from _unfilled(args[0], args[2], Term(args[1], node), after)
    elif name == "where" and len(args) == 3:
        yield from _unfilled(args[1], args[2], Term(args[0], node, inverted=True), after)
        yield from _unfilled(args[2], args[1], Term(args[0], node), after)
    elif name in BOUND_BELOW and _hides_nothing_new(node):
        yield args[0], after
    elif name in ("cat", "concat") and after.is_bare:
        yield from _without_sinks(node, after)


def _unscaled(inner: Any, other: Any, after: Scores, divides: bool) -> Iterator[tuple[Any, Scores]]:
    number = _number(other)
    if number is not None:
        if number != 0:
            yield inner, replace(after, factor=after.factor / number if divides else after.factor * number)
    elif isinstance(inner, fx.Node) and isinstance(other, fx.Node) and _is_one_a_row(value_of(other)):
        yield inner, replace(after, factors=(*after.factors, Factor(other, divides)))


def _without_term(
    inner: Any, other: Any, node: fx.Node, after: Scores, sign: float = 1.0
) -> Iterator[tuple[Any, Scores]]:
    if after.softcap:
        return  # inside the cap there is no mask
    if isinstance(other, Number) and after.sinks is None:  # softmax does not see what all scores have in common
        yield inner, after
    elif isinstance(other, fx.Node) and isinstance(value_of(other), Tensor):
        term = Term(other, node, sign * after.factor, after.factors)
        yield inner, replace(after, terms=(*after.terms, term))


def _unfilled(inner: Any, value: Any, term: Term, after: Scores) -> Iterator[tuple[Any, Scores]]:
    number = _number(value)
    if number is None or number > HIDES or after.softcap or after.factor <= 0 or not isinstance(term.node, fx.Node):
        return
    yield inner, replace(after, terms=(*after.terms, replace(term, filled=number)))


def _without_sinks(node: fx.Node, after: Scores) -> Iterator[tuple[Any, Scores]]:
    tensors: Any = node.args[0]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    rank = value_of(node).dim()
    if not isinstance(tensors, list | tuple) or len(tensors) != 2 or not isinstance(dim, int) or dim % rank != rank - 1:
        return
    sinks = tensors[1]
    while isinstance(sinks, fx.Node) and function_name(sinks) in KEEP_VALUES | EXPANDS:
        sinks = sinks.args[0]
    if isinstance(sinks, fx.Node) and _is_one_a_head(value_of(sinks), value_of(node)):
        yield tensors[0], replace(after, sinks=sinks)


def _last_written(node: fx.Node, reader: fx.Node) -> fx.Node:
    """The last function that changes a tensor in place before it is read, itself where there is none."""
    writers = [user for user in node.users if user < reader and node in written_nodes(user)[:1]]
    return max(writers, default=node)


def _added_product(node: fx.Node, after: Scores) -> Scores | None:
    """``beta * bias + alpha * batch1 @ batch2``."""
    given: dict[str, Any] = {**dict(zip(("self", "batch1", "batch2"), node.args, strict=False)), **node.kwargs}
    given = {("self" if name == "input" else name): value for name, value in given.items()}
    beta, alpha = given.get("beta", 1), given.get("alpha", 1)
    bias, left, right = (given.get(name) for name in ("self", "batch1", "batch2"))
    if after.softcap or not isinstance(beta, Number) or not isinstance(alpha, Number):
        return None
    if not isinstance(bias, fx.Node) or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    qk = Product(node, View.whole(left), View.whole(right), (0, 1, 2))
    term = Term(bias, node, beta * after.factor, after.factors)
    terms = (*after.terms, term) if beta != 0 else after.terms
    return replace(after, terms=terms, factor=after.factor * alpha, qk=qk)


def _weights(node: fx.Node, scores: Scores, so_far: tuple[fx.Node, ...] = (), dropped: float = 0.0) -> Weights | None:
    """Walk forward from a softmax, or from what keeps its result, to the product with v."""
    readers = [user for user in node.users if not _is_size(value_of(user))]
    path = (*so_far, node)
    for user in readers:
        found = _followed(user, node, scores, path, dropped)
        if found is not None:
            return replace(found, used=found.used or len(readers) > 1)
    return None


def _followed(
    user: fx.Node, node: fx.Node, scores: Scores, path: tuple[fx.Node, ...], dropped: float
) -> Weights | None:
    if not isinstance(value_of(user), Tensor):
        return None
    if (pv := product(user, left=node)) is not None:
        return Weights(path, dropped, False, pv) if _are_matrices(pv.left) else None
    name = function_name(user)
    if name in DROPOUTS:
        return _weights(user, scores, path, max(dropped, _dropout_in_effect(user)))
    if name in KEEP_VALUES or (name in RESHAPES and _keeps_matrices(user, node)):
        return _weights(user, scores, path, dropped)
    if name in ("getitem", "slice") and scores.sinks is not None and _drops_the_sink(user, node):
        return _weights(user, scores, path, dropped)
    return None


def _dropout_in_effect(node: fx.Node) -> float:
    given: dict[str, Any] = {**dict(zip(("input", "p", "training"), node.args, strict=False)), **node.kwargs}
    probability, training = given.get("p", 0.5), given.get("training", given.get("train", True))
    return float(probability) if training is not False and isinstance(probability, Number) else 0.0


def _drops_the_sink(node: fx.Node, weights: fx.Node) -> bool:
    """Whether a slice keeps all columns but the last."""
    kept, whole = value_of(node).shape, value_of(weights).shape
    if not same_sizes(kept[:-1], whole[:-1]) or not statically_known_true(kept[-1] == whole[-1] - 1):
        return False
    if function_name(node) == "slice":
        return (node.args[2] if len(node.args) > 2 else None) in (None, 0)
    index: Any = node.args[1]
    last = index[-1] if isinstance(index, tuple) else None
    return isinstance(last, slice) and last.start in (None, 0) and last.step in (None, 1)


def _is_written_into(written: Written, writes: Writes) -> bool:
    """Whether the graph, between the two products, changes what the call reads, or its weights but on its own way."""
    scores, weights = written.scores, written.weights
    assert scores.qk is not None
    path = {*scores.path, *weights.path}
    read = [scores.qk.left.node, scores.qk.right.node, scores.sinks]
    read += [term.node for term in scores.terms] + [factor.node for factor in scores.factors]
    storages = {storage_of(node) for node in (*read, *path) if node is not None and isinstance(value_of(node), Tensor)}
    known = {storage for storage in storages if storage is not None}
    between = writes.into(known, after=scores.qk.node, before=weights.pv.node)
    return None in storages or any(node not in path for node in between)


def _keeps_matrices(node: fx.Node, inner: Any) -> bool:
    """Whether a reshape leaves the last two dimensions as they are."""
    if not isinstance(inner, fx.Node) or not isinstance(value_of(inner), Tensor):
        return False
    after, before = value_of(node), value_of(inner)
    return after.dim() >= 2 and after.dtype == before.dtype and same_sizes(after.shape[-2:], before.shape[-2:])


def _are_matrices(weights: View) -> bool:
    """Whether the product with v reads the weights with their rows and columns where softmax had them."""
    return weights.order[-2:] == (len(weights.order) - 2, len(weights.order) - 1)


def _is_one_a_row(value: Any) -> bool:
    """Whether a factor is one for all keys of a row."""
    if isinstance(value, Tensor):
        return value.dim() == 0 or (isinstance(value.shape[-1], int) and value.shape[-1] == 1)
    return isinstance(value, torch.SymFloat | torch.SymInt | int | float)


def _is_one_a_head(value: Any, scores: Tensor) -> bool:
    """Whether a tensor is ``[1, heads, 1, 1]``, as many as the scores have."""
    if not isinstance(value, Tensor) or value.dim() < 3 or scores.dim() < 3:
        return False
    *leading, heads, rows, columns = value.shape
    ones = all(isinstance(size, int) and size == 1 for size in (*leading, rows, columns))
    return ones and same_sizes((heads,), (scores.shape[-3],))


def _is_largest_of(node: Any, scores: Any) -> bool:
    """Whether a node is the largest score of each row."""
    while isinstance(node, fx.Node) and function_name(node) in KEEP_VALUES:
        node = node.args[0]
    if not isinstance(node, fx.Node) or not isinstance(value_of(node), Tensor):
        return False
    if function_name(node) == "getitem" and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, fx.Node) or function_name(node) not in LARGEST or node.args[0] is not scores:
        return False
    value = value_of(node)
    value = value[0] if isinstance(value, tuple | list) else value
    return isinstance(value, Tensor) and value.dim() > 1 and bool(same_sizes(value.shape[-1:], (1,)))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _hides_nothing_new(node: fx.Node) -> bool:
    """Whether scores are bounded by the lowest number of their dtype, which only replaces -inf."""
    bound = _number(node.kwargs.get("min", node.args[1] if len(node.args) == 2 else None))
    return bound is not None and set(node.kwargs) <= {"min"} and bound <= torch.finfo(value_of(node).dtype).min


def _is_size(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt | torch.Size)


def _number(value: Any) -> float | None:
    """A number, also where the graph makes a tensor of it."""
    if isinstance(value, fx.Node) and function_name(value) in ("tensor", "full", "scalar_tensor"):
        value = next((arg for arg in reversed(value.args) if isinstance(arg, Number)), None)
    return float(value) if isinstance(value, Number) else None
