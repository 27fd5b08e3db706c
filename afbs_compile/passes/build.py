"""Add nodes to a captured graph and erase the ones that lost their use."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from afbs_compile.passes.effects import has_effect, is_trusted, storage_of, value_of

VALUE_KEYS = ("example_value", "val")
"""Where tracers keep a node's fake value: Dynamo in the first, torch.export in the second."""

STRIDE_READERS = frozenset({"view", "view_as", "_unsafe_view", "as_strided", "as_strided_", "set_", "stride"})
"""Functions whose result depends on how their argument lies in memory; ``reshape`` adapts by a copy."""

aten = torch.ops.aten


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph once more, over the same tensors."""
    return fx.GraphModule(gm, copy.deepcopy(gm.graph))


class NodeBuilder:
    """Inserts calls before a node and records for each what a tracer would have recorded.

    Args:
        like: a node with a fake value; the new ones stand in the same module and source line.
        before: the node to insert before, by default ``like``.
    """

    def __init__(self, like: fx.Node, before: fx.Node | None = None) -> None:
        self._like = like
        self._before = like if before is None else before
        self._key = next((key for key in VALUE_KEYS if key in like.meta), VALUE_KEYS[0])

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
        """Insert a call of an operator; its fake value is computed from its arguments' fake values."""
        with self._like.graph.inserting_before(self._before):
            node = self._like.graph.call_function(target, args, dict(kwargs or {}))
        node.meta = {key: value for key, value in self._like.meta.items() if key not in VALUE_KEYS}
        fake_args = fx.map_arg(node.args, value_of)
        fake_kwargs = fx.map_arg(node.kwargs, value_of)
        # Not detect_fake_mode(): inside a backend it answers with a newer mode than the one that traced the graph.
        with value_of(self._like).fake_mode, torch.no_grad():
            node.meta[self._key] = target(*fake_args, **fake_kwargs)
        return node

    def in_layout_of(self, wanted: fx.Node, node: fx.Node) -> fx.Node:
        """The node with its dimensions in the memory order of ``wanted``, if any user of ``wanted`` depends on it."""
        order = _memory_order(value_of(wanted))
        if order == _memory_order(value_of(node)) or not strides_matter(wanted):
            return node
        permuted = self.call(aten.contiguous.default, (self.call(aten.permute.default, (node, order)),))
        return self.call(aten.permute.default, (permuted, [order.index(dim) for dim in range(len(order))]))


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """The same values with the dimensions in the memory order of ``like``."""
    order = _memory_order(like)
    return value.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])


def strides_matter(node: fx.Node) -> bool:
    """Whether anything reads the strides of a tensor, e.g. ``out.transpose(1, 2).view(...)``, or may do so unseen.

    The graph's output counts, and so do operators that are not PyTorch's own: a raw kernel has them in its arguments.
    """
    storage = storage_of(node)
    seen = {node}
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if _reads_strides(user):
                return True
            view = storage_of(user) == storage or not isinstance(value_of(user), Tensor)  # or a tuple of views
            if view and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _reads_strides(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target) in STRIDE_READERS
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        return True
    if isinstance(node.target, OpOverload):
        return node.target.namespace != "aten" or node.target.overloadpacket.__name__ in STRIDE_READERS
    return not is_trusted(node.target) or getattr(node.target, "__name__", "") in STRIDE_READERS


def erase_unused(graph: fx.Graph, candidates: Iterable[fx.Node]) -> None:
    """Erase nodes without users and without effects, and their inputs where those lose their last user by it.

    Not ``Graph.eliminate_dead_code``: that also erases in-place methods such as ``cache.index_copy_(...)``, because it
    looks for effects in functions only.
    """
    pending = list(candidates)
    while pending:
        node = pending.pop()
        if node.users or node._erased or has_effect(node):
            continue
        pending += node.all_input_nodes
        graph.erase_node(node)


def _memory_order(value: Tensor) -> list[int]:
    """Dimensions from the widest stride to the narrowest. Symbolic strides are compared by this call's values."""
    strides = [stride.node.hint if isinstance(stride, torch.SymInt) else stride for stride in value.stride()]
    return sorted(range(value.dim()), key=lambda dim: -strides[dim])
