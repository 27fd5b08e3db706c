"""What PyTorch keeps of a compilation after ``torch._dynamo.reset()``, unless it is told to let go.

A shape environment with symbolic sizes holds the fake tensors of the graph's inputs, whose sizes hold the environment:
a cycle through C++, which the garbage collector does not see. And each compilation leaves a traceback in the metrics of
its thread: one that ran inside compiled code, as FlexAttention's does, keeps that code, its graph and its fake tensors.
"""

from __future__ import annotations

import weakref

import torch._dynamo.utils
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_environments: weakref.WeakSet[ShapeEnv] = weakref.WeakSet()


def note_compilation() -> None:
    """Remember the compilation that is running; a backend calls it."""
    context = TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    if mode is not None and mode.shape_env is not None:
        _environments.add(mode.shape_env)


def forget_compilations() -> None:
    """Let go of what the noted ones left: the ``reset`` of a backend, which ``torch._dynamo.reset()`` calls."""
    for environment in _environments:
        environment.tracked_fakes = None
    _environments.clear()
    metrics = torch._dynamo.utils.get_metrics_context()
    if not metrics.in_progress():
        getattr(metrics, "_edits", []).clear()
