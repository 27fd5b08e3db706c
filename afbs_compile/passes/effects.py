"""Which nodes of a graph write into tensors, and which tensors share memory.

A captured graph is a program with side effects: ``mask.tril_()`` or ``mask[0] = False`` changes a value that other
nodes read under its old name. A pass that moves a read, or runs part of the graph, has to know who writes what.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

TRUSTED_MODULES = ("torch", "_operator", "math", "builtins")
"""Where a function must come from for its name to say whether it writes into its arguments."""

INPLACE_OPERATORS = frozenset({
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul",
    "ior", "ipow", "irshift", "isub", "itruediv", "ixor",
})  # fmt: skip

KEYWORDS = frozenset({"and_", "or_", "not_", "is_"})
"""Python's operators whose names end like those of functions that write, for they are keywords without it."""

RANDOM_WORDS = (
    "rand", "dropout", "bernoulli", "multinomial", "normal", "poisson", "rrelu", "gumbel", "attention", "rnn",
)  # fmt: skip
"""Parts of the names of functions that may draw random numbers; PyTorch marks only some of them."""


def value_of(node: fx.Node) -> Any:
    """The fake value that the tracer recorded for a node; None where it recorded none."""
    return node.meta.get("example_value", node.meta.get("val"))


def function_name(node: fx.Node) -> str:
    """Short name of the function or method that a node calls, whatever graph it is spelled in; empty for no call."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    return target.__name__ if isinstance(target, OpOverloadPacket) else str(getattr(target, "__name__", ""))


def unwrapped(value: Any) -> Any:
    """The tensor inside the wrappers that vmap and grad put around it."""
    while isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def storage_of(node: fx.Node) -> int | None:
    """Identity of the memory behind a node's fake tensor: views share it. None where it is not known."""
    value = unwrapped(value_of(node))
    if not isinstance(value, Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and nested tensors have no storage of their own
        return None


def submodule_of(node: fx.Node) -> fx.GraphModule | None:
    """The graph that a ``get_attr`` node hands to a higher-order operator; None for any other node."""
    if node.op not in ("get_attr", "call_module") or node.graph.owning_module is None:
        return None
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, fx.GraphModule) else None


def is_trusted(target: Any) -> bool:
    """Whether a called function is PyTorch's or Python's own, rather than user code that Dynamo left opaque."""
    module = getattr(target, "__module__", None)
    if module is None:  # methods of torch's own C classes
        module = getattr(getattr(target, "__objclass__", None), "__module__", "")
    return str(module).split(".")[0] in TRUSTED_MODULES


def written_nodes(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node may write into. Whatever is not known to leave an argument alone counts as a writer."""
    if node.op == "call_method":
        return _nodes(node.args[:1]) if _is_inplace_name(str(node.target)) else []
    if node.op == "call_module":
        return node.all_input_nodes
    if node.op != "call_function":
        return []
    target: Any = node.target
    if isinstance(target, OpOverload):
        return _written_by_schema(node, target)
    if isinstance(target, OpOverloadPacket):
        overloads = (getattr(target, name) for name in target.overloads())
        return list(dict.fromkeys(written for overload in overloads for written in _written_by_schema(node, overload)))
    if isinstance(target, HigherOrderOperator):
        return _written_by_bodies(node)
    if not is_trusted(target):
        return node.all_input_nodes
    if isinstance(target, types.FunctionType) and _asks_for_inplace(node, target):
        return _nodes(node.args[:1]) or node.all_input_nodes
    return _written_by_name(node, target)


def _written_by_bodies(node: fx.Node) -> list[fx.Node]:
    """A higher-order operator whose graphs write nothing writes nothing; without graphs it may be a raw kernel."""
    bodies = [body for used in node.all_input_nodes if (body := submodule_of(used))]
    if bodies and not any(written_nodes(inner) for body in bodies for inner in body.graph.nodes):
        return []
    return [used for used in node.all_input_nodes if not submodule_of(used)]


def _written_by_schema(node: fx.Node, target: OpOverload[..., Any]) -> list[fx.Node]:
    written = []
    for index, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name, node.args[index] if index < len(node.args) else None)
            written += _nodes([value])
    return written


def _written_by_name(node: fx.Node, target: Any) -> list[fx.Node]:
    name = getattr(target, "__name__", "")
    inplace = _is_inplace_name(name) or name in INPLACE_OPERATORS or name == "setitem"
    return _nodes([*(node.args[:1] if inplace else ()), node.kwargs.get("out")])


def _is_inplace_name(name: str) -> bool:
    if name in KEYWORDS:
        return False
    if name.startswith("__"):
        return name in {"__setitem__", "__set__"} or name.strip("_") in INPLACE_OPERATORS
    return name.endswith("_")


def _asks_for_inplace(node: fx.Node, target: types.FunctionType) -> bool:
    """``F.relu(x, inplace=True)``, also where the flag is passed by position."""
    if "inplace" not in (parameters := inspect.signature(target).parameters):
        return False
    position = list(parameters).index("inplace")
    flag = node.kwargs.get("inplace", node.args[position] if position < len(node.args) else False)
    return flag is not False


def _nodes(values: Iterable[Any]) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(tuple(values), found.append)
    return found


def has_effect(node: fx.Node) -> bool:
    """Whether a node may do more than compute its result; what is not known to be harmless counts."""
    if node.op not in ("call_function", "call_method", "get_attr"):
        return True
    if isinstance(node.target, HigherOrderOperator) or written_nodes(node) or node.is_impure():
        return True
    if node.op == "call_function" and not isinstance(node.target, OpOverload) and not is_trusted(node.target):
        return True
    return may_draw(node)


def may_draw(node: fx.Node) -> bool:
    """Whether a node may draw random numbers; attention that drops nothing cannot be told from other attention."""
    if isinstance(node.target, HigherOrderOperator) or node.op == "call_module":
        return True
    return any(word in str(node.target) for word in RANDOM_WORDS)


class Writes:
    """Every write of a graph, by position."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self._writers = [(node, written) for node in graph.nodes if (written := written_nodes(node))]

    def into(self, storages: set[int], *, before: fx.Node, after: fx.Node | None = None) -> list[fx.Node]:
        """Nodes strictly between ``after`` and ``before`` that may write into one of the storages, in graph order."""
        start = -1 if after is None else self.position[after]
        end = self.position[before]
        return [
            node
            for node, written in self._writers
            if start < self.position[node] < end and any(_may_be_in(w, storages) for w in written)
        ]


def _may_be_in(node: fx.Node, storages: set[int]) -> bool:
    if isinstance(value_of(node), int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    storage = storage_of(node)
    return storage is None or storage in storages
