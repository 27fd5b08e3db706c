"""The public :func:`explain`: what was found, what was decided, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from io import StringIO
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from afbs_compile.integrations.served import ServedModel, served_model
from afbs_compile.kernels.attend.engines import kernel_of
from afbs_compile.kernels.call import Kept
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.passes.place import owner_of
from afbs_compile.reasons import NONE_FOUND
from afbs_compile.recipe import BudgetRecord, Recipe, SiteRecipe, merged
from afbs_compile.regions import rows_of
from afbs_compile.report import registry
from afbs_compile.report.compiled import graphs_compiled_of, original_of
from afbs_compile.report.monitors import monitors

WIDTH = 150
NUMBERS = ("heads", "sparsity", "error", "dense ms", "sparse ms")
HEADERS = ("graph", "site", "outcome", *NUMBERS, "kernel", "reason")


@dataclass(frozen=True)
class ExplainRow:
    """One attention call.

    Attributes:
        graph: number of the captured graph it is in.
        site: where it stands in the model.
        outcome: ``"sparse"``, ``"dense"`` or ``"refused"``; reason: why not sparse, ``None`` if it is.
        heads: query heads, 0 if refused; dense_heads: those that keep every block.
        fp8_heads: those that compute in FP8; precision_reason: why other sparse ones do not, where it was asked for.
        sparsity: 1 - live / visible blocks of what runs, mean over the heads.
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
    fp8_heads: int = 0
    precision_reason: str | None = None


