"""The attention calls of one model, served one by one: what an interface hands over is made sparse or left alone.

There is no graph here. A call is known by the path of the module that makes it, as in a recipe of
:func:`afbs_compile.calibrate`; what is decided for it is decided when it first comes.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afbs_compile.cache import cache_path, read_cached, write_cached
from afbs_compile.conditions import conditions
from afbs_compile.errors import AfbsWarning, CalibrationError, RecipeError, first_line, is_out_of_memory
from afbs_compile.fingerprint import digest_of
from afbs_compile.integrations.offload import device_of, values_of
from afbs_compile.kernels.attend import machine
from afbs_compile.kernels.attend.engines import family_on, precision_refusal
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.sight import without_idle_parts
from afbs_compile.match import check_device, placed, renamed_as, weight_differences
from afbs_compile.monitor.monitor import Monitor
from afbs_compile.monitor.promised import Promised
from afbs_compile.monitor.successors import change_after, place_beside, save_successor, tuning_again
from afbs_compile.options import Options
from afbs_compile.peers import Part, Peers, part_of
from afbs_compile.plan import NO_RECIPE, NOT_CALIBRATED, Sizes, applied
from afbs_compile.recipe import Change, GraphRecipe, Recipe, SampleRecord, SiteRecipe
from afbs_compile.retime import timed_again
from afbs_compile.revalidate import checked, raised
from afbs_compile.shards import Heads, joined, of_part
from afbs_compile.sketch import all_read, held, likeness, sketched, unread, version_of
from afbs_compile.tuner.clock import is_busy
from afbs_compile.tuner.graph import recipe_of, site_recipe
from afbs_compile.tuner.progress import log_where_nobody_listens
from afbs_compile.tuner.promise import promise
from afbs_compile.tuner.site import tune_site
from afbs_compile.tuner.speed import Stopwatch

_log = logging.getLogger("afbs_compile")

LENGTHS = 64
"""Lengths of a call for which its constants are kept at hand."""


@dataclass
class _Site:
    """One call: what is recorded of it, and its constants by length, ``None`` where it stays dense.

    ``unchecked``: it is measured when it comes next; ``of_these_weights``: only its inputs have changed since it was
    calibrated, so that what does not hold is raised.
    """

    row: SiteRecipe
    unchecked: bool = False
    of_these_weights: bool = False
    calls: OrderedDict[tuple[int, int], SparseCall | None] = field(default_factory=OrderedDict)


_by_model: weakref.WeakKeyDictionary[Any, ServedModel | None] = weakref.WeakKeyDictionary()


def serve(model: Any, served: ServedModel | None) -> None:
    """Have a model served from now on, or left dense."""
    _by_model[model] = served


def serve_with(model: nn.Module, settings: Options) -> ServedModel:
    """Have a model served from now on, by the names of its modules; it may be let go of all the same.

    Raises:
        RecipeError: as :class:`ServedModel`.
    """
    served = of_modules(model, settings)
    serve(model, served)
    return served


def of_modules(
    model: nn.Module, settings: Options, *, device: torch.device | None = None, by_graph: bool = False
) -> ServedModel:
    """What serves a model's calls by the names of its modules; the model may be let go of all the same.

    Args:
        model: the model; settings, device, by_graph: as of :class:`ServedModel`.

    Raises:
        RecipeError: as :class:`ServedModel`.
    """
    alone = weakref.ref(model)

    def names() -> Iterator[str]:
        alive = alone()
        yield from () if alive is None else (name for name, _ in alive.named_modules())

    def tensors(inside: str = "") -> Iterator[tuple[str, Tensor]]:
        alive = alone()
        if alive is not None:
            yield from values_of(alive, inside)

    where = device_of(model) if device is None else device
    return ServedModel(tensors, names, settings, device=where, by_graph=by_graph)


def is_served(model: Any) -> bool:
    """Whether it is decided what serves a model."""
    return model in _by_model


def served_model(model: Any) -> ServedModel | None:
    """What serves a model, if anything does."""
    return _by_model.get(model) if isinstance(model, nn.Module) else None


class ServedModel:
    """The calls of one model and its recipe.

    Args:
        tensors: names and values of its parameters and buffers, now; of those alone whose names begin with its
            argument, where it gets one.
        names: of every module that may make a call.
        settings: options; where a recipe is named nothing is calibrated.
        device: where it computes, by default that of its first tensor.
        by_graph: whether calls are found in graphs, which say what a recipe named has of them (:meth:`adopt`), instead
            of by the names of modules.

    Raises:
        RecipeError: the recipe named was made for another model, device or predictor.
    """

    def __init__(
        self,
        tensors: Callable[..., Iterable[tuple[str, Tensor]]],
        names: Callable[[], Iterable[str]],
        settings: Options,
        *,
        device: torch.device | None = None,
        by_graph: bool = False,
    ) -> None:
        self.settings = settings
        self._tensors, self._names = tensors, names
        self._sites: dict[str, _Site] = {}
        self._refused: dict[str, str] = {}
        self._first: str | None = None
        now = list(tensors())
        self._sketches = sketched(now)
        # Weights that are elsewhere come as other tensors at each call: holding these would keep them here.
        self._weights = [tensor for _, tensor in now] if all_read(self._sketches) else []
        self._peers = Peers.of([tensor for _, tensor in now])
        self._stopwatches: dict[Part, Stopwatch] = {}
        self._versions, self._held = self._version(), held(now)
        self._recorded: dict[str, SiteRecipe] = {}
        self._other_weights = False  # than those of what is recorded
        self._differing: set[str] = set()  # calls whose module is not quite the calibrated one
        self._device = device or (now[0][1].device if now else torch.device("cpu"))
        self._path: Path | None = None
        how = settings.watching
        self.monitor = None if how is None else Monitor(how, None, self._calibrate_again, self._calibrate_again)
        self._tuning = settings.tuning
        self._again: set[str] = set()  # calls that are calibrated again, on the inputs that come next
        self._begins_another = False
        self._history: tuple[Change, ...] = ()
        self._successor: Path | None = None
        self.recipe = _named(settings) if by_graph and settings.recipe is not None else self._found_recipe()

    def leaves(self, name: str, q_len: int, k_len: int) -> bool:
        """Whether it is known already that a call stays dense, so that nobody needs to put its operands together.

        Args:
            name: of the module that makes it; q_len, k_len: of the call.
        """
        if q_len * k_len < self.settings.min_length**2:
            return True
        if self._first in (None, name):
            self._notice_other_weights()
        site = self._sites.get(name)
        return site is not None and not site.unchecked and site.calls.get((q_len, k_len), ...) is None

    def attend(self, name: str, operands: Operands) -> Tensor | None:
        """The result of a call, ``[B, H, q_len, D_v]``; ``None`` where it is to be computed densely.

        Args:
            name: of the module that makes it; operands: of the call, without gradients.
        """
        if self._first in (None, name):
            self._notice_other_weights()
        self._first = self._first or name
        call = self._call(name, operands)
        if call is None:
            return None
        if self.monitor is None:
            return run(without_idle_parts(operands), call)[0]
        if not self.monitor.watches(name):
            self._watch(self.monitor, name)
        return self.monitor.attend(name, operands, call)

    def adopt(self, recorded: Mapping[str, SiteRecipe], *, differs: bool) -> None:
        """Take over what the recipe that is named recorded of some calls.

        Args:
            recorded: by the calls' names here; differs: whether thresholds are to be checked first.
        """
        self._recorded.update(recorded)
        self._differing |= set(recorded) if differs else set()

    def knows(self, names: Iterable[str]) -> bool:
        """Whether it is recorded, or decided, what becomes of some calls."""
        return all(name in self._recorded or name in self._sites for name in names)

    def refuse(self, name: str, reason: str) -> None:
        """Remember why a call stays dense that the interface did not hand over."""
        self._refused[name] = reason

    def check_again(self) -> None:
        """Have thresholds raised, where they do not hold on the inputs that reach a call next: inputs have changed."""
        for site in self._sites.values():
            site.of_these_weights = site.of_these_weights or not site.unchecked
            site.unchecked = True

    @property
    def rows(self) -> tuple[SiteRecipe, ...]:
        """Every call that came, with its outcome."""
        refused = (SiteRecipe(name, "refused", why) for name, why in self._refused.items() if name not in self._sites)
        return (*(site.row for site in self._sites.values()), *refused)

    def _watch(self, monitor: Monitor, name: str) -> None:
        """Begin to watch a call that has thresholds."""
        assert self.recipe is not None, "thresholds are of a recipe"
        monitor.recipe = self.recipe
        monitor.watch(name, Promised.by(self.recipe, self._sites[name].row, monitor.settings.rate))

    def _calibrate_again(self) -> None:
        """Have every call calibrated again on the inputs that reach it next.

        Raises:
            CalibrationError: processes share the model, or the recipe has a budget.
        """
        if not self._peers.are_alone:
            raise CalibrationError("monitor: several processes share the model, and would have to begin at once.")
        recipe = self.recipe
        if recipe is None:
            return
        if recipe.budget is not None:
            raise CalibrationError(
                "monitor: the recipe has a budget on the output, which is not seen here: make another one with "
                "afbs_compile.calibrate(model, samples)."
            )
        path = self._path or self.settings.recipe_file  # the cache has no place where a recipe is named
        self._successor = None if path is None else place_beside(path)
        self._tuning = tuning_again(recipe)
        self._history = (*recipe.history, change_after(() if self.monitor is None else self.monitor.alarms))
        self._again, self._begins_another = set(self._sites), True

    def _found_recipe(self) -> Recipe | None:
        """The recipe the user named, else a cached one."""
        named = self.settings.recipe
        if named is not None:
            recipe = _named(self.settings)
            name = "the recipe given" if isinstance(named, Recipe) else f"recipe {named}"
            try:
                self._adopt(recipe, name)
            except RecipeError as error:
                raise RecipeError(f"{name} {error}") from None
            return recipe
        if not all_read(self._sketches):  # offloaded: the cache could not tell whose recipe it has
            return None
        self._path = cache_path(conditions(self._device, self.settings, weights=self._digest(), graph="served"))
        path = self._path
        cached = self._peers.first(lambda: read_cached(path))
        if cached is not None:
            name = f"the cached recipe {self._path}"
            try:
                self._adopt(cached, name)
            except RecipeError as error:
                warnings.warn(f"{name} {error} Calibrating again.", AfbsWarning, stacklevel=2)
                return None
        return cached

    def _adopt(self, recipe: Recipe, name: str) -> None:
        """Take over what a recipe recorded, under the names here."""
        check_device(recipe, machine.kind(self._device), family_on(self._device))
        alike = likeness(self._sketches, [sketch for graph in recipe.graphs for sketch in graph.tensors])
        same = alike.same or any(graph.weights == self._digest() for graph in recipe.graphs)
        if not same and (alike.foreign or not any(graph.tensors for graph in recipe.graphs)):
            raise RecipeError("belongs to another model: other weights.")
        names = list(self._names())
        self._recorded = renamed_as(names, recipe)
        by_weights = placed(names, self._sketches, recipe)
        if len(by_weights) >= len(self._recorded):
            there = {site.name: site for site in recipe.sites}
            self._recorded = {name: there[call] for name, call in by_weights.items()}
        if not self._recorded:
            raise RecipeError("belongs to another model: none of its attention calls is named like a module here.")
        if not same:
            self._other_weights = True
            warnings.warn(
                f"{name} was made for a model that differs: {'; '.join(weight_differences(alike))}. "
                "Each call is checked on the first inputs that reach it.",
                AfbsWarning,
                stacklevel=2,
            )

    def _call(self, name: str, operands: Operands) -> SparseCall | None:
        """The constants of a call at its length; decided when it first comes."""
        site = self._sites.get(name)
        if site is None:
            site = self._sites[name] = self._decided(name, operands)
        elif name in self._again:
            site = self._sites[name] = self._calibrated_again(name, operands)
        if site.unchecked:
            self._check(site, operands)
        length = (operands.q_len, operands.k_len)
        if length not in site.calls:
            site.calls[length] = self._at_length(site.row, operands)
            if len(site.calls) > LENGTHS:
                site.calls.popitem(last=False)
        return site.calls[length]

    def _at_length(self, recorded: SiteRecipe, operands: Operands) -> SparseCall | None:
        sizes = Sizes(recorded.name, *_heads(operands), operands.q_len, operands.k_len)
        row = applied(sizes, recorded, self.settings.outside, None if self.recipe is None else self.recipe.tolerance)
        if row.outcome != "sparse" or row.calibrated.dense_at(operands.q_len, operands.k_len):
            return None
        if "fp8" in row.calibrated.precision and precision_refusal(operands, row.calibrated, "fp8") is not None:
            return row.calibrated.in_own_precision().rounded()
        return row.calibrated.rounded()

    def _decided(self, name: str, operands: Operands) -> _Site:
        recorded = self._recorded.get(name)
        if recorded is not None:
            try:
                mine = of_part(name, recorded, _heads(operands), self._part(name, operands).number)
            except RecipeError as error:
                return _Site(SiteRecipe(name, "refused", first_line(error)))
            if self._is_open(mine, operands):
                mine = timed_again(mine, operands, self._stopwatches.setdefault(Part(), Stopwatch()))
                self._write_down(mine)
            return _Site(mine, unchecked=self._other_weights or name in self._differing)
        if self.settings.recipe is not None:
            return _Site(SiteRecipe(name, "refused", NOT_CALIBRATED))
        if self.settings.first_call == "dense":
            return _Site(SiteRecipe(name, "refused", NO_RECIPE))
        if self.settings.budget is not None:
            reason = "not calibrated: a budget on the output needs afbs_compile.calibrate(model, samples)"
            return _Site(SiteRecipe(name, "refused", reason))
        return _Site(self._calibrated(name, operands))

    def _is_open(self, row: SiteRecipe, operands: Operands) -> bool:
        """Whether a cached decision was taken on a busy machine and can be taken on a quiet one now."""
        if not row.unsure or self._path is None or self.recipe is None or not self._peers.are_alone:
            return False
        return operands.k_len == self.recipe.graphs[0].samples.lengths[1] and not is_busy(operands.device)

    def _calibrated(self, name: str, operands: Operands) -> SiteRecipe:
        """Calibrate a call on its first operands, and write down what came out."""
        if not self._recorded:
            log_where_nobody_listens()
            _log.info("calibrating %s and the calls after it on their first inputs", name)
        part = self._part(name, operands)
        # Processes that have the same heads get inputs of their own, and may get none: only parts wait for each other.
        peers = Peers.of(self._tensors_of(name)) if part.of > 1 else Peers()
        stopwatch = self._stopwatches.setdefault(part, Stopwatch(peers))
        try:
            with peers.together():
                result = tune_site([operands], self._tuning, stopwatch=stopwatch)
                stopwatch.remember()
                row = joined(peers.gathered((part, site_recipe(name, operands, result))))
        except (RuntimeError, ValueError, MemoryError) as error:  # an engine's refusal: the model runs all the same
            reason = "out of memory" if is_out_of_memory(error) else first_line(error)
            return SiteRecipe(name, "refused", f"calibration failed: {reason}")
        self._recorded[name] = row
        _log.info("calibrated %s: %s, sparsity %.3f", name, row.outcome, row.sparsity)
        self.recipe = self._with(row, operands, int(result.measured.error.shape[0]))
        if self._history:
            if self._successor is not None:
                save_successor(self.recipe, self._successor)
        elif self._path is not None and self._peers.is_first:
            write_cached(self._path, self.recipe)
        return of_part(name, row, _heads(operands), part.number)

    def _calibrated_again(self, name: str, operands: Operands) -> _Site:
        """Calibrate a call whose thresholds are said not to hold any more."""
        self._again.discard(name)
        site = _Site(self._calibrated(name, operands))
        if self.monitor is not None and self.recipe is not None and site.row.heads:
            self._watch(self.monitor, name)
        return site

    def _with(self, row: SiteRecipe, operands: Operands, inputs: int) -> Recipe:
        """The recipe with one more call; it is whole after each, so that a process may end at any time."""
        if self.recipe is not None and not self._begins_another:
            (graph,) = self.recipe.graphs
            return replace(self.recipe, graphs=(replace(graph, sites=(*graph.sites, row)),))
        self._begins_another = False
        record = SampleRecord("first call", operands.q.shape[0], inputs, (operands.k_len, operands.k_len), "")
        graph = GraphRecipe("", self._digest(), "", record, 0.0, 0.0, (row,), promise(0, 0), self._sketches)
        return replace(recipe_of(graph, self._tuning, self._device), history=self._history)

    def _check(self, site: _Site, operands: Operands) -> None:
        """Look whether the thresholds of another form of the model hold in this one."""
        site.unchecked = False
        site.calls.clear()
        if site.row.outcome != "sparse":
            return
        call = self._at_length(site.row, operands)
        if call is None:  # too short to tell
            site.unchecked = True
            return
        tolerance = None if self.recipe is None else self.recipe.tolerance
        if site.of_these_weights and tolerance is not None:
            found = raised(site.row, call, [operands], tolerance, self._stopwatches.setdefault(Part(), Stopwatch()))
        else:
            found = checked(site.row, call, [operands], tolerance)
        site.row = found.row
        if site.of_these_weights:
            self._write_down(site.row)
        _log.info("checked %s: %d of %d sparse heads hold", site.row.name, found.held, found.heads)

    def _write_down(self, row: SiteRecipe) -> None:
        """Leave to the next process what a check raised, if the recipe was made here, for these weights."""
        if self.recipe is None or self.settings.recipe is not None or not self._peers.are_alone:
            return  # processes that share the model see their own heads, or their own inputs
        (graph,) = self.recipe.graphs
        if graph.weights != digest_of(self._held):
            return
        sites = tuple(row if each.name == row.name else each for each in graph.sites)
        self.recipe = replace(self.recipe, graphs=(replace(graph, sites=sites),))
        if self._path is not None:
            write_cached(self._path, self.recipe)

    def _notice_other_weights(self) -> None:
        """After a write into the weights every call is checked again, if values really changed."""
        versions = self._version()
        if versions == self._versions:
            return
        self._versions = versions
        before, self._held = self._held, held(self._tensors())
        if before == self._held:
            return
        if self._peers.are_alone:  # the others may not come here: of shards it is not known any more what they make
            self._sketches = sketched(self._tensors())
        else:
            self._sketches = tuple(unread(sketch) for sketch in self._sketches)
        warnings.warn(
            "the weights changed since the attention calls were calibrated: each is checked on the inputs that reach "
            "it next.",
            AfbsWarning,
            stacklevel=2,
        )
        self._other_weights = True
        for site in self._sites.values():
            site.unchecked, site.of_these_weights = True, False

    def _part(self, name: str, operands: Operands) -> Part:
        """The part of a call's heads that is computed here."""
        return part_of(self._tensors_of(name), operands.heads, operands.q.shape[3])

    def _tensors_of(self, name: str) -> list[Tensor]:
        """Weights of the module that makes a call, as they are while it does."""
        return [tensor for _, tensor in self._tensors(f"{name}.")]

    def _version(self) -> int:
        return sum(map(version_of, self._weights))

    def _digest(self) -> str:
        return digest_of(sketch.digest for sketch in self._sketches)


def _heads(operands: Operands) -> Heads:
    return Heads(operands.heads, operands.k.shape[1], operands.q.shape[3])


def _named(settings: Options) -> Recipe:
    """The recipe that the user named."""
    named: Any = settings.recipe
    return named if isinstance(named, Recipe) else Recipe.load(named)
