"""The torch.compile backend: find, calibrate or reuse a recipe, rewrite, lower."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from afbs_compile.cache import cache_path, read_cached, write_cached
from afbs_compile.conditions import conditions
from afbs_compile.errors import AfbsWarning, RecipeError, is_out_of_memory
from afbs_compile.fingerprint import tensor_digest
from afbs_compile.found import FoundGraph
from afbs_compile.generation import take_part_in_generation
from afbs_compile.guards import guard_parameters
from afbs_compile.kernels.compilations import forget_compilations, note_compilation
from afbs_compile.monitor.graph import MonitoredGraph
from afbs_compile.options import Options
from afbs_compile.passes.build import copied
from afbs_compile.passes.capture import SampleRun
from afbs_compile.passes.lower import lower
from afbs_compile.passes.place import Owner
from afbs_compile.passes.rewrite import dump, rewrite, rewrite_shared
from afbs_compile.plan import NO_RECIPE, Plan
from afbs_compile.reasons import NO_MEMORY
from afbs_compile.recipe import Recipe
from afbs_compile.regions import SharedGraph, forget_blocks, is_shared, make_room_for_blocks
from afbs_compile.report import registry
from afbs_compile.retime import decided_again
from afbs_compile.revalidate import revalidated
from afbs_compile.samples import bind, forget_samples, materialised, tensors_of
from afbs_compile.sketch import all_read
from afbs_compile.tuner.graph import Source, calibrate_graph
from afbs_compile.watch import Watched


def afbs(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a captured graph with its attention calls made sparse; ``torch.compile(model, backend="afbs")``.

    Args:
        gm: the graph Dynamo captured; example_inputs: the values of the first call.
        options: see :mod:`afbs_compile.options`.
        mode: passed to inductor, e.g. ``"reduce-overhead"``.

    Raises (torch.compile wraps these in ``BackendCompilerFailed``, with the message):
        OptionError: an option is unknown or out of range, or a sample does not fit the graph.
        RecipeError: the recipe that the user named is damaged, foreign, or belongs to another model.
    """
    note_compilation()
    settings = Options.parse(options)
    make_room_for_blocks(gm)
    original, owner = copied(gm), Owner(gm, example_inputs)
    place = owner.place(example_inputs)
    found = FoundGraph.of(gm, example_inputs, settings.min_length, place.prefixes)
    if found.sites and is_shared(found, owner, place, example_inputs, settings):
        compiled = _with_constants_to_come(found, example_inputs, settings, mode)
        return SharedGraph(compiled, original, owner, found, settings)
    if found.sites:
        recipe, plan = _planned(found, example_inputs, settings)
        guard_parameters(gm, example_inputs)
    else:
        recipe, plan = None, Plan.of(found, None)
    plan = plan.without_masks(found)
    rewritten = rewrite(gm, plan.calls, plan.unmasked, with_constants=settings.watching is None)
    if settings.dump is not None:
        dump(rewritten, settings.dump, f"graph_{registry.compile_id()}")
    if registry.record(found, plan, rewritten, recipe) and not rewritten.changed:
        rest = "nothing else in this graph changed" if plan.unmasked else "this graph runs unchanged"
        warnings.warn(f"afbs: {plan.summary()}; {rest}.", AfbsWarning, stacklevel=2)
    compiled = lower(gm, example_inputs, mode=mode)
    if recipe is None or not plan.calls:
        return compiled
    if settings.watching is None:
        return Watched(compiled, original, example_inputs, found, recipe, plan, settings)
    beside = _place_of_recipe(found, example_inputs, settings)
    watched = MonitoredGraph(compiled, original, example_inputs, found, recipe, plan, settings, beside)
    registry.watch(registry.compile_id(), watched.monitor)
    return watched


def _place_of_recipe(found: FoundGraph, example_inputs: Sequence[Any], settings: Options) -> Path | None:
    """The file that a graph's recipe has; ``None`` where it was given as an object."""
    if settings.recipe is None:
        samples = None if settings.samples is None else materialised(settings.samples)
        return cache_path(_conditions(found, example_inputs, settings, samples))
    return settings.recipe_file


