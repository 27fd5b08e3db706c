"""The public :func:`calibrate`: run a model on samples, calibrate every graph that Dynamo captures of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from afbs_compile.errors import CalibrationError, OptionError, is_out_of_memory
from afbs_compile.found import FoundGraph
from afbs_compile.options import Options, accepts_options, of_calibration
from afbs_compile.passes.record import record_graphs
from afbs_compile.reasons import NONE_FOUND, grouped
from afbs_compile.recipe import Recipe
from afbs_compile.sketch import sketched
from afbs_compile.tuner.graph import calibrate_graph

RESHARDS = "set_reshard_after_forward"
"""What a module of FSDP2 has; to import the class takes a while."""


@accepts_options
def calibrate(model: Callable[..., Any], samples: Iterable[Any], **options: Any) -> Recipe:
    """Calibrate every attention call of a model on sample inputs, without compiling it.

    Args:
        model: a module or function as ``torch.compile`` takes it, compiled or not; it runs under ``torch.no_grad()``.
        samples: model inputs; each is a tensor, a tuple of positional arguments, or a mapping of keyword arguments
            (a tokenizer's output, say). Lengths may differ. A single sample of batch 1 has its queries split into
            five disjoint windows that are validated each.
        options: those of :data:`afbs_compile.options.OPTIONS` that belong to calibration.

    A model in shards is calibrated by all its processes at once, each of which calls this with the same samples; all
    get the same recipe, of all heads.

    Returns:
        The recipe: for ``torch.compile(model, backend="afbs", options={"recipe": recipe})``, or ``recipe.save(path)``.

    Raises:
        OptionError: an argument is out of range, or there is no sample.
        CalibrationError: no attention call ran on the samples, or each is refused; FSDP2 frees the weights of a
            layer that has run; or memory does not suffice.
    """
    settings = Options.parse({**options, "samples": samples}, of_calibration())
    inputs = list(samples)
    if not inputs:
        raise OptionError("samples: got none; accepted: an iterable of at least one model input")
    if isinstance(model, torch.nn.Module) and any(hasattr(part, RESHARDS) for part in model.modules()):
        raise CalibrationError(
            "nothing was calibrated: FSDP2 frees the weights of each layer that has run, and calibrate() runs layers "
            'again; take the recipe of a first call with attn_implementation="afbs", or of the model before '
            "fully_shard."
        )
    graphs = [
        (FoundGraph.of(graph.gm, graph.samples[0], settings.min_length, graph.prefixes), graph.samples)
        for graph in record_graphs(model, inputs)
    ]
    with_sites = {found.graph for found, _ in graphs if found.sites}
    # A model that breaks elsewhere, or nowhere, has them in graphs with calls: they must not look new there.
    elsewhere = {id(pair[1]): pair for found, _ in graphs if not found.sites for pair in found.tensors}.values()
    graphs = [
        (found, inputs) for found, inputs in graphs if found.sites or (found.refusals and found.graph not in with_sites)
    ]
    if not with_sites:
        raise CalibrationError(_nothing(refusal.reason for found, _ in graphs for refusal in found.refusals))
    if settings.budget is not None and len(with_sites) > 1:
        raise OptionError(
            f"tolerance: a budget on the output needs the model in one graph, and Dynamo made {len(with_sites)} of it; "
            "accepted: a number, or a model without graph breaks"
        )
    tuning = replace(settings.tuning, automatic=settings.tuning.automatic and len(with_sites) == 1)
    recipes = []
    for key in dict.fromkeys((found.graph, found.source) for found, _ in graphs):
        same = [(found, inputs) for found, inputs in graphs if (found.graph, found.source) == key]
        try:
            recipes.append(calibrate_graph(same if same[0][0].sites else same[:1], tuning, "samples"))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise CalibrationError("out of memory: calibrate on fewer or shorter samples.") from error
    by_weight = sorted(recipes, key=lambda recipe: not recipe.graphs[0].weights)  # one with sites leads
    first, *others = (recipe.graphs[0] for recipe in recipes)
    return replace(by_weight[0], graphs=(replace(first, tensors=(*first.tensors, *sketched(elsewhere))), *others))


def _nothing(refusals: Iterable[str]) -> str:
    """Why there is no call to calibrate, and what the user can do."""
    if reasons := grouped(refusals):
        return f"nothing was calibrated: {reasons}."
    return (
        f"nothing was calibrated: {NONE_FOUND}. A model that chooses between kinds of attention may call it when made "
        'with attn_implementation="sdpa".'
    )
