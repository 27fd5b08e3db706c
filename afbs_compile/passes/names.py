"""Where an attention call stands in the model, as the user would write it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import fx

UNNAMED = "attention"
"""Name of a call that no submodule makes."""

WRAPPERS = frozenset(
    {
        "__dict__",
        "_modules",
        "_parameters",
        "_buffers",
        "_orig_mod",
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
    }
)
"""Attributes that wrap a module without being part of its path."""

# One step of a path: ['key'], ["key"], [0] or name.
STEP = re.compile(r"""\[\s*'([^']*)'\s*\]|\[\s*"([^"]*)"\s*\]|\[\s*(\d+)\s*\]|(\w+)""")


# The variable of a frame that a tracer's path begins with.
VARIABLE = re.compile(r"""^[LG]\[\s*['"](\w+)['"]\s*\]""")


class SiteNames:
    """Gives each attention call of a graph a name of its own.

    Args:
        prefixes: the paths in the model of the modules that the frame's variables hold, by variable, ``""`` for any; a
            graph that is a part of a model needs them.
    """

    def __init__(self, prefixes: Mapping[str, str] | None = None) -> None:
        self._seen: Counter[str] = Counter()
        self._prefixes = dict(prefixes or {})

    def name(self, node: fx.Node) -> str:
        """Path of the module that makes the call; a second call of the same module ends in ``#2``."""
        path = self.path(*called_from(node))
        self._seen[path] += 1
        return path if self._seen[path] == 1 else f"{path}#{self._seen[path]}"

    def path(self, variable: str, rest: str) -> str:
        """Path of a module in the model, e.g. ``model.layers.0.self_attn``.

        Args:
            variable, rest: as of :func:`called_from`.
        """
        if not variable and len(self._prefixes) == 1:  # the module that the graph is of makes the call itself
            (prefix,) = self._prefixes.values()
        else:
            prefix = self._prefixes.get(variable, self._prefixes.get("", ""))
        return ".".join(part for part in (prefix, rest) if part) or UNNAMED


def called_from(node: fx.Node) -> tuple[str, str]:
    """The innermost module on a node's module stack: the frame's variable that it is found from, and its path there."""
    stack = node.meta.get("nn_module_stack") or {}
    source = next(reversed(stack.values()))[0] if stack else ""
    return variable_of(source), clean_path(source)


def variable_of(source: str) -> str:
    """The variable that a tracer's path begins with: ``self`` of ``L['self'].layers[0]``; empty where it has none."""
    found = VARIABLE.match(source)
    return found[1] if found else ""


def clean_path(source: str) -> str:
    """Turn a tracer's path into the model's own.

    Dynamo writes ``L['self'].model.layers[0]``, older forms ``L['self']._modules['model']``; torch.export writes the
    plain path.
    """
    steps = ["".join(step) for step in STEP.findall(source)]
    if re.match(r"[LG]\[", source):
        steps = steps[2:]  # L, 'self': the frame's variable that holds the model
    return ".".join(step for step in steps if step not in WRAPPERS)
