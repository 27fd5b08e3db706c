"""Run a model through Dynamo and keep each graph that it captures, with the inputs that reached it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from afbs_compile.kernels.compilations import forget_compilations, note_compilation
from afbs_compile.passes.capture import concrete

MAX_LENGTHS = 64
"""Shapes of samples that Dynamo may capture a graph for in one calibration."""


class RecordedGraph:
    """A captured graph that runs eagerly and keeps the inputs of each call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.samples: list[list[Any]] = []

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph, after keeping a copy of what it is given."""
        self.samples.append([concrete(value) for value in inputs])
        return self.gm(*inputs)


def record_graphs(model: Callable[..., Any], samples: list[Any]) -> list[RecordedGraph]:
    """Run the samples through Dynamo and keep each graph with the inputs that reached it."""
    graphs: list[RecordedGraph] = []
    original: Callable[..., Any] = getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))

    def keep(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        note_compilation()
        graphs.append(RecordedGraph(gm))
        return graphs[-1]

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
    return [graph for graph in graphs if graph.samples]


def _call(model: Callable[..., Any], sample: Any) -> None:
    if isinstance(sample, Mapping):
        model(**sample)
    elif isinstance(sample, tuple | list):
        model(*sample)
    else:
        model(sample)
