"""The public :func:`explain`: what was found, what was decided, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from afbs_compile.recipe import BudgetRecord, Recipe, SiteRecipe
from afbs_compile.report import registry

WIDTH = 150
HEADERS = ("site", "outcome", "heads", "sparsity", "error", "dense ms", "sparse ms", "kernel", "reason")


@dataclass(frozen=True)
class ExplainRow:
    """One attention call.

    Attributes:
        graph: number of the captured graph it is in.
        site: where it stands in the model.
        outcome: ``"sparse"``, ``"dense"`` or ``"refused"``; reason: why not sparse, ``None`` if it is.
        heads: query heads, 0 if refused; dense_heads: those that keep every block.
        sparsity: 1 - live / causally valid blocks of what runs, mean over the heads.
        error: relative L1 of what runs, worst head and validation input.
        dense_ms, sparse_ms: milliseconds at the calibrated length, ``None`` where not measured.
        kernel: what computes the call where it is sparse, e.g. ``"hopper 128x128"``: of a compiled model the kernel
            that serves it now, of a recipe the one that was timed. ``None`` where no head is sparse.
        kernel_reason: why it is not the quickest kernel of the engine, ``None`` if it is.
    """

    graph: int
    site: str
    outcome: str
    reason: str | None
    heads: int
    dense_heads: int
    sparsity: float
    error: float
    dense_ms: float | None
    sparse_ms: float | None
    kernel: str | None
    kernel_reason: str | None


@dataclass(frozen=True)
class Explanation:
    """A table to print, and the same as data.

    Attributes:
        rows: one per attention call.
        notes: what the thresholds were calibrated on, one line per recipe, and why calls are not on a quicker kernel.
        before, after: text of each compiled graph before and after the rewrite; empty for a recipe.
    """

    rows: tuple[ExplainRow, ...]
    notes: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries."""
        return [dict(vars(row)) for row in self.rows]

    def __rich__(self) -> Table:
        several = len({row.graph for row in self.rows}) > 1
        table = Table(caption="\n".join(self.notes), caption_justify="left")
        if several:
            table.add_column("graph")
        table.add_column("site", no_wrap=True)
        table.add_column("outcome", no_wrap=True)
        for header in HEADERS[2:-2]:
            table.add_column(header, justify="right")
        for header in HEADERS[-2:]:
            table.add_column(header, overflow="fold")
        for index, row in enumerate(self.rows):
            last = index + 1 == len(self.rows) or self.rows[index + 1].graph != row.graph
            table.add_row(*([str(row.graph)] if several else []), *_cells(row), end_section=last)
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=WIDTH).print(self)
        return text.getvalue().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        several = len({row.graph for row in self.rows}) > 1
        headers = ["graph"] * several + list(HEADERS)
        head = "".join(f"<th>{name}</th>" for name in headers)
        lines = [[str(row.graph)] * several + _cells(row) for row in self.rows]
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def explain(compiled_or_recipe: Recipe | Callable[..., Any]) -> Explanation:
    """Tell what happened to every attention call.

    Args:
        compiled_or_recipe: what ``torch.compile(model, backend="afbs")`` returned, or a module compiled in
            place, after a first call; or a recipe.

    Raises:
        TypeError: the argument is neither.
    """
    if isinstance(compiled_or_recipe, Recipe):
        recipe = compiled_or_recipe
        rows = [_row(index, site) for index, graph in enumerate(recipe.graphs) for site in graph.sites]
        return Explanation(tuple(rows), (_note(recipe), *_slower_kernels(rows)))
    graphs = _compiled_graphs(compiled_or_recipe)
    rows = [_row(index, _served(site, graph)) for index, graph in enumerate(graphs) for site in graph.rows]
    notes = dict.fromkeys(_note(graph.recipe) for graph in graphs if graph.recipe is not None)
    return Explanation(
        tuple(rows),
        (*notes, *_slower_kernels(rows)) if graphs else ("nothing is compiled yet: call the model once",),
        tuple(graph.before for graph in graphs),
        tuple(graph.after for graph in graphs),
    )


def _compiled_graphs(compiled: Any) -> Sequence[registry.CompiledGraph]:
    original = getattr(compiled, "_orig_mod", None) or getattr(compiled, "_torchdynamo_orig_callable", None)
    if original is None and getattr(compiled, "_compiled_call_impl", None) is not None:
        original = compiled  # module.compile() works in place
    if original is None:
        raise TypeError(
            f"compiled_or_recipe: got {type(compiled).__name__}; accepted: a Recipe or what torch.compile returned"
        )
    is_module = isinstance(original, torch.nn.Module)
    tensors = [*original.parameters(), *original.buffers()] if is_module else []
    return registry.graphs_of(tensors, set() if tensors else _compile_ids(original))


