"""A mask's program in PyTorch's basic operators, which have formulas: Dynamo's graphs call Python functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from afbs_compile.passes.constants import NotConstantError
from afbs_compile.passes.effects import value_of

Program = tuple[fx.Node, tuple[fx.Node, ...]]
"""A node and the nodes that compute it from constants and sizes, in graph order, itself included."""


def in_basic_operators(mask: fx.Node, program: Sequence[fx.Node]) -> Program:
    """The same tensor, computed by operators of aten.

    Raises:
        NotConstantError: it cannot be traced.
    """
    if all(isinstance(node.target, OpOverload) or node.op == "get_attr" for node in program if _is_tensor(node)):
        return mask, tuple(program)
    sizes = _symbolic_sizes(program)

    def body(*values: Any) -> Any:
        return _run(mask, program, dict(zip(sizes, values, strict=True)))

    try:
        with value_of(mask).fake_mode, torch.no_grad():
            graph = make_fx(body, pre_dispatch=True)(*sizes.values()).graph
    except Exception as error:  # whatever a captured function may raise: the mask is then read when the graph runs
        raise NotConstantError(f"'{mask.name}' cannot be traced ({type(error).__name__})") from error
    result = graph.output_node().args[0]
    if not isinstance(result, fx.Node):
        raise NotConstantError(f"'{mask.name}' cannot be traced")
    return result, tuple(node for node in graph.nodes if node.op != "output")


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), Tensor)


def _symbolic_sizes(program: Sequence[fx.Node]) -> dict[str, torch.SymInt]:
    """The symbolic sizes that the program reads, by their expression."""
    found: dict[str, torch.SymInt] = {}
    for node in {*program, *(used for each in program for used in each.all_input_nodes)}:
        recorded = value_of(node)
        sizes = recorded.shape if isinstance(recorded, Tensor) else recorded
        for size in sizes if isinstance(sizes, tuple) else (sizes,):
            if isinstance(size, torch.SymInt):
                found.setdefault(str(size.node.expr), size)
    return found


def _run(mask: fx.Node, program: Sequence[fx.Node], sizes: dict[str, Any]) -> Any:
    def sized(value: Any) -> Any:
        return sizes[str(value.node.expr)] if isinstance(value, torch.SymInt) else value

    values: dict[fx.Node, Any] = {}

    def read(node: fx.Node) -> Any:
        if node not in values:  # a function that only looks at its shape and dtype
            recorded = value_of(node)
            flat = torch.zeros((), dtype=recorded.dtype, device=recorded.device)
            return flat.expand([sized(size) for size in recorded.shape])
        return values[node]

    for node in program:
        recorded = value_of(node)
        if isinstance(recorded, int | torch.SymInt):
            values[node] = sized(recorded)
        elif isinstance(recorded, tuple) and all(isinstance(size, int | torch.SymInt) for size in recorded):
            values[node] = torch.Size([sized(size) for size in recorded])
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
            target: Any = node.target
            if node.op == "call_method":
                target, args = getattr(args[0], target), args[1:]
            values[node] = target(*args, **kwargs)
    return values[mask]
