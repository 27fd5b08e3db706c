"""Remembers what the backend did with each graph, so that :func:`afbs_compile.explain` can tell."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from afbs_compile.found import FoundGraph
from afbs_compile.kernels.call import SparseCall
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
    """

    compile_id: str
    rows: tuple[SiteRecipe, ...]
    calls: Mapping[str, tuple[OperandShapes, SparseCall]]
    recipe: Recipe | None
    before: str
    after: str
    parameters: tuple[weakref.ref[torch.Tensor], ...]

    def uses(self, tensor_ids: set[int]) -> bool:
        """Whether one of the graph's parameters is among these (by ``id``)."""
        return any((tensor := ref()) is not None and id(tensor) in tensor_ids for ref in self.parameters)


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
        same answer before, or where another graph of the model was rewritten.
    """
    tensors = {id(tensor) for _, tensor in found.tensors}
    answered = any(graph.uses(tensors) and any(r.outcome == "sparse" for r in graph.rows) for graph in _graphs)
    key = (found.graph if found.tensors else compile_id().split("_")[0], plan.summary())
    new = key not in _said
    _said.add(key)
    _graphs[:] = [
        graph for graph in _graphs if not graph.parameters or any(ref() is not None for ref in graph.parameters)
    ]
    _graphs.append(
        CompiledGraph(
            compile_id=compile_id(),
            rows=plan.rows,
            calls=_sparse_calls(found, plan),
            recipe=recipe,
            before=rewritten.before,
            after=rewritten.after,
            parameters=tuple(weakref.ref(tensor) for _, tensor in found.tensors),
        )
    )
    return new and not answered


def _sparse_calls(found: FoundGraph, plan: Plan) -> dict[str, tuple[OperandShapes, SparseCall]]:
    rows = {row.name: row.call for row in plan.rows}
    sites = [(site, rows[site.name]) for site in found.sites]
    return {site.name: (site.shapes(), call) for site, call in sites if call is not None and not call.is_dense}


def graphs_of(tensors: Iterable[torch.Tensor], compile_ids: set[str]) -> list[CompiledGraph]:
    """The remembered graphs that use one of the tensors, or have one of the ids."""
    ids = {id(tensor) for tensor in tensors}
    return [graph for graph in _graphs if graph.uses(ids) or graph.compile_id in compile_ids]


def clear() -> None:
    """Forget everything; Dynamo's ``reset()`` calls it."""
    _graphs.clear()
    _said.clear()
