"""Run a model through Dynamo and keep each graph that it captures, with the inputs that reached it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from afbs_compile.kernels.compilations import forget_compilations, note_compilation
from afbs_compile.passes.build import copied
from afbs_compile.passes.capture import concrete
from afbs_compile.passes.place import Owner

MAX_LENGTHS = 64
"""Shapes of samples that Dynamo may capture a graph for in one calibration."""


@dataclass(frozen=True)
class RecordedGraph:
    """A captured graph as it ran for one module.

    Attributes:
        gm: the graph, this module's own copy; samples: the inputs of each call.
        prefixes: of names, as in :class:`afbs_compile.passes.names.SiteNames`.
    """

    gm: fx.GraphModule
    samples: list[list[Any]]
    prefixes: Mapping[str, str]


class _Recorder:
    """A captured graph that runs eagerly and keeps the inputs of each call, module by module."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._gm = gm
        self._owner = Owner(gm, example_inputs)
        self.graphs: dict[tuple[int, ...], RecordedGraph] = {}

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph, after keeping a copy of what it is given."""
        key = tuple(map(id, self._owner.key(inputs)))  # the samples keep the tensors
        if key not in self.graphs:
            self.graphs[key] = RecordedGraph(copied(self._gm), [], self._owner.place(inputs).prefixes)
        self.graphs[key].samples.append([concrete(value) for value in inputs])
        return self._gm(*inputs)


def record_graphs(model: Callable[..., Any], samples: list[Any]) -> list[RecordedGraph]:
    """Run the samples through Dynamo and keep each graph with the inputs that reached it."""
    recorders: list[_Recorder] = []
    original: Callable[..., Any] = getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))

    def keep(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        note_compilation()
        recorders.append(_Recorder(gm, example_inputs))
        return recorders[-1]

    keep.reset = forget_compilations  # type: ignore[attr-defined]
    recorded = torch.compile(original, backend=keep, dynamic=False)
    limit = {"recompile_limit": MAX_LENGTHS, "accumulated_recompile_limit": 2 * MAX_LENGTHS}
    try:
        with torch.no_grad(), torch._dynamo.config.patch(limit):
            for sample in samples:
                _call(recorded, sample)
    finally:  # these graphs must not count towards the recompile limit of the model's own compilation
        code = getattr(getattr(original, "forward", original), "__code__", None)
        if code is not None:
            torch._dynamo.eval_frame.remove_from_cache(code)
    return [graph for recorder in recorders for graph in recorder.graphs.values()]


def _call(model: Callable[..., Any], sample: Any) -> None:
    if isinstance(sample, Mapping):
        model(**sample)
    elif isinstance(sample, tuple | list):
        model(*sample)
    else:
        model(sample)
