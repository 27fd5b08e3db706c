"""Where a captured graph stands in the model: a model compiled block by block, or broken, is many graphs.

Dynamo names what it captures from the frame that it captures: the call of every block is ``self_attn``. What holds the
block is not in the graph, but it is running: the modules whose methods are on the Python stack, from the model inwards.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo import eval_frame

from afbs_compile.fingerprint import belongs_to_module, placeholders
from afbs_compile.passes.names import clean_path, variable_of


@dataclass(frozen=True)
class Place:
    """Where a graph stands.

    Attributes:
        root: the model; the module itself where it is part of no other, ``None`` where the graph is of no module.
        prefixes: paths in the model of the modules that the frame's variables hold, by variable, empty ones left out.
        alike: modules of the model that are of the kind that the graph is of; 0 where it is of the model itself.
    """

    root: weakref.ref[nn.Module] | None
    prefixes: Mapping[str, str]
    alike: int

    @property
    def repeated(self) -> bool:
        """Whether the model has other modules like the one that the graph is of."""
        return self.alike > 1


class Owner:
    """Finds the place of a graph each time it runs, for one graph may run for many modules.

    Args:
        gm, example_inputs: the graph, as Dynamo captured it, and values of its placeholders.

    Attributes:
        has_parameters: whether the graph takes any, so that it can be guarded to run for one module alone.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._held: list[tuple[int, str, str]] = []  # input, variable, path from there
        self.has_parameters = any(isinstance(value, nn.Parameter) for value in example_inputs)
        for index, (node, value) in enumerate(placeholders(gm, example_inputs)):
            source = _source_of(node)
            if source and belongs_to_module(node, value):
                self._held.append((index, variable_of(source), clean_path(source)))

    def key(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What tells one module's call from another's: its tensors, which modules may share, and the module."""
        return (*(inputs[index] for index, _, _ in self._held), *_running(1))

    def place(self, inputs: Sequence[Any]) -> Place:
        """The place of the call that is running."""
        modules = list(_running())
        if not modules:
            return Place(None, {}, 0)
        held: dict[str, list[tuple[str, Tensor]]] = {}
        for index, variable, path in self._held:
            held.setdefault(variable, []).append((path, inputs[index]))
        return _place(modules, held or {"": []})


def _source_of(node: fx.Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return ""
    name = source.name  # a method before PyTorch 2.10
    return str(name() if callable(name) else name)


def _running(count: int | None = None) -> Iterator[nn.Module]:
    """Modules whose methods are running, the innermost first, each once; at most so many."""
    seen: set[int] = set()
    frame: FrameType | None = sys._getframe()
    while frame is not None and (count is None or len(seen) < count):
        # Before Python 3.13 a frame keeps what it was asked for: others must not hold their variables for us.
        module = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        module = getattr(module, "_orig_mod", module) if isinstance(module, eval_frame.OptimizedModule) else module
        if isinstance(module, nn.Module) and not isinstance(module, fx.GraphModule) and id(module) not in seen:
            seen.add(id(module))
            yield module
        frame = frame.f_back


def callers() -> list[Any]:
    """The modules and functions given to ``torch.compile`` that are running, the innermost first."""
    found: list[Any] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == eval_frame.__file__ and (function := frame.f_locals.get("fn")) is not None:
            found.append(owner_of(function))
        frame = frame.f_back
    return [owner for owner in found if type(owner).__weakrefoffset__]


def owner_of(function: Any) -> Any:
    """The module whose method is called, or the function itself."""
    return getattr(function, "__self__", function)


def running() -> nn.Module | None:
    """The innermost module whose method is running."""
    return next(_running(1), None)


Held = Mapping[str, Sequence[tuple[str, Tensor]]]
"""Tensors that a graph takes of the module in each variable, and their paths from there."""


def _place(modules: Sequence[nn.Module], held: Held) -> Place:
    """The place in the model that was compiled as a whole or, for a block compiled alone, in the outermost one.

    A part that is compiled alone and is no block of several keeps the names that it has as a model of its own.

    Args:
        modules: that are running, the innermost first; held: by the graph.
    """
    itself = None
    compiled = [owner for owner in reversed(callers()) if isinstance(owner, nn.Module)]
    for outer, whole in [(module, True) for module in compiled] + [(module, False) for module in modules[::-1]]:
        prefixes = _prefixes(outer, modules, held)
        if prefixes is None:
            continue
        paths = {variable: path for variable, raw in prefixes.items() if (path := clean_path(raw))}
        alike = max(_alike(outer, path) for path in prefixes.values())
        if paths and (whole or alike > 1):
            return Place(weakref.ref(outer), paths, alike)
        itself = itself or (None if paths else weakref.ref(outer))
    return Place(itself, {}, 0)


def _prefixes(outer: nn.Module, modules: Sequence[nn.Module], held: Held) -> dict[str, str] | None:
    """The path of each variable's module, wrappers included; ``None`` where one of them is not part of ``outer``.

    Tensors tell it, and where several modules share them, or there are none, the innermost module that is running.
    """
    wanted = {id(tensor) for tensors in held.values() for _, tensor in tensors}
    names: dict[int, list[str]] = {}
    paths: dict[int, str] = {}
    for name, module in outer.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), name)
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in wanted:
                names.setdefault(id(tensor), []).append(f"{name}.{own}" if name else own)
    active = [paths[id(module)] for module in modules if id(module) in paths]
    innermost = paths.get(id(modules[0]))
    found = {}
    for variable, tensors in held.items():
        begun = (_beginnings(names.get(id(tensor), ()), path) for path, tensor in tensors)
        known = [prefixes for prefixes in begun if prefixes]  # a plain attribute has no place
        possible = [one for one in known[0] if all(one in other for other in known)] if known else [innermost]
        prefix = next((path for path in active if path in possible), possible[0] if possible else None)
        if prefix is None:
            return None
        found[variable] = prefix
    return found


def _beginnings(names: Sequence[str], path: str) -> list[str]:
    """What names begin with that end in a path."""
    steps = path.count(".") + 1
    return [_without_last(name, steps) for name in names if f".{clean_path(name)}".endswith(f".{path}")]


def _without_last(name: str, steps: int) -> str:
    """What a name begins with, wrappers' steps among the last ones not counted."""
    parts = name.split(".")
    while steps:
        steps -= clean_path(parts.pop()) != ""
    return ".".join(parts)


def _alike(outer: nn.Module, path: str) -> int:
    kind = type(outer.get_submodule(path))
    return sum(type(module) is kind for module in outer.modules()) if path else 1
