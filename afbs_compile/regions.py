"""One compilation for many blocks: a model compiled block by block, or whose graph breaks in every block.

A graph of one module has its constants written into it, and guards on its parameters: twelve blocks would be twelve
compilations, and Dynamo stops at eight. Where a model has several modules like the one that a graph is of, the graph
holds ``afbs::shared_attention`` instead and has no such guards. Which block runs it is known from the tensors that it
comes with and the module that is running; what was calibrated for that block is looked up then, as for models that are
served without a graph.
"""

from __future__ import annotations

import itertools
import re
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from afbs_compile.errors import AfbsWarning, RecipeError
from afbs_compile.found import FoundGraph
from afbs_compile.integrations.served import ServedModel, of_modules
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.shared_op import attending
from afbs_compile.match import match
from afbs_compile.options import Options
from afbs_compile.passes.build import copied
from afbs_compile.passes.names import SiteNames, called_from, clean_path
from afbs_compile.passes.place import Owner, Place, callers, running
from afbs_compile.reasons import grouped
from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.report import registry

OWN_GRAPHS = 2
"""Models of one class that have a compilation each, with constants in the graph; further ones share one."""

LIMITS = ("recompile_limit", "accumulated_recompile_limit")
"""Dynamo's settings: compilations of a function before it stops, and those that it counts for all its callers."""

NO_MODEL = "not calibrated: the model that it is part of is not running"

Refs = tuple["weakref.ref[Any]", ...]
_Maker = tuple["weakref.ref[nn.Module]", str]

_served: weakref.WeakKeyDictionary[nn.Module, list[ServedModel]] = weakref.WeakKeyDictionary()
"""What serves the blocks of each model, for each way in which it was compiled; a model keeps it, and nothing else."""

_makers: weakref.WeakKeyDictionary[ServedModel, dict[str, _Maker]] = weakref.WeakKeyDictionary()
"""Which module makes the call of each name, and where in its code."""

_owners: dict[tuple[str, str], list[Refs]] = {}
"""The modules that each graph was compiled for, by Dynamo's id of the frame and digest of the graph."""

_limits: dict[str, tuple[int, int]] = {}
"""Dynamo's own limits where they were raised, and what they were raised to."""


def is_shared(found: FoundGraph, owner: Owner, place: Place, inputs: Sequence[Any], settings: Options) -> bool:
    """Whether a graph that is being compiled is to serve every module like its own.

    Where that is asked for which a graph of one module has alone (samples, a budget on the output, a calibration for
    each length), each has its own.
    """
    if place.root is None:
        return False
    key = owner.key(inputs)
    earlier = _owners.setdefault((registry.compile_id().split("_")[0], found.graph if not place.repeated else ""), [])
    earlier[:] = [refs for refs in earlier if all(ref() is not None for ref in refs)]
    if not any(_are(refs, key) for refs in earlier):
        earlier.append(tuple(map(weakref.ref, key)))
    if place.repeated and len(earlier) > 1:
        _make_room(place.alike)
    if not owner.has_parameters:  # nothing can be guarded to keep other modules from running it
        return place.repeated
    if settings.samples is not None or settings.budget is not None or settings.outside == "recalibrate":
        return False
    return place.repeated or len(earlier) > OWN_GRAPHS


def make_room_for_blocks(gm: fx.GraphModule) -> None:
    """Let Dynamo compile once for each block of the model that is being compiled, if its graph breaks.

    The frames between the breaks, a hook's that all modules share say, need not have an attention call; once Dynamo
    stops at one of them it compiles nothing that this one calls.
    """
    ended_by = getattr(gm, "compile_subgraph_reason", None)
    if getattr(ended_by, "graph_break", False):
        models = [owner for owner in callers() if isinstance(owner, nn.Module)]
        lists = (part for model in models for part in model.modules() if isinstance(part, nn.ModuleList))
        _make_room(max(map(len, lists), default=0))


def _are(refs: Refs, key: tuple[Any, ...]) -> bool:
    return len(refs) == len(key) and all(ref() is value for ref, value in zip(refs, key, strict=True))


