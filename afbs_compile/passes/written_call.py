"""Mark written-out attention with the call that it is: q, k, v, mask and numbers, as SDPA would be given them.

Products of batches of heads (``bmm`` over ``[B * H, ..]``) and einsums are read in the shape ``[B, H, ..]`` where the
graph has the scores in this shape on their way. The views that the operands need are inserted before the last product,
which is spelled anew where its own result has another shape; what the graph computes stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from afbs_compile.passes.build import NodeBuilder, aten
from afbs_compile.passes.effects import function_name, value_of
from afbs_compile.passes.einsum import Product, View
from afbs_compile.passes.operands import Call, mark, mark_unread
from afbs_compile.passes.sizes import Size, fixed, known, same_sizes
from afbs_compile.passes.written import DROPOUTS, Term, Unread, Written, written_calls

Frame = tuple[Size, ...]
"""Sizes before the last two dimensions."""


def mark_written(gm: fx.GraphModule) -> None:
    """Mark every attention call of a graph that is written out, so that ``find`` sees it; in place."""
    # One after the other: what is inserted for a call may be an operand of the next one.
    found = False
    for written in written_calls(gm.graph):
        _mark(written)
        found = True
    if found:
        gm.graph.lint()
        gm.recompile()


class _NoCommonFrameError(Exception):
    """The parts of a call cannot be brought into one shape without reading sizes that may change."""


def _mark(written: Written | Unread) -> None:
    if isinstance(written, Unread):
        mark_unread(written.node, written.reason)
        return
    if not isinstance(value_of(written.weights.pv.node), FakeTensor):
        return
    graph = written.weights.pv.node.graph
    before = set(graph.nodes)
    try:
        call = _Canonical(written).call()
    except _NoCommonFrameError:
        for node in reversed([node for node in graph.nodes if node not in before]):
            graph.erase_node(node)
        mark_unread(written.weights.pv.node, "its parts are batches of heads in shapes that differ")
    else:
        mark(call)


class _Canonical:
    """Brings one written-out call into the form of an SDPA call."""

    def __init__(self, written: Written) -> None:
        assert written.scores.qk is not None
        self._written = written
        self._qk: Product = written.scores.qk
        self._pv = written.weights.pv
        self._build = NodeBuilder(self._pv.node)
        self._frame = self._common_frame()

    def call(self) -> Call:
        """The call; what the graph computes is unchanged."""
        scores, weights = self._written.scores, self._written.weights
        mask = self._mask()
        q, k, v = self._q(), self._reframed(self._qk.right.transposed()), self._reframed(self._pv.right)
        sinks = None if scores.sinks is None else self._sinks(scores.sinks)
        node = self._last_product(v)
        if not weights.dropped:
            _skip_dropout(weights.path)
        return Call(
            node=node,
            q=q,
            k=k,
            v=v,
            mask=mask,
            dropout=weights.dropped,
            is_causal=False,
            scale=scores.factor,
            enable_gqa=False,
            spelling="attention written out",
            softcap=scores.softcap,
            sinks=sinks,
            weights_used=weights.used,
        )

    def _common_frame(self) -> Frame:
        """The shape that all parts are brought to: one of batch and heads, where there is one."""
        broadcast = [
            product.left.shape[:-2]
            for product in (self._qk, self._pv)
            if not same_sizes(product.left.shape[:-2], product.right.shape[:-2])
        ]
        scores, weights = self._written.scores, self._written.weights
        passed = [_frame(node) for node in (*scores.path, *weights.path)]
        candidates = (*broadcast, *(frame for frame in passed if len(frame) == 2), *passed)
        if not all(same_sizes(candidates[0], other) for other in broadcast):
            raise _NoCommonFrameError
        return candidates[0]

    def _q(self) -> fx.Node:
        q = self._reframed(self._qk.left)
        for factor in self._written.scores.factors:
            self._check_frame(self._qk.node)
            q = self._scaled(q, factor.node, factor.divides)
        return q

    def _sinks(self, sinks: fx.Node) -> fx.Node:
        if not same_sizes((value_of(sinks).shape[-3],), self._frame[-1:]):
            raise _NoCommonFrameError
        return self._build.call(aten.flatten.using_ints, (sinks, 0, -1))

    def _mask(self) -> fx.Node | None:
        """The sum of all terms, or which scores are seen where that is all they say."""
        terms = self._written.scores.terms
        if len(terms) == 1 and terms[0].filled == -torch.inf:
            return self._over_frame(self._seen(terms[0]), terms[0])
        total: fx.Node | None = None
        for term in terms:
            node = self._over_frame(self._added(term), term)
            total = node if total is None else self._build.call(aten.add.Tensor, (total, node))
        return total

    def _seen(self, term: Term) -> fx.Node:
        return term.node if term.inverted else self._build.call(aten.logical_not.default, (term.node,))

    def _added(self, term: Term) -> fx.Node:
        """What a term adds to the scores, in the shape that the graph gives it."""
        if term.filled is not None:
            dtype = value_of(self._pv.node).dtype
            lowest = term.filled if term.filled == -torch.inf else torch.finfo(dtype).min
            return self._build.call(aten.where.Scalar, (self._seen(term), 0.0, lowest))
        node = term.node
        if term.factor != 1.0:
            node = self._build.call(aten.mul.Tensor, (node, term.factor))
        for factor in term.factors:
            self._check_frame(term.like)
            node = self._scaled(node, factor.node, factor.divides)
        return node

    def _scaled(self, node: fx.Node, by: fx.Node, divides: bool) -> fx.Node:
        function = aten.div if divides else aten.mul
        overload = function.Tensor if isinstance(value_of(by), Tensor) else function.Scalar
        return self._build.call(overload, (node, by))

    def _check_frame(self, node: fx.Node) -> None:
        if not same_sizes(_frame(node), self._frame):
            raise _NoCommonFrameError

    def _over_frame(self, node: fx.Node, term: Term) -> fx.Node:
        """A term that broadcasts over the scores at its place, so that it broadcasts over the frame."""
        frame, own = _frame(term.like), _frame(node)
        if same_sizes(frame, self._frame) or not own:
            return node
        if all(isinstance(size, int) and size == 1 for size in own):
            return self._build.call(aten.flatten.using_ints, (node, 0, -3))
        missing = len(frame) - len(own)
        wider = [
            -1 if place >= missing and same_sizes((own[place - missing],), (size,)) else size
            for place, size in enumerate(frame)
        ]
        if not all(isinstance(size, int) for size in wider):
            raise _NoCommonFrameError
        if any(size != -1 for size in wider):
            node = self._build.call(aten.expand.default, (node, [*wider, -1, -1]))
        return self._to_frame(node, frame)

    def _reframed(self, view: View) -> fx.Node:
        node = view.build(self._build)
        return node if _broadcasts(view.shape[:-2], self._frame) else self._to_frame(node, view.shape[:-2])

    def _to_frame(self, node: fx.Node, frame: Frame, wanted: Frame | None = None) -> fx.Node:
        """A node over one frame as one over another, the common one by default: the same matrices in the same order."""
        wanted = self._frame if wanted is None else wanted
        if same_sizes(frame, wanted):
            return node
        later = [fixed(size) for size in wanted[1:]]  # a rule asks the same of the number of heads
        if not frame or not wanted or None in later:
            raise _NoCommonFrameError
        if len(frame) > 1:
            node = self._build.call(aten.flatten.using_ints, (node, 0, len(frame) - 1))
        return self._build.call(aten.unflatten.int, (node, 0, [-1, *later])) if later else node

    def _last_product(self, v: fx.Node) -> fx.Node:
        """The product with v over the common frame, which the graph then reads."""
        pv = self._pv
        if pv.plain and same_sizes(pv.left.shape[:-2], self._frame):
            return pv.node
        node = self._build.call(aten.matmul.default, (self._reframed(pv.left), v))
        result = self._to_frame(node, self._frame, pv.left.shape[:-2])
        if not pv.plain:
            result = self._build.call(aten.permute.default, (result, list(pv.order)))
        pv.node.replace_all_uses_with(result)
        pv.node.graph.erase_node(pv.node)
        return node


def _broadcasts(frame: Frame, wanted: Frame) -> bool:
    """Whether matrices over a frame serve another one of as many dimensions as they are."""
    if len(frame) != len(wanted):
        return False
    return all((isinstance(a, int) and a == 1) or same_sizes((a,), (b,)) for a, b in zip(frame, wanted, strict=True))


def _frame(node: fx.Node) -> Frame:
    return tuple(known(size) for size in value_of(node).shape[:-2])


def _skip_dropout(path: Sequence[fx.Node]) -> None:
    """Take out a dropout that does nothing: it would keep the weights alive, for it may be random."""
    for node in path:
        if function_name(node) in DROPOUTS:
            (inner,) = node.all_input_nodes
            node.replace_all_uses_with(inner)
            node.graph.erase_node(node)
