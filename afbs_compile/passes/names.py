"""Where an attention call stands in the model, as the user would write it."""

from __future__ import annotations

import re
from collections import Counter

from torch import fx

UNNAMED = "attention"
"""Name of a call that no submodule makes."""

WRAPPERS = frozenset({"__dict__", "_modules", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Attributes that wrap a module without being part of its path."""

# One step of a path: ['key'], ["key"], [0] or name.
STEP = re.compile(r"""\[\s*'([^']*)'\s*\]|\[\s*"([^"]*)"\s*\]|\[\s*(\d+)\s*\]|(\w+)""")


class SiteNames:
    """Gives each attention call of a graph a name of its own."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def name(self, node: fx.Node) -> str:
        """Path of the module that makes the call; a second call of the same module ends in ``#2``."""
        path = module_path(node)
        self._seen[path] += 1
        return path if self._seen[path] == 1 else f"{path}#{self._seen[path]}"


def module_path(node: fx.Node) -> str:
    """Path of the innermost module on a node's module stack, e.g. ``model.layers.0.self_attn``."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return UNNAMED
    return clean_path(next(reversed(stack.values()))[0]) or UNNAMED


def clean_path(source: str) -> str:
    """Turn a tracer's path into the model's own.

    Dynamo writes ``L['self'].model.layers[0]``, older forms ``L['self']._modules['model']``; torch.export writes the
    plain path.
    """
    steps = ["".join(step) for step in STEP.findall(source)]
    if re.match(r"[LG]\[", source):
        steps = steps[2:]  # L, 'self': the frame's variable that holds the model
    return ".".join(step for step in steps if step not in WRAPPERS)
