"""Sizes that may be symbolic: when a pass may read or compare them, and what that costs.

Inside a Dynamo backend a condition on a symbolic size becomes a guard: the graph is then reused only where the
condition holds, so a decision taken from it is sound. Anywhere else (an exported program) nobody would check the
condition again, and only what holds for every size may be used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

Size = int | torch.SymInt


def guards_are_checked() -> bool:
    """Whether a condition on a symbolic size becomes a guard of the graph at hand."""
    return TracingContext.try_get() is not None


def holds(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for every run of the graph; inside Dynamo it is made to, by a guard."""
    if guards_are_checked():
        return guard_or_false(condition)
    return statically_known_true(condition)


def same_sizes(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are provably equal. Adds no guard."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def fixed(size: Size) -> int | None:
    """The size as an int, or None where it has none that lasts. Inside Dynamo a guard pins it to this value."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    value = size.node.maybe_as_int()
    if value is not None:
        return int(value)
    if guards_are_checked() and size.node.has_hint():
        return int(size)
    return None
