"""Tensors that a graph computes from constants alone, such as a mask made from ``arange``: which they are, their value.

A tensor is constant when nothing that may differ between two runs of the compiled graph enters it: no input, parameter
or buffer (Dynamo's guards do not cover their values), no random number, no uninitialised memory, no foreign function.
Sizes count as constants: reading a symbolic one pins it by a guard (see :mod:`afbs_compile.passes.sizes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import _functorch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from afbs_compile.errors import first_line
from afbs_compile.passes.effects import Writes, function_name, is_trusted, storage_of, unwrapped, value_of
from afbs_compile.passes.sizes import fixed

LARGEST_TENSOR = 2**31
"""Bytes of the largest tensor that is computed for a proof: a bool mask of 46,000 x 46,000."""

PURE_NAMESPACES = ("aten", "prims")
VALUE_FREE = frozenset({"new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like"})
"""Functions that take only shape, dtype and device from their first argument."""

READ_LITERAL = torch.ops.aten.lift_fresh_copy.default
"""torch.export keeps a literal such as ``torch.tensor(0.0)`` as an attribute and reads it by this."""

VMAP_FRAME = ("_vmap_increment_nesting", "_vmap_decrement_nesting")
VMAP_MOVES = ("_add_batch_dim", "_remove_batch_dim")


class NotConstantError(Exception):
    """A tensor is not provably the same in every run; the message is a clause that says why."""


class ConstantTensors:
    """The constant tensors of one graph. Nothing in the graph is changed."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.writes = Writes(gm.graph)
        self._vmap_frame = [node for node in gm.graph.nodes if function_name(node) in VMAP_FRAME]

    def program(self, result: fx.Node, *, before: fx.Node) -> tuple[fx.Node, ...]:
        """Nodes that compute ``result`` as ``before`` sees it, in graph order. Reads no symbolic size.

        Whatever writes into a tensor of the program, or into a view of one, belongs to it.

        Raises:
            NotConstantError: something that may change between runs enters.
        """
        position = self.writes.position
        needed: set[fx.Node] = set()
        pending = [result]
        while pending:
            while pending:
                node = pending.pop()
                if node not in needed:
                    needed.add(node)
                    pending += _constant_inputs(node)
            storages = {storage for node in needed if (storage := storage_of(node)) is not None}
            pending = self.writes.into(storages, before=before)
            if any(function_name(node) in VMAP_MOVES for node in needed):
                pending += [node for node in self._vmap_frame if position[node] < position[before]]
            pending = [node for node in pending if node not in needed]
        return tuple(sorted(needed, key=position.__getitem__))


def run(program: tuple[fx.Node, ...], result: fx.Node) -> Any:
    """The value of ``result``: run its program with fresh tensors, on the devices that the graph names.

    Raises:
        NotConstantError: a size is unknown, a step is random or reads uninitialised memory, or memory is short.
    """
    last_use = {used: node for node in program for used in node.all_input_nodes}
    values: dict[fx.Node, Any] = {}
    with torch.no_grad(), _vmap_levels_kept(), _OnlyConstants():
        for node in program:
            try:
                values[node] = _run_node(node, values)
            except NotConstantError:
                raise
            except Exception as error:  # whatever a captured function may raise: the call then stays as it is
                raise NotConstantError(f"'{node.name}' could not be evaluated ({first_line(error)})") from error
            for used in node.all_input_nodes:
                if last_use[used] is node and used is not result:
                    values.pop(used, None)
    return values[result]


def _constant_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values enter this one's value."""
    if _is_size(value_of(node)) or _is_literal(node):
        return []
    if node.op == "placeholder":
        raise NotConstantError(f"it depends on '{node.target}', whose values may change between calls")
    if node.op == "get_attr":
        raise NotConstantError(f"it reads the attribute '{node.target}', whose values may change between calls")
    if node.op == "call_module" or (node.op == "call_function" and not _is_pure_function(node.target)):
        raise NotConstantError(f"'{node.name}' calls {node.target}, which cannot be looked into")
    if function_name(node) in VALUE_FREE and node.args:
        return [used for used in node.all_input_nodes if used is not node.args[0]]
    return node.all_input_nodes


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):  # torch.Size
        return all(_is_size(item) for item in value)
    return isinstance(value, int | torch.SymInt)


def _is_literal(node: fx.Node) -> bool:
    return node.op == "get_attr" and bool(node.users) and all(user.target is READ_LITERAL for user in node.users)


def _is_pure_function(target: Any) -> bool:
    if isinstance(target, OpOverload):
        return target.namespace in PURE_NAMESPACES
    return is_trusted(target) and not isinstance(target, HigherOrderOperator)


def _run_node(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if _is_size(recorded := value_of(node)):
        return _pinned(recorded)
    if node.op == "get_attr":
        return _attribute(node)
    _check_memory(node)
    inputs = {used: values[used] if used in values else _stand_in(used) for used in node.all_input_nodes}
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda item: inputs[item] if isinstance(item, fx.Node) else _pinned(item)
    )
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _pinned(value: Any) -> Any:
    """A size as a number; anything else as it is."""
    if isinstance(value, torch.Size):
        return torch.Size(_pinned(item) for item in value)
    if isinstance(value, torch.SymInt):
        if (number := fixed(value)) is None:
            raise NotConstantError(f"the size {value} is free: marked dynamic, exported so, or dependent on data")
        return number
    return value


def _attribute(node: fx.Node) -> Tensor:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def _stand_in(node: fx.Node) -> Tensor:
    """A tensor with the shape, dtype and device of a node and no memory, for a function that reads nothing else."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        raise NotConstantError(f"the shape of '{node.name}' is not recorded")
    return torch.zeros((), dtype=value.dtype, device=value.device).expand([_pinned(size) for size in value.shape])


def _check_memory(node: fx.Node) -> None:
    value = unwrapped(value_of(node))
    if isinstance(value, Tensor) and value.layout == torch.strided:
        count = _pinned(value.untyped_storage().nbytes())
        if count > LARGEST_TENSOR:
            raise NotConstantError(f"'{node.name}' takes {count / 2**30:.1f} GiB to evaluate")


@contextmanager
def _vmap_levels_kept() -> Iterator[None]:
    """Leave the vmap levels that a program entered and, stopped half-way, did not leave."""
    before = _functorch.maybe_current_level() or 0
    try:
        yield
    finally:
        while (_functorch.maybe_current_level() or 0) > before:
            _functorch._vmap_decrement_nesting()


class _OnlyConstants(TorchDispatchMode):
    """Stops at the first operator whose result is not a function of its arguments, whatever it was called through."""

    def __init__(self) -> None:
        super().__init__()
        self._uninitialised: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotConstantError(f"it is random ({func})")
        if func.namespace not in PURE_NAMESPACES or name in ("resize_", "set_"):
            raise NotConstantError(f"{func} cannot be looked into")
        self._check_initialised(name, args)
        result = func(*args, **(kwargs or {}))
        if name.startswith(("empty", "new_empty")):
            self._uninitialised.add(result.untyped_storage()._cdata)
        return result

    def _check_initialised(self, name: str, args: Any) -> None:
        """A tensor from ``torch.empty`` may be filled as a whole; not even a view of it before."""
        if name in ("fill_", "zero_", "copy_"):
            self._uninitialised.discard(args[0].untyped_storage()._cdata)
        for tensor in torch.utils._pytree.tree_leaves(args):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._uninitialised:
                raise NotConstantError("it reads uninitialised memory")
