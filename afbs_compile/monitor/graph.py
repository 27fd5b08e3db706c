"""A compiled graph whose sparse calls are watched, and which is calibrated again when they do not hold any more.

Its calls are ``afbs::shared_attention``: constants are looked up when they run, so that a head becomes dense, or
another recipe takes over, without a compilation, and looks see the operands of the call itself.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from afbs_compile.errors import AfbsWarning, CalibrationError, OptionError, first_line
from afbs_compile.found import FoundGraph
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.shared_op import attending
from afbs_compile.monitor.monitor import OUTPUT, OUTPUT_RATE, Monitor
from afbs_compile.monitor.promised import Promised
from afbs_compile.monitor.settings import MonitorSettings
from afbs_compile.monitor.successors import change_after, place_beside, save_successor, tuning_again
from afbs_compile.options import Options
from afbs_compile.passes.build import copied
from afbs_compile.passes.capture import SampleRun, concrete, draws_random, run_with
from afbs_compile.plan import Plan
from afbs_compile.recipe import Recipe
from afbs_compile.report import registry
from afbs_compile.tuner.end_to_end import cost_of_output
from afbs_compile.tuner.graph import calibrate_graph
from afbs_compile.watch import Watched

_log = logging.getLogger("afbs_compile")

OUTPUT_SHARE = 0.25
"""Of the calls that are looked at: the output of one in four is compared, for that takes a dense pass of the model."""


class MonitoredGraph(Watched):
    """See the module. Arguments as of :class:`afbs_compile.watch.Watched`, and:

    Args:
        beside: where the recipe came from, beside which its successors are saved; ``None``: nowhere.

    Raises:
        OptionError: automatic recalibration is asked for, and it has nothing to work on, or would draw random numbers.

    Attributes:
        monitor: what is known.
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
        beside: Path | None,
    ) -> None:
        super().__init__(compiled, original, example_inputs, found, recipe, plan, settings)
        how = settings.watching
        assert how is not None, "it is monitored because the options say so"
        self._how, self._beside = how, beside
        self._names = list(self._calls)
        self._kept: deque[list[Any]] = deque(maxlen=how.keep)
        self._thread: threading.Thread | None = None
        self.monitor = Monitor(how, recipe, self._calibrate_again, self._calibrate_beside)
        self._begin(plan)
        _check(how, original, found)

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph, and now and then look at what comes out."""
        looked_at = self.monitor.draws(self._how.chance)
        compared = looked_at and self.monitor.watches(OUTPUT) and self.monitor.draws(OUTPUT_SHARE)
        kept = [concrete(value) for value in inputs] if compared or (looked_at and self._how.keep) else []
        if looked_at and self._how.keep:
            self._kept.append(kept)
        with attending(self._attend):
            out = super().__call__(*inputs)
        if compared:
            self._compare(kept, out)
        return out

    def _attend(self, number: int, operands: Operands) -> Tensor | None:
        call = self._calls.get(self._names[number])
        return None if call is None else self.monitor.attend(self._names[number], operands, call)

    def _take(self, found: FoundGraph, plan: Plan) -> None:
        """See :meth:`Watched._take`; calls that were dense when the graph was compiled stay dense."""
        there = {site.name: call.rounded() for site, call in plan.calls.items()}
        for name in [name for name in self._calls if name not in there]:
            self.monitor.forget(name)
        self._calls = {name: there[name] for name in self._names if name in there}
        self._begin(plan)

    def _begin(self, plan: Plan) -> None:
        """Watch the calls of a plan, from now on."""
        self._calls = {name: call.rounded() for name, call in self._calls.items()}
        self._rows = [row for row in plan.rows if row.name in self._calls]
        budget = self._recipe.budget
        self._watch_heads(are_tested=budget is None)  # what a head may cost of a budget nobody said
        if budget is not None:
            self.monitor.watch(OUTPUT, Promised((budget.limit,), OUTPUT_RATE))

    def _watch_heads(self, *, are_tested: bool) -> None:
        for row in self._rows:
            promised = Promised.by(self._recipe, row, self._how.rate)
            self.monitor.watch(row.name, replace(promised, is_tested=are_tested))

    @torch.no_grad()
    def _compare(self, inputs: Sequence[Any], out: Any) -> None:
        """Run a call again, densely, and see what its output cost of the budget."""
        budget = self._recipe.budget
        assert budget is not None, "without one the output is not watched"
        run = SampleRun(self._original, (), inputs)
        dense = run_with(run, lambda *_: None)
        try:
            cost = cost_of_output(run, dense, out, budget.quantity)
        except OptionError as error:
            self.monitor.forget(OUTPUT)
            self._watch_heads(are_tested=True)
            why = f"the output is not watched, but each head: {first_line(error)}"
            warnings.warn(f"afbs monitor: {why}", AfbsWarning, stacklevel=3)
        else:
            self.monitor.see_output(cost / budget.limit)

    def _calibrate_again(self) -> Recipe:
        """See :meth:`Monitor.recalibrate`."""
        runs = list(self._kept)
        if not runs:
            why = "keep is 0" if not self._how.keep else "no call was looked at yet"
            raise CalibrationError(f"monitor: no inputs were kept to calibrate on again: {why}.")
        found = FoundGraph.of(copied(self._original), runs[-1], self._settings.min_length, self._prefixes)
        if not found.peers.are_alone:
            raise CalibrationError(
                "monitor: the model is shared by several processes, which would have to calibrate at once: make "
                "another recipe with afbs_compile.calibrate in all of them."
            )
        recipe = calibrate_graph([(found, runs)], tuning_again(self._recipe), "samples")
        recipe = replace(recipe, history=(*self._recipe.history, change_after(self.monitor.alarms)))
        plan = Plan.of(found, recipe, self._settings.outside)
        self._recipe = self.monitor.recipe = recipe
        self._take(found, plan)
        registry.changed(self._id, plan, recipe)
        _log.info("calibrated again on %d inputs: sparsity %.3f", len(runs), recipe.sparsity)
        if self._beside is not None:
            save_successor(recipe, place_beside(self._beside))
        return recipe

    def _calibrate_beside(self) -> None:
        """Calibrate again while calls go on; one at a time."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=self._quietly, name="afbs recalibration")
        self._thread.start()

    def _quietly(self) -> None:
        try:
            self._calibrate_again()
        except Exception as error:  # nobody waits for it, and the alarmed heads are dense
            warnings.warn(f"afbs monitor: calibrating again failed: {first_line(error)}", AfbsWarning, stacklevel=2)


def _check(how: MonitorSettings, original: fx.GraphModule, found: FoundGraph) -> None:
    """Refuse an automatic recalibration that cannot be.

    Raises:
        OptionError: saying why.
    """
    if how.recalibrate != "automatically":
        return
    if how.keep == 0:
        raise OptionError("monitor: keep is 0; accepted: at least 1 with recalibrate 'automatically'")
    if draws_random(original, [site.node.name for site in found.sites]):
        raise OptionError(
            "monitor: recalibrate is 'automatically'; accepted: 'on demand' for a graph that may draw random numbers, "
            "whose state belongs to the thread that calls the model"
        )
