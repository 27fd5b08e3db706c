"""Speeds that were measured while the machine had other work, measured again when it has less."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from afbs_compile.found import FoundGraph
from afbs_compile.kernels.operands import Operands
from afbs_compile.match import match
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.plan import size_now
from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.tuner.clock import is_busy
from afbs_compile.tuner.site import too_slow
from afbs_compile.tuner.speed import SiteSpeed, Stopwatch

_log = logging.getLogger("afbs_compile")


def timed_again(row: SiteRecipe, operands: Operands, stopwatch: Stopwatch) -> SiteRecipe:
    """The row with the speed of its call on these operands, and the outcome that follows from it.

    Args:
        row: of a call that was timed; operands: of the call, at its calibrated length.
        stopwatch: what timing earlier calls has shown.
    """
    if row.calibrated.is_dense:  # a check left no head sparse
        return row
    sparsity = sum(head.sparsity for head in row.heads) / len(row.heads)
    speed = SiteSpeed.measure(operands.element(0), row.calibrated.rounded(), sparsity, stopwatch)
    reason = too_slow(speed)
    return replace(
        row,
        outcome="dense" if reason else "sparse",
        reason=reason,
        call=replace(row.calibrated, min_length=speed.min_length or 0),
        dense_ms=round(speed.dense_ms, 4),
        sparse_ms=round(speed.sparse_ms, 4),
        unsure=speed.is_unsure,
    )


def decided_again(recipe: Recipe, found: FoundGraph, inputs: Sequence[Any]) -> Recipe:
    """The recipe with the calls of a graph that were timed on a busy machine timed again, if it is busy no more.

    Args:
        recipe: fits the graph; found: the graph; inputs: of one call. Where they are not as long as the samples, or
            where several processes share the model, the recipe stays as it is.
    """
    here = match(found, recipe)
    unsure = {name for name, row in here.sites.items() if row.unsure}
    length = here.graph.samples.lengths[1]
    if (
        not unsure
        or not found.peers.are_alone
        or any(size_now(site.k_len) != length for site in found.sites)
        or is_busy(found.sites[0].device)
    ):
        return recipe
    _log.info("timing %d calls again that were timed on a busy machine", len(unsure))
    rows = all_timed_again({name: here.sites[name] for name in unsure}, SampleRun(found.gm, found.sites, inputs))
    return with_rows(recipe, rows)


def all_timed_again(rows: dict[str, SiteRecipe], run: SampleRun) -> list[SiteRecipe]:
    """Rows by the names of their calls in a graph, each timed again on what a sample makes of it."""
    stopwatch = Stopwatch()
    with closing(capture([run])) as walk:
        return [timed_again(rows[name], operands[0], stopwatch) for name, operands in walk if name in rows]


def with_rows(recipe: Recipe, rows: Collection[SiteRecipe]) -> Recipe:
    """The recipe with other rows in place of those that are named alike."""
    new = {row.name: row for row in rows}
    graphs = (replace(graph, sites=tuple(new.get(site.name, site) for site in graph.sites)) for graph in recipe.graphs)
    return replace(recipe, graphs=tuple(graphs))
