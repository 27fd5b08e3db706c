"""Make a compiled graph belong to the very tensors that its thresholds were calibrated with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.guards import GuardBuilder
from torch._guards import TracingContext

from afbs_compile.fingerprint import placeholders


def guard_parameters(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Have Dynamo compile again for a module with other parameters.

    Dynamo lifts parameters to inputs and guards their shapes only: a second model of the same class would run the
    first one's graph, with thresholds that were never measured on it.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    for node, value in placeholders(gm, example_inputs):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if isinstance(value, torch.nn.Parameter) and source is not None:
            context.guards_context.dynamo_guards.add(source.make_guard(GuardBuilder.ID_MATCH))
