"""Remembers what the backend did with each graph, so that :func:`afbs_compile.explain` can tell."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from afbs_compile.found import FoundGraph
from afbs_compile.kernels.call import SparseCall
from afbs_compile.monitor.monitor import Monitor
from afbs_compile.passes.place import callers
from afbs_compile.passes.rewrite import Rewrite
from afbs_compile.passes.site import OperandShapes
from afbs_compile.plan import Plan
from afbs_compile.recipe import Recipe, SiteRecipe


@dataclass(frozen=True)
class CompiledGraph:
    """One graph that the backend compiled.

    Attributes:
        compile_id: Dynamo's id of the compilation.
        rows: every attention call and its outcome in this graph.
        calls: those that have sparse heads, by name, rewritten or not: what they were called on, and their constants.
        recipe: what it was rewritten with, if anything.
        before, after: text of the graph.
        parameters: tensors that it uses; callers: the compiled modules or functions that ran when it was compiled. A
            graph break may leave graphs without parameters.
        shared: whether it runs for several modules, each with constants of its own that are not in the rows.
        monitor: what watches it, if anything does.
    """

    compile_id: str
    rows: tuple[SiteRecipe, ...]
    calls: Mapping[str, tuple[OperandShapes, SparseCall]]
    recipe: Recipe | None
    before: str
    after: str
    parameters: tuple[weakref.ref[torch.Tensor], ...]
    callers: tuple[weakref.ref[Any], ...]
    shared: bool = False
    monitor: Monitor | None = None

    def belongs_to(self, ids: set[int]) -> bool:
        """Whether one of the graph's parameters or callers is among these (by ``id``)."""
        owners = (ref() for ref in (*self.parameters, *self.callers))
        return any(owner is not None and id(owner) in ids for owner in owners)

    @property
    def is_orphan(self) -> bool:
        """Whether it had parameters or callers, and all are gone."""
        owners = (*self.parameters, *self.callers)
        return bool(owners) and all(ref() is None for ref in owners)


SHARED = "decided for each module that runs this graph"

_graphs: list[CompiledGraph] = []
_said: set[tuple[str, str]] = set()


def compile_id() -> str:
    """Dynamo's id of the graph being compiled, e.g. ``0_1`` for the second compilation of the first frame."""
    current = torch._guards.CompileContext.current_compile_id()
    return "none" if current is None else f"{current.frame_id}_{current.frame_compile_id}"


def record(found: FoundGraph, plan: Plan, rewritten: Rewrite, recipe: Recipe | None) -> bool:
    """Remember a graph.

    Returns:
        Whether the user has yet to be told, should nothing have been rewritten: false where the same graph gave the
        same answer before; where another graph of the model was rewritten and this one stays dense by design, as a
        decoding step does; or, for a graph without attention, where another one has some or is yet to come.
    """
    tensors, compiled = [tensor for _, tensor in found.tensors], callers()
    mine = [graph for graph in _graphs if graph.belongs_to({id(owner) for owner in (*tensors, *compiled)})]
    if plan.rows:
        rewritten_too = any(graph.shared or any(row.outcome == "sparse" for row in graph.rows) for graph in mine)
        answered = plan.is_expected and rewritten_too
    else:
        ended_by = getattr(found.gm, "compile_subgraph_reason", None)
        owned = any(any(True for _ in owner.parameters()) for owner in compiled if isinstance(owner, torch.nn.Module))
        # Of a model that has parameters a graph without any is a part: a function that one of its parts calls.
        is_part = bool(found.prefixes) or getattr(ended_by, "graph_break", False) or (owned and not found.tensors)
        answered = is_part or any(graph.rows for graph in mine)
    key = (found.graph if found.tensors else compile_id().split("_")[0], plan.summary())
    new = key not in _said
    if not answered:
        _said.add(key)
    _graphs[:] = [graph for graph in _graphs if not graph.is_orphan]
    _graphs.append(
        CompiledGraph(
            compile_id=compile_id(),
            rows=plan.rows,
            calls=_sparse_calls(found, plan),
            recipe=recipe,
            before=rewritten.before,
            after=rewritten.after,
            parameters=tuple(map(weakref.ref, tensors)),
            callers=tuple(map(weakref.ref, compiled)),
        )
    )
    return new and not answered


def record_shared(found: FoundGraph, rewritten: Rewrite) -> None:
    """Remember a graph that runs for several modules: its calls are decided module by module, elsewhere."""
    rows = tuple(SiteRecipe(site.name, "dense", SHARED) for site in found.sites)
    _graphs.append(
        CompiledGraph(
            compile_id=compile_id(),
            rows=rows,
            calls={},
            recipe=None,
            before=rewritten.before,
            after=rewritten.after,
            parameters=tuple(weakref.ref(tensor) for _, tensor in found.tensors),
            callers=tuple(map(weakref.ref, callers())),
            shared=True,
        )
    )


def changed(compile_id: str, plan: Plan, recipe: Recipe | None = None) -> None:
    """Remember another outcome of a graph's calls.

    Args:
        compile_id: of the graph; plan: what holds from now on; recipe: that it is of, where it is another one.
    """
    _change(compile_id, rows=plan.rows, **({} if recipe is None else {"recipe": recipe}))


def watch(compile_id: str, monitor: Monitor) -> None:
    """Remember what watches a graph."""
    _change(compile_id, monitor=monitor)


def _change(compile_id: str, **fields: Any) -> None:
    _graphs[:] = [replace(graph, **fields) if graph.compile_id == compile_id else graph for graph in _graphs]


def _sparse_calls(found: FoundGraph, plan: Plan) -> dict[str, tuple[OperandShapes, SparseCall]]:
    rows = {row.name: row.call for row in plan.rows}
    sites = [(site, rows[site.name]) for site in found.sites]
    return {site.name: (site.shapes(), call) for site, call in sites if call is not None and not call.is_dense}


def graphs_of(owners: Iterable[Any], compile_ids: set[str]) -> list[CompiledGraph]:
    """The remembered graphs that use one of the tensors, ran for one of the callables, or have one of the ids.

    Args:
        owners: tensors, modules and functions.
        compile_ids: ids of what was compiled from their code, which several modules share: only graphs without
            parameters are looked up by them.
    """
    ids = {id(owner) for owner in owners}
    return [
        graph
        for graph in _graphs
        if graph.belongs_to(ids) or (not graph.parameters and graph.compile_id in compile_ids)
    ]


def clear() -> None:
    """Forget everything; Dynamo's ``reset()`` calls it."""
    _graphs.clear()
    _said.clear()
