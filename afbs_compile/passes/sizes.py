"""Sizes that may be symbolic: when a pass may read or compare them, and what that costs.

Inside a Dynamo backend a condition on a symbolic size becomes a guard: the graph is then reused only where the
condition holds, so a decision taken from it is sound. Anywhere else (an exported program) nobody would check the
condition again, and only what holds for every size may be used. So it is with a size that the user promised to keep
free by ``torch._dynamo.mark_dynamic``: a guard that breaks the promise is an error of the user's compilation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import (
    Constraint,
    StrictMinMaxConstraint,
    guard_or_false,
    statically_known_true,
)

Size = int | torch.SymInt


def guards_are_checked() -> bool:
    """Whether a condition on a symbolic size becomes a guard of the graph at hand."""
    return TracingContext.try_get() is not None


def holds(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for every run of the graph; inside Dynamo it is made to, by a guard."""
    if isinstance(condition, bool) or statically_known_true(condition):
        return bool(condition)
    if not guards_are_checked() or _promised(condition, StrictMinMaxConstraint):
        return False
    return guard_or_false(condition)


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
    if not guards_are_checked() or not size.node.has_hint() or _promised(size, Constraint):
        return None
    return int(size)


def known(size: Size) -> Size:
    """A symbolic size that has only one value as an int; any other size as it is. Adds no guard."""
    value = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if value is None else int(value)


def shown(size: Size) -> int | str:
    """A size for the user to read: a symbolic one by its value in this call."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else str(size)
    return size


def _promised(value: torch.SymInt | torch.SymBool, kind: type[Constraint]) -> bool:
    """Whether a size that enters a value is marked dynamic with a constraint of this kind."""
    symbols = value.node.expr.free_symbols
    for tracked in value.node.shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", ())
        for size, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            marked = isinstance(constraint, kind) and not constraint.warn_only
            if marked and isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols:
                return True
    return False
