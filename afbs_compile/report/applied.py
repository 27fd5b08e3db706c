"""A recipe applied to a live model: its graphs with their rows, its attention operands, and the model rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from afbs_compile.errors import OptionError, RecipeError
from afbs_compile.found import FoundGraph
from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.build import copied
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.passes.place import Owner
from afbs_compile.passes.record import record_graphs
from afbs_compile.passes.rewrite import rewrite
from afbs_compile.plan import Plan
from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.revalidate import revalidated

ANY_LENGTH = 1
"""No attention is too short here: what the recipe says is shown and checked at the length that is given."""


@dataclass(frozen=True)
class AppliedGraph:
    """One captured graph of a model and what the recipe does with it.

    Attributes:
        found: the graph with its attention calls; plan: what happens to each.
        inputs: placeholder values of each sample that ran through it.
    """

    found: FoundGraph
    plan: Plan
    inputs: list[list[Any]]


def apply(
    model: Callable[..., Any],
    recipe: Recipe | None,
    samples: Sequence[Any],
    *,
    name: str = "the recipe given",
    min_length: int = ANY_LENGTH,
) -> list[AppliedGraph]:
    """Run a model on samples and match each graph that Dynamo captures with the recipe.

    Args:
        model: as ``torch.compile`` takes it.
        recipe: ``None`` leaves every call as it is.
        samples: model inputs as :func:`afbs_compile.calibrate` takes them.
        name: of the recipe, for the error.
        min_length: attention over fewer tokens counts as too short.

    Returns:
        The graphs that have attention calls, in the order in which they were captured.

    Raises:
        RecipeError: the recipe belongs to another model.
        OptionError: the model called no attention.
    """
    applied = []
    for graph in record_graphs(model, list(samples)):
        found = FoundGraph.of(graph.gm, graph.samples[0], min_length, graph.prefixes)
        if found.sites or found.refusals:
            applied.append(AppliedGraph(found, matched(found, recipe, name, graph.samples), graph.samples))
    if not applied:
        raise OptionError("MODEL: it calls no torch.nn.functional.scaled_dot_product_attention on this data")
    return applied


def matched(found: FoundGraph, recipe: Recipe | None, name: str, inputs: Sequence[Sequence[Any]]) -> Plan:
    """The plan for a graph, with the recipe's name in front of a refusal; checked on the inputs where models differ."""
    if not found.sites or recipe is None:
        return Plan.of(found, None)
    try:
        plan = Plan.of(found, recipe)
    except RecipeError as error:
        raise RecipeError(f"{name} {error}") from None
    return revalidated(plan, [SampleRun(found.gm, found.sites, values) for values in inputs], recipe, name)


def operands(graphs: Sequence[AppliedGraph]) -> Iterator[tuple[SiteRecipe, list[Operands]]]:
    """Every calibrated site with its Q, K and V on each sample, one site at a time."""
    alike: dict[tuple[str, ...], list[AppliedGraph]] = {}
    for graph in graphs:  # other lengths of one graph have the same sites, and walk side by side
        key = (graph.found.graph, graph.found.source, *(site.name for site in graph.found.sites))
        alike.setdefault(key, []).append(graph)
    for group in alike.values():
        rows = {row.name: row for row in group[0].plan.rows}
        runs = [SampleRun(g.found.gm, g.found.sites, values) for g in group for values in g.inputs]
        if not group[0].found.sites:
            continue
        with closing(capture(runs)) as walk:
            for name, found in walk:
                if rows[name].heads:
                    yield rows[name], found


def rewritten(model: Callable[..., Any], recipe: Recipe, *, name: str = "the recipe given") -> Callable[..., Any]:
    """The model with its attention calls rewritten, run operator by operator: what every compiled form must equal."""

    def backend(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        owner = Owner(gm, example_inputs)
        made: dict[tuple[int, ...], tuple[object, fx.GraphModule]] = {}

        def run(*inputs: Any) -> Any:
            """The graph of the module that is running: blocks that are alike share what Dynamo captured."""
            of = owner.key(inputs)
            key = tuple(map(id, of))
            if key not in made:
                mine = copied(gm)
                found = FoundGraph.of(mine, inputs, ANY_LENGTH, owner.place(inputs).prefixes)
                rewrite(mine, matched(found, recipe, name, [inputs]).calls)
                made[key] = (of, mine)
            return made[key][1](*inputs)

        return run

    compiled: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=False)
    return compiled