def _make_room(blocks: int) -> None:
    """Give each block as many compilations as Dynamo gives a function, where something else than us tells blocks apart,
    as a layer's number in a cache does: the limit would decide which of them are sparse.
    """
    config: Any = torch._dynamo.config
    for name in LIMITS:
        if (limit := getattr(config, name, None)) is None:
            continue
        own, raised = _limits.get(name, (limit, limit))
        own = own if limit == raised else limit  # someone else has set it since
        room = _limits.get(LIMITS[0], (own, own))[0] * blocks
        if limit < room:
            _limits[name] = (own, room)
            setattr(config, name, room)


@dataclass(frozen=True)
class _Block:
    """A module that runs a shared graph.

    Attributes:
        owner: what tells it; served: what serves its model, ``None`` where that is not known; names: of its calls.
    """

    owner: Refs
    served: weakref.ref[ServedModel] | None
    names: tuple[str, ...]

    def attend(self, call: int, operands: Operands) -> Tensor | None:
        served = None if self.served is None else self.served()
        return None if served is None else served.attend(self.names[call], operands)


class SharedGraph:
    """A compiled graph that runs for many modules.

    Args:
        compiled: what runs; original: the graph as Dynamo captured it; owner: of it.
        found: what was made of it for the module that it was compiled for.
        settings: options.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        original: fx.GraphModule,
        owner: Owner,
        found: FoundGraph,
        settings: Options,
    ) -> None:
        self._run, self._original, self._owner, self._settings = compiled, original, owner, settings
        self._device = found.sites[0].device
        self._names = [_Name.of(site.name, site.node, found.prefixes) for site in found.sites]
        self._code = [str(site.node.meta.get("stack_trace")) for site in found.sites]
        self._refusals = [(_Name.of(r.name, r.node, found.prefixes), r.reason) for r in found.refusals]
        self._blocks: dict[tuple[int, ...], _Block] = {}
        self._said: set[str] = set()
        self._told: set[tuple[str, ...]] = set()

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph with the constants of the module that is running.

        Which one that is cannot be asked earlier: while Dynamo compiles a method, its module is not on the stack yet.
        """
        key = self._owner.key(inputs)
        block = self._blocks.get(tuple(map(id, key)))
        if block is None or not _are(block.owner, key):
            block = self._note(key, inputs)
        with attending(block.attend):
            out = self._run(*inputs)
        if block.names not in self._told:
            self._tell(block)
        return out

    def _note(self, key: tuple[Any, ...], inputs: Sequence[Any]) -> _Block:
        """Remember a module that runs the graph.

        Raises:
            RecipeError: the recipe that the user named is damaged, or belongs to another model or device.
        """
        place = self._owner.place(inputs)
        gone = [ids for ids, block in self._blocks.items() if any(ref() is None for ref in block.owner)]
        for ids in gone:
            del self._blocks[ids]
        root = None if place.root is None else place.root()
        served = None if root is None else _served_for(root, self._settings, self._device)
        names = [name.under(place.prefixes) for name in self._names]
        own = names
        if served is not None:
            own = [_own_name(served, name, code) for name, code in zip(names, self._code, strict=True)]
            self._adopt(served, dict(zip(names, own, strict=True)), inputs, place)
            for name, reason in self._refusals:
                served.refuse(name.under(place.prefixes), reason)
        kept = None if served is None else weakref.ref(served)
        block = _Block(tuple(map(weakref.ref, key)), kept, tuple(own))
        self._blocks[tuple(map(id, key))] = block
        return block

    def _adopt(self, served: ServedModel, names: Mapping[str, str], inputs: Sequence[Any], place: Place) -> None:
        """Look up what a recipe that the user named has of a module's calls.

        Args:
            names: what each is called in the model, by its name in the graph.
        """
        recipe = served.recipe
        if self._settings.recipe is None or recipe is None or served.knows(names.values()):
            return
        found = FoundGraph.of(copied(self._original), inputs, self._settings.min_length, place.prefixes)
        named = "the recipe given" if isinstance(self._settings.recipe, Recipe) else f"recipe {self._settings.recipe}"
        try:
            known = match(found, recipe)
        except RecipeError as error:
            raise RecipeError(f"{named} {error}") from None
        is_same = (known.graph.graph, known.graph.weights) == (found.graph, found.weights)
        there = {site.name: site for site in recipe.sites}
        recorded = {}
        for name, site in known.sites.items():
            own = names[name]
            if is_same or own == name:
                recorded[own] = site
            elif own in there:  # one name of several calls in several graphs: this row is the first one's
                recorded[own] = there[own]
        served.adopt(recorded, differs=bool(known.differences))
        if known.differences and self._is_new("; ".join(known.differences)):
            warnings.warn(
                f"{named} was made for a model that differs: {'; '.join(known.differences)}. Each call is checked on "
                "the first inputs that reach it.",
                AfbsWarning,
                stacklevel=3,
            )

    def _tell(self, block: _Block) -> None:
        """After a block's first call: say why no call of it is sparse, once for each reason."""
        self._told.add(block.names)
        reason = NO_MODEL
        served = None if block.served is None else block.served()
        if served is not None:
            rows = [row for row in served.rows if row.name in block.names]
            if any(row.outcome == "sparse" for row in rows):
                return
            reason = grouped(row.reason for row in rows)
        if self._is_new(reason):
            sentence = f"afbs: no attention call of {_module_of(block.names)} is sparse: {reason}."
            warnings.warn(sentence, AfbsWarning, stacklevel=3)

    def _is_new(self, sentence: str) -> bool:
        new = sentence not in self._said
        self._said.add(sentence)
        return new


