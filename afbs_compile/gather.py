"""The public :func:`gather`: one recipe of the whole model where each process has a stage of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from afbs_compile.errors import RecipeError
from afbs_compile.recipe import GraphRecipe, Recipe


def gather(recipe: Recipe | None, group: Any = None) -> Recipe:
    """Put the recipes of all processes together; every process of the group calls this and gets the same one.

    It is for a pipeline, whose stages have calls of their own. Processes that share the heads of a call (tensor
    parallel) have one recipe already; it is taken once.

    Args:
        recipe: of this process; ``None`` where nothing was calibrated in it.
        group: a process group of ``torch.distributed``, by default of all processes.

    Returns:
        A recipe with the graphs of all stages, in the order of the processes. Let one process save it.

    Raises:
        RecipeError: no process has a recipe; they were made on different devices or with different options; or two of
            them name different calls alike.
    """
    everyone: list[Recipe | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, recipe, group=group)
    there = [(rank, each) for rank, each in enumerate(everyone) if each is not None]
    if not there:
        raise RecipeError("there is nothing to gather: no process has a recipe.")
    (first, leading), *others = there
    for rank, each in others:
        for what in ("device", "engine", "predictor_version", "options"):
            if (one := getattr(leading, what)) != (other := getattr(each, what)):
                raise RecipeError(
                    f"the recipes cannot be put together: {what} is {one} in process {first}, {other} in {rank}."
                )
    return replace(leading, graphs=_distinct([(rank, graph) for rank, each in there for graph in each.graphs]))


def _distinct(graphs: list[tuple[int, GraphRecipe]]) -> tuple[GraphRecipe, ...]:
    """The graphs without those that several processes have; a call's name must say which one it is."""
    kept: dict[tuple[Any, ...], GraphRecipe] = {}
    owners: dict[str, tuple[int, str]] = {}
    for rank, graph in graphs:
        names = tuple(site.name for site in graph.sites)
        for name in names:
            owner, weights = owners.setdefault(name, (rank, graph.weights))
            if owner != rank and weights != graph.weights:
                raise RecipeError(
                    f"the recipes cannot be put together: processes {owner} and {rank} both have a call named {name}, "
                    "of other weights; keep the names that layers have in the whole model."
                )
        kept.setdefault((graph.graph, graph.weights, graph.source, names), graph)
    return tuple(kept.values())
