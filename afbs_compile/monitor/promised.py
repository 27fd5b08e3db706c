"""What a recipe promises of the heads of a call, in the terms in which a running model can be held to it."""

from __future__ import annotations

from dataclasses import dataclass

from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.revalidate import SLACK

RATE = 0.1
"""Share of inputs on which a head may exceed its tolerance, where the recipe promises nothing or little."""

LARGEST_RATE = 0.25
"""A promise of more than this says little: five inputs allow one to promise 45 %."""


@dataclass(frozen=True)
class Promised:
    """Of one call.

    Attributes:
        limits: per head, the largest relative L1 error: the tolerance or, of a recipe that has a budget on the output
            instead, 1.5 times the largest error that was measured.
        rate: of inputs on which a head may exceed it.
        by_streak: whether the paper's rule watches, as it does for recipes of ``method="paper"``.
        is_tested: whether its heads are looked at; else alarms about something else may make them dense.
    """

    limits: tuple[float, ...]
    rate: float
    by_streak: bool = False
    is_tested: bool = True

    @classmethod
    def by(cls, recipe: Recipe, row: SiteRecipe, rate: float | None) -> Promised:
        """Read it off a recipe.

        Args:
            recipe: that the call runs with; row: of the call; rate: that the user named.
        """
        bounds = [graph.promise.head_bound for graph in recipe.graphs if graph.promise is not None]
        promised = max(bounds, default=1.0)
        if rate is None:
            rate = promised if 0 < promised <= LARGEST_RATE else RATE
        tolerance = recipe.tolerance
        limits = tuple(SLACK * head.error if tolerance is None else max(tolerance, head.error) for head in row.heads)
        return cls(limits, rate, recipe.method == "paper")