@dataclass(frozen=True)
class _Name:
    """The name of a call, but for where its module stands: ``self_attn`` of the frame's variable ``self``."""

    variable: str
    path: str
    number: str

    @classmethod
    def of(cls, name: str, node: fx.Node, prefixes: Mapping[str, str]) -> _Name:
        variable, path = called_from(node)
        return cls(variable, path, name.removeprefix(SiteNames(prefixes).path(variable, path)))

    def under(self, prefixes: Mapping[str, str]) -> str:
        """The name in a model."""
        return SiteNames(prefixes).path(self.variable, self.path) + self.number


def _own_name(served: ServedModel, name: str, code: str) -> str:
    """A name that no other call of the model has: a module may make one call in each of several graphs.

    Args:
        name: of the call in its graph; code: the lines that make it.
    """
    module, makers = running(), _makers.setdefault(served, {})
    assert module is not None, "what serves a model was found by the modules that are running"
    others = ((own, ref(), there) for own, (ref, there) in makers.items())
    taken = {own for own, maker, there in others if maker is not None and (maker is not module or there != code)}
    numbered = (f"{name}#{number}" for number in itertools.count(2))
    own = next(own for own in itertools.chain([name], numbered) if own not in taken)
    makers[own] = (weakref.ref(module), code)
    return own


def _module_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _served_for(root: nn.Module, settings: Options, device: torch.device) -> ServedModel:
    mine = _served.setdefault(root, [])
    for served in mine:
        if served.settings == settings:
            return served
    mine.append(of_modules(root, settings, device=device, by_graph=True))
    return mine[-1]


def rows_of(module: nn.Module) -> list[tuple[ServedModel, list[SiteRecipe]]]:
    """What was decided for the calls of a module's blocks, and what serves them.

    Args:
        module: a model, a part of one, or what holds it.
    """
    found = []
    for root, served in _served.items():
        path = next((clean_path(name) for name, inner in root.named_modules() if inner is module), None)
        if path is None and not any(inner is root for inner in module.modules()):
            continue
        for one in served:
            rows = [row for row in one.rows if not path or re.match(rf"{re.escape(path)}([.#]|$)", row.name)]
            if rows:
                found.append((one, rows))
    return found


def forget_blocks() -> None:
    """Forget everything; Dynamo's ``reset()`` calls it."""
    _owners.clear()
    _served.clear()
    for name, (limit, raised) in _limits.items():
        if getattr(torch._dynamo.config, name) == raised:  # nobody else has set it since
            setattr(torch._dynamo.config, name, limit)
    _limits.clear()