def _compile_ids(original: Any) -> set[str]:
    """Dynamo's ids of what was compiled from a function; a module's code is shared by all of its class."""
    function = getattr(original, "forward", original)
    entries = _debug_get_cache_entry_list(getattr(function, "__func__", function))
    return {f"{entry.compile_id.frame_id}_{entry.compile_id.frame_compile_id}" for entry in entries}


def _served(site: SiteRecipe, graph: registry.CompiledGraph) -> SiteRecipe:
    """A row with the kernel that would compute its call here and now, wherever it was calibrated."""
    call = graph.calls.get(site.name)
    name, reason = (None, None) if call is None else call.kernel()
    return replace(site, kernel=name, kernel_reason=reason)


def _slower_kernels(rows: Sequence[ExplainRow]) -> list[str]:
    """Why calls are not on the quickest kernel of their engine, a line for each reason."""
    slower = Counter((row.kernel, row.kernel_reason) for row in rows if row.kernel_reason is not None)
    return [f"{n} {'call' if n == 1 else 'calls'} on {kernel}: {reason}" for (kernel, reason), n in slower.items()]


def _row(graph: int, site: SiteRecipe) -> ExplainRow:
    return ExplainRow(
        graph=graph,
        site=site.name,
        outcome=site.outcome,
        reason=site.reason,
        heads=len(site.heads),
        dense_heads=sum(head.outcome == "dense" for head in site.heads),
        sparsity=site.sparsity,
        error=site.error,
        dense_ms=site.dense_ms,
        sparse_ms=site.sparse_ms,
        kernel=site.kernel,
        kernel_reason=site.kernel_reason,
    )


def _cells(row: ExplainRow) -> list[str]:
    heads = "" if not row.heads else str(row.heads) + (f", {row.dense_heads} dense" if row.dense_heads else "")
    times = ["" if ms is None else f"{ms:.3g}" for ms in (row.dense_ms, row.sparse_ms)]
    kernel = row.kernel or ""
    if row.kernel and row.outcome != "sparse":  # the one that the call would run on
        kernel = f"({row.kernel})"
    return [row.site, row.outcome, heads, f"{row.sparsity:.1%}", f"{row.error:.3f}", *times, kernel, row.reason or ""]


def _note(recipe: Recipe) -> str:
    samples = [graph.samples for graph in recipe.graphs]
    shortest, longest = min(s.lengths[0] for s in samples), max(s.lengths[1] for s in samples)
    tokens = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    inputs = max(sample.validation_inputs for sample in samples)
    validated = f"validated on {inputs} inputs{_validated(recipe)}: {_promised(recipe)}"
    blocks = " and ".join(sorted({f"{site.block_q}x{site.block_k}" for site in recipe.sites if site.heads}))
    return (
        f"mean sparsity {recipe.sparsity:.1%}; {recipe.goal}; method {recipe.method}; "
        f"blocks {blocks}; engine {recipe.engine}; calibrated on {samples[0].source} "
        f"({tokens} tokens) in {sum(graph.seconds for graph in recipe.graphs):.1f} s, "
        f"{validated if recipe.budget is None else _spent(recipe.budget)}"
    )


def _spent(budget: BudgetRecord) -> str:
    """How much of the budget is used, and whether samples that had no say confirm it."""
    measured = f"{budget.measured:.3g} used on the {budget.chosen_on} samples that chose"
    if budget.checked is None:
        return f"{measured}, not checked on others"
    return f"{measured}, {budget.checked:.3g} on {budget.checked_on} others: further inputs may cost more"


def _validated(recipe: Recipe) -> str:
    """Lengths at which every site's thresholds were validated."""
    ranges = [site.validated_lengths for site in recipe.sites if site.validated_lengths is not None]
    if not ranges:
        return ""
    shortest, longest = max(low for low, _ in ranges), min(high for _, high in ranges)
    return f" at {shortest} to {longest} tokens" if shortest < longest else f" at {longest} tokens"


def _promised(recipe: Recipe) -> str:
    """The weakest promise of the graphs: what the validation says about inputs that were not seen."""
    promises = [graph.promise for graph in recipe.graphs if graph.promise is not None]
    weakest = min(promises, key=lambda promise: promise.inputs, default=None)
    if weakest is None or weakest.inputs == 0:
        one = max(graph.samples.count for graph in recipe.graphs) == 1
        who = "one sample promises" if one else "all of them chose the thresholds, which promises"
        return f"{who} nothing about other inputs"
    any_head = max(promise.model_bound for promise in promises)
    terms = f"confidence {weakest.confidence:.0%}, n = {weakest.inputs}".replace("%", " %")
    some = "" if any_head >= 1 else f"; some head does on at most {math.ceil(100 * any_head)} % of them"
    return (
        f"a head exceeds the tolerance on at most {math.ceil(100 * weakest.head_bound)} % of such inputs, {terms}{some}"
    )
