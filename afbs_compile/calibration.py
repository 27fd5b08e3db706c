"""The public :func:`calibrate`: run a model on samples, calibrate every graph that Dynamo captures of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from afbs_compile.errors import OptionError
from afbs_compile.found import FoundGraph
from afbs_compile.options import Options
from afbs_compile.passes.capture import concrete
from afbs_compile.recipe import Precision, Recipe
from afbs_compile.tuner.graph import calibrate_graph
from afbs_compile.tuner.site import Method
from afbs_compile.tuner.space import Parameterization

MAX_LENGTHS = 64
"""Shapes of samples that Dynamo may capture a graph for in one calibration."""


def calibrate(
    model: Callable[..., Any],
    samples: Iterable[Any],
    *,
    tolerance: float | Mapping[str, float] = 0.055,
    method: Method = "afbs",
    parameterization: Parameterization = "corrected",
    precision: Precision = "own",
    min_length: int = 1024,
) -> Recipe:
    """Calibrate every attention call of a model on sample inputs, without compiling it.

    Args:
        model: a module or function as ``torch.compile`` takes it, compiled or not; it runs under ``torch.no_grad()``.
        samples: model inputs; each is a tensor, a tuple of positional arguments, or a mapping of keyword arguments
            (a tokenizer's output, say). Lengths may differ. A single sample of batch 1 has its queries split into
            five disjoint windows that are validated each.
        tolerance: largest relative L1 error ``sum|O - O_dense| / sum|O_dense|`` of any head on any validation input
            (paper, Eq. 1). Or a budget on the model's output that all heads share, spent where it costs least:
            ``{"kl": x}``, mean KL(dense || sparse) of the next-token distributions in nats, or ``{"perplexity": x}``,
            relative rise of the perplexity on the samples' own tokens. Half of the samples choose, the others check.
            The model must return logits, in one graph; calibration takes one forward pass per head.
        method: ``"afbs"``: largest sparsity within the tolerance, validated until it passes, else DENSE.
            ``"paper"``: Algorithm 1 as printed.
        parameterization: reading of the paper's Eq. 2 for ``method="paper"``.
        precision: ``"own"``, that of the operands, or ``"fp8"``: heads compute in FP8 where that is faster, the device
            and the call allow it, and the error stays within the tolerance, rounding included; ``explain`` says why the
            others do not. Needs ``method="afbs"`` and a tolerance per head.
        min_length: attention over fewer tokens is refused as too short.

    Returns:
        The recipe: for ``torch.compile(model, backend="afbs", options={"recipe": recipe})``, or ``recipe.save(path)``.

    Raises:
        OptionError: an argument is out of range, there is no sample, or no attention call ran on the samples.
    """
    options = Options.parse(
        {
            "tolerance": tolerance,
            "method": method,
            "parameterization": parameterization,
            "precision": precision,
            "min_length": min_length,
            "samples": samples,
        }
    )
    samples = list(samples)
    if not samples:
        raise OptionError("samples: got none; accepted: an iterable of at least one model input")
    graphs = [
        (FoundGraph.of(program.gm, program.samples[0], min_length), program.samples)
        for program in record_programs(model, samples)
    ]
    with_sites = {found.graph for found, _ in graphs if found.sites}
    graphs = [
        (found, inputs) for found, inputs in graphs if found.sites or (found.refusals and found.graph not in with_sites)
    ]
    if not graphs:
        raise OptionError(
            "samples: no attention call ran on them; accepted: at least one input of a model that calls "
            "torch.nn.functional.scaled_dot_product_attention"
        )
    if options.tuning.budget is not None and len(with_sites) > 1:
        raise OptionError(
            f"tolerance: a budget on the output needs the model in one graph, and Dynamo made {len(with_sites)} of it; "
            "accepted: a number, or a model without graph breaks"
        )
    recipes = []
    for key in dict.fromkeys((found.graph, found.source) for found, _ in graphs):
        same = [(found, inputs) for found, inputs in graphs if (found.graph, found.source) == key]
        recipes.append(calibrate_graph(same if same[0][0].sites else same[:1], options.tuning, "samples"))
    by_weight = sorted(recipes, key=lambda recipe: not recipe.graphs[0].weights)  # one with sites leads
    return replace(by_weight[0], graphs=tuple(recipe.graphs[0] for recipe in recipes))


class Program:
    """A captured graph that runs eagerly and keeps the inputs of each call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.samples: list[list[Any]] = []

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph, after keeping a copy of what it is given."""
        self.samples.append([concrete(value) for value in inputs])
        return self.gm(*inputs)


def record_programs(model: Callable[..., Any], samples: list[Any]) -> list[Program]:
    """Run the samples through Dynamo and keep each graph with the inputs that reached it."""
    programs: list[Program] = []
    original: Callable[..., Any] = getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))

    def keep(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        programs.append(Program(gm))
        return programs[-1]

    recorded = torch.compile(original, backend=keep, dynamic=False)
    limit = {"recompile_limit": MAX_LENGTHS, "accumulated_recompile_limit": 2 * MAX_LENGTHS}
    try:
        with torch.no_grad(), torch._dynamo.config.patch(limit):
            for sample in samples:
                _call(recorded, sample)
    finally:  # these graphs must not count towards the recompile limit of the model's own compilation
        code = getattr(getattr(original, "forward", original), "__code__", None)
        if code is not None:
            torch._dynamo.eval_frame.remove_from_cache(code)
    return [program for program in programs if program.samples]


def _call(model: Callable[..., Any], sample: Any) -> None:
    if isinstance(sample, Mapping):
        model(**sample)
    elif isinstance(sample, tuple | list):
        model(*sample)
    else:
        model(sample)