def _with_constants_to_come(
    found: FoundGraph, example_inputs: Sequence[Any], settings: Options, mode: str | None
) -> Callable[..., Any]:
    """The compiled graph, whose constants are looked up when it runs."""
    rewritten = rewrite_shared(found.gm, found.sites)
    if settings.dump is not None:
        dump(rewritten, settings.dump, f"graph_{registry.compile_id()}")
    registry.record_shared(found, rewritten)
    return lower(found.gm, example_inputs, mode=mode)


def _reset() -> None:
    """Let go of everything that compilations left; ``torch._dynamo.reset()`` calls it."""
    registry.clear()
    forget_blocks()
    forget_samples()
    forget_compilations()


afbs.reset = _reset  # type: ignore[attr-defined]
take_part_in_generation(afbs)


def _planned(found: FoundGraph, example_inputs: Sequence[Any], settings: Options) -> tuple[Recipe | None, Plan]:
    """The recipe the user named, else a cached one, else a new one, and what it makes of the graph."""
    if settings.recipe is not None:
        return _as_named(found, example_inputs, settings)
    samples = None if settings.samples is None else materialised(settings.samples)
    path = cache_path(_conditions(found, example_inputs, settings, samples))
    peers = found.peers
    cached = peers.first(lambda: read_cached(path)) if all_read(found.sketches) else None
    if cached is not None:
        try:
            plan = Plan.of(found, cached, settings.outside)
            if plan.covered:
                current = decided_again(cached, found, example_inputs)
                if current is cached:
                    return cached, plan
                write_cached(path, current)
                return current, Plan.of(found, current, settings.outside)
        except RecipeError as error:
            warnings.warn(f"{path}: {error} Calibrating again.", AfbsWarning, stacklevel=2)
    if settings.first_call == "dense":
        return None, Plan.dense(found, NO_RECIPE)
    source: Source = "first call"
    runs: list[list[Any]] = [list(example_inputs)]
    if samples is not None:
        source, runs = "samples", bind(found.gm, example_inputs, samples)
    try:
        recipe = calibrate_graph([(found, runs)], settings.tuning, source)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None, Plan.dense(found, NO_MEMORY)
    if all_read(found.sketches) and peers.is_first:
        write_cached(path, recipe)
    return recipe, Plan.of(found, recipe, settings.outside)


def _as_named(found: FoundGraph, example_inputs: Sequence[Any], settings: Options) -> tuple[Recipe, Plan]:
    named: str | os.PathLike[str] | Recipe = settings.recipe
    recipe = named if isinstance(named, Recipe) else Recipe.load(named)
    name = "the recipe given" if isinstance(named, Recipe) else f"recipe {Path(named)}"
    try:
        plan = Plan.of(found, recipe, settings.outside)
    except RecipeError as error:
        raise RecipeError(f"{name} {error}") from None
    return recipe, revalidated(plan, [SampleRun(found.gm, found.sites, example_inputs)], recipe, name)


def _conditions(
    found: FoundGraph, example_inputs: Sequence[Any], settings: Options, samples: list[Any] | None
) -> dict[str, Any]:
    """Everything that must be equal for a cached recipe to be used."""
    calibrated_on = None if samples is None else tensor_digest(tensors_of(samples))
    if samples is None and not found.tensors:  # nothing but its inputs tells such a graph from another one
        calibrated_on = tensor_digest(value for value in example_inputs if isinstance(value, torch.Tensor))
    return conditions(
        found.sites[0].device,
        settings,
        graph=found.graph,
        weights=found.weights,
        source=found.source,
        sites=sorted(site.name for site in found.sites),
        dtypes=sorted({str(site.dtype) for site in found.sites}),
        samples=calibrated_on,
        # Lengths are calibrated one by one only where the user asks for it.
        lengths=[str(site.q_len) for site in found.sites] if settings.outside == "recalibrate" else None,
    )