@dataclass(frozen=True)
class Explanation:
    """A table to print, and the same as data.

    Attributes:
        rows: one per attention call.
        notes: what the thresholds were calibrated on, one line per recipe, and why calls are not on a quicker kernel.
        before, after: text of each compiled graph before and after the rewrite; empty for a recipe.
        recipe: what all of it was rewritten with, as one recipe, e.g. to ``save``; ``None`` where nothing was.
        watched: what the monitors know, as :meth:`afbs_compile.monitor.monitor.Monitor.to_dict` has it.
    """

    rows: tuple[ExplainRow, ...]
    notes: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    recipe: Recipe | None = None
    watched: tuple[dict[str, Any], ...] = ()

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries."""
        return [dict(vars(row)) for row in self.rows]

    def __rich__(self) -> Table:
        headers, lines = self._shown()
        table = Table(caption=Text("\n".join(self.notes), "table.caption"), caption_justify="left")
        for header in headers:
            number = header in NUMBERS
            wraps = header in ("kernel", "reason")
            justify: Literal["right", "left"] = "right" if number else "left"
            table.add_column(header, justify=justify, no_wrap=not (number or wraps), overflow="fold")
        for index, (row, line) in enumerate(zip(self.rows, lines, strict=True)):
            last = index + 1 == len(self.rows) or self.rows[index + 1].graph != row.graph
            table.add_row(*map(Text, line), end_section=last)  # a name may hold what rich takes for markup
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=WIDTH).print(self)
        return text.getvalue().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        headers, lines = self._shown()
        head = "".join(f"<th>{name}</th>" for name in headers)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def _shown(self) -> tuple[list[str], list[list[str]]]:
        """Headers and a line of cells for each row, without the columns in which all rows would say the same."""
        lines = [_cells(row) for row in self.rows]
        alike = {
            header
            for header, values in (("graph", {row.graph for row in self.rows}), ("kernel", _kernels(self.rows)))
            if len(values) <= 1
        }
        headers = [header for header in HEADERS if header not in alike]
        return headers, [[line[header] for header in headers] for line in lines]


NO_LONG_CALL = "no long call has come yet: call the model once; decode steps and short prompts stay dense"


def explain(compiled_or_recipe: Recipe | Callable[..., Any]) -> Explanation:
    """Tell what happened to every attention call.

    Args:
        compiled_or_recipe: what ``torch.compile(model, backend="afbs")`` returned, or a module compiled in
            place, or a model whose library calls us (``attn_implementation="afbs"``), after a first call; or a recipe.

    Raises:
        TypeError: the argument is neither.
    """
    if isinstance(compiled_or_recipe, Recipe):
        recipe = compiled_or_recipe
        rows = [_row(index, site) for index, graph in enumerate(recipe.graphs) for site in graph.sites]
        notes = (_note(recipe), *_kernel_notes(rows), *_unsure_note(recipe.sites), *_history_notes(recipe))
        return Explanation(tuple(rows), notes, recipe=recipe)
    served = served_model(compiled_or_recipe)
    if served is not None:
        rows = [_row(0, site) for site in served.rows]
        noted = () if served.recipe is None else (_note(served.recipe),)
        watching = monitors(compiled_or_recipe)
        notes = (*noted, *_kernel_notes(rows), *_unsure_note(served.rows), *(monitor.note for monitor in watching))
        watched = tuple(monitor.to_dict() for monitor in watching)
        return Explanation(tuple(rows), notes if rows else (NO_LONG_CALL,), recipe=served.recipe, watched=watched)
    graphs = graphs_compiled_of(compiled_or_recipe)
    own = [graph for graph in graphs if not graph.shared]
    rows = [_row(index, _served(site, graph)) for index, graph in enumerate(own) for site in graph.rows]
    blocks = rows_of(owner_of(original_of(compiled_or_recipe)))
    rows += [_row(len(own), site) for _, decided in blocks for site in decided]
    recipes = [graph.recipe for graph in own] + [served.recipe for served, _ in blocks]
    whole = merged([recipe for recipe in recipes if recipe is not None])
    noted = () if whole is None else (_note(whole),)
    recorded = [row for graph in own for row in graph.rows] + [row for _, decided in blocks for row in decided]
    watching = monitors(compiled_or_recipe)
    notes = (
        *noted,
        *_shared_note(blocks, sum(graph.shared for graph in graphs)),
        *_kernel_notes(rows),
        *_unsure_note(recorded),
        *(monitor.note for monitor in watching),
    )
    said = "nothing is compiled yet: call the model once" if not graphs else NONE_FOUND
    return Explanation(
        tuple(rows),
        notes if rows else (said,),
        tuple(graph.before for graph in graphs),
        tuple(graph.after for graph in graphs),
        whole,
        tuple(monitor.to_dict() for monitor in watching),
    )


def _shared_note(blocks: Sequence[tuple[ServedModel, Sequence[SiteRecipe]]], graphs: int) -> list[str]:
    """What calls share that have no graph of their own."""
    calls = sum(len(rows) for _, rows in blocks)
    if not calls:
        return []
    if graphs == 1:
        return [f"{calls} calls share one compilation: their constants are looked up when they run"]
    return [f"{calls} calls run in {graphs} compilations without constants: these are looked up when they run"]


def _served(site: SiteRecipe, graph: registry.CompiledGraph) -> SiteRecipe:
    """A row with the kernel that would compute its call here and now, wherever it was calibrated."""
    served = graph.calls.get(site.name)
    name, reason = (None, None) if served is None else kernel_of(served[0].operands(), served[1])
    return replace(site, kernel=name, kernel_reason=reason)


def _kernels(rows: Sequence[ExplainRow]) -> set[str]:
    """The kernels that compute calls, or would if they were sparse."""
    return {row.kernel for row in rows if row.kernel is not None}


def _kernel_notes(rows: Sequence[ExplainRow]) -> list[str]:
    """The kernel of the sparse calls where all have the same one, and why calls are not on a quicker one."""
    slower = Counter((row.kernel, row.kernel_reason) for row in rows if row.kernel_reason is not None)
    if not slower and len(_kernels(rows)) == 1 and any(row.outcome == "sparse" for row in rows):
        return [f"sparse calls run on {', '.join(_kernels(rows))}"]
    return [f"{n} {'call' if n == 1 else 'calls'} on {kernel}: {reason}" for (kernel, reason), n in slower.items()]


def _unsure_note(rows: Sequence[SiteRecipe]) -> list[str]:
    """How many calls were timed on a machine that was too busy to tell."""
    unsure = sum(row.unsure for row in rows)
    if not unsure:
        return []
    return [
        f"{unsure} of {len(rows)} calls were timed on a busy machine, too close to tell which way is faster on a quiet "
        "one: the next process times them again, and so does afbs-compile bench --update"
    ]


def _history_notes(recipe: Recipe) -> list[str]:
    """What led to the recipe, where it is not the first one of its model."""
    return [f"calibrated again {change.when}: {change.reason}" for change in recipe.history]


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
        fp8_heads=site.calibrated.precision.count("fp8") if site.outcome == "sparse" else 0,
        precision_reason=_not_in_fp8(site),
    )


def _not_in_fp8(site: SiteRecipe) -> str | None:
    """Why heads of a rewritten call are not in FP8, where that was asked for, and how many."""
    if site.outcome != "sparse":
        return None
    reasons = Counter(head.precision_reason for head in site.heads if head.precision_reason is not None)
    if not reasons:
        return None
    return "not in FP8: " + "; ".join(f"{count} x {why}" for why, count in reasons.most_common())


def _cells(row: ExplainRow) -> dict[str, str]:
    """What the table says of a row, by header."""
    kinds = [f"{count} {kind}" for count, kind in ((row.dense_heads, "dense"), (row.fp8_heads, "fp8")) if count]
    kernel = row.kernel or ""
    if row.kernel and row.outcome != "sparse":  # the one that the call would run on
        kernel = f"({row.kernel})"
    return {
        "graph": str(row.graph),
        "site": row.site,
        "outcome": row.outcome,
        "heads": "" if not row.heads else ", ".join([str(row.heads), *kinds]),
        "sparsity": f"{row.sparsity:.1%}",
        "error": f"{row.error:.3f}",
        "dense ms": "" if row.dense_ms is None else f"{row.dense_ms:.3g}",
        "sparse ms": "" if row.sparse_ms is None else f"{row.sparse_ms:.3g}",
        "kernel": kernel,
        "reason": row.reason or row.precision_reason or "",
    }


def _note(recipe: Recipe) -> str:
    samples = [graph.samples for graph in recipe.graphs]
    shortest, longest = min(s.lengths[0] for s in samples), max(s.lengths[1] for s in samples)
    tokens = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    inputs = max(sample.validation_inputs for sample in samples)
    validated = f"validated on {inputs} inputs{_validated(recipe)}: {_promised(recipe)}"
    calls = [(site.call, mask_of(site.mask)) for site in recipe.sites if site.call is not None and site.mask]
    blocks = " and ".join(sorted({str(call.shape) for call, _ in calls}))
    kept = [(call.kept, mask.words) for call, mask in calls if any(call.kept)]
    kinds = " and ".join(sorted({words for _, words in kept}))
    last_rows, local_keys = (_spread([getattr(each, name) for each, _ in kept]) for name in Kept._fields)
    blocks += f", {local_keys} keys before a query block of {kinds} calls kept" if local_keys else ""
    blocks += f", last {last_rows} rows of {kinds} calls whole" if last_rows else ""
    return (
        f"mean sparsity {recipe.sparsity:.1%}; {recipe.goal}; method {recipe.method}; "
        f"blocks {blocks}; engine {recipe.engine}; calibrated on {samples[0].source} "
        f"({tokens} tokens) in {sum(graph.seconds for graph in recipe.graphs):.1f} s, "
        f"{validated if recipe.budget is None else _spent(recipe.budget)}"
    )


def _spread(numbers: Sequence[int]) -> str:
    """``"128"`` or ``"0 to 128"``; nothing where all are 0."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    return "" if high == 0 else str(high) if low == high else f"{low} to {high}"


def _spent(budget: BudgetRecord) -> str:
    """How much of the budget is used, and whether samples that had no say confirm it."""
    measured = f"{budget.amount(budget.measured)} on the {budget.chosen_on} {budget.unit} that chose"
    if budget.checked is None:
        return f"{measured}, not checked on others"
    checked = f"{measured}, {budget.amount(budget.checked)} on {budget.checked_on} others"
    if budget.checked_upper is None:
        return f"{checked}: further inputs may cost more"
    upper = f"{budget.amount(budget.checked_upper, 'at most ')} with 95 % confidence"
    return f"{checked}, {upper}" + ("" if budget.is_confirmed else ": too few samples to confirm the budget")


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
