"""A compiled graph that notices when its weights are written into: thresholds are of the values, not of the tensors.

Dynamo guards which parameters a graph runs with, not what is in them: after ``load_state_dict`` or a training step the
same compiled code runs, with thresholds that were never measured on the new values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from afbs_compile.errors import AfbsWarning, RecipeError
from afbs_compile.fingerprint import placeholders
from afbs_compile.found import FoundGraph
from afbs_compile.options import Options
from afbs_compile.passes.build import copied
from afbs_compile.passes.capture import SampleRun
from afbs_compile.passes.rewrite import rewrite
from afbs_compile.plan import Plan
from afbs_compile.recipe import Recipe
from afbs_compile.report import registry
from afbs_compile.revalidate import revalidated
from afbs_compile.sketch import version_of

UNTIL = "it runs operator by operator until torch._dynamo.reset()"


class Watched:
    """A compiled graph, and the graph that it was compiled from.

    Args:
        compiled: what runs; original: the graph as Dynamo captured it.
        example_inputs: of the compilation.
        found, recipe, plan: what was made of the graph.
        settings: options, of which a plan depends on ``min_length`` and ``outside``.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        original: fx.GraphModule,
        example_inputs: Sequence[Any],
        found: FoundGraph,
        recipe: Recipe,
        plan: Plan,
        settings: Options,
    ) -> None:
        self._run, self._original, self._recipe = compiled, original, recipe
        self._settings = settings
        self._id = registry.compile_id()
        self._weights, self._prefixes = found.weights, found.prefixes
        self._calls = {site.name: call for site, call in plan.calls.items()}
        pairs = enumerate(placeholders(original, example_inputs))
        self._places = [place for place, (_, value) in pairs if isinstance(value, torch.nn.Parameter)]
        self._version = self._version_of(example_inputs)

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph; the sum of the parameters' version counters is all that is looked at."""
        if self._version_of(inputs) != self._version:
            self._version = self._version_of(inputs)
            with torch.no_grad():
                self._look(inputs)
        return self._run(*inputs)

    def _version_of(self, inputs: Sequence[Any]) -> int:
        return sum(version_of(inputs[place]) for place in self._places)

    def _look(self, inputs: Sequence[Any]) -> None:
        """Check the thresholds on the inputs at hand, if any value changed."""
        found = FoundGraph.of(copied(self._original), inputs, self._settings.min_length, self._prefixes)
        if found.weights == self._weights:
            return
        self._weights = found.weights
        try:
            plan = Plan.of(found, self._recipe, self._settings.outside)
        except RecipeError as error:
            self._run, plan = self._original, Plan.dense(found, f"the weights changed: the recipe {error}")
            warnings.warn(
                f"the weights changed, and the recipe of this graph {error} It is dense from now on: {UNTIL}.",
                AfbsWarning,
                stacklevel=3,
            )
        else:
            plan = revalidated(
                plan, [SampleRun(found.gm, found.sites, inputs)], self._recipe, "the recipe of this graph"
            )
            self._take(found, plan)
        registry.changed(self._id, plan)

    def _take(self, found: FoundGraph, plan: Plan) -> None:
        """Run with other constants from now on.

        Args:
            found: the graph, not rewritten yet; plan: for it.
        """
        calls = {site.name: call for site, call in plan.calls.items()}
        if calls != self._calls:
            rewrite(found.gm, plan.calls)
            self._calls, self._run = calls, found.gm
