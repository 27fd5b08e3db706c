"""What a recipe decided, as a table for the terminal and as plain data; ``report/html.py`` shows the same as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from afbs_compile.recipe import BudgetRecord, Promise, Recipe, SiteRecipe

OUTCOME_STYLE = {"sparse": "green", "dense": "yellow", "refused": "red"}
SHORT_DIGEST = 12


def print_inspection(recipe: Recipe, console: Console) -> None:
    """Print every section that has something to say."""
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console = Console(file=console.file, width=max(console.width, 160))
    for title, section in SECTIONS:
        content = section(recipe)
        if content is not None:
            console.print(Text(title, style="bold"))
            console.print(content)
            console.print()


def summary(recipe: Recipe) -> dict[str, Any]:
    """The recipe in a few numbers."""
    heads = [head for site in recipe.sites for head in site.heads]
    running = [head for site in recipe.sites if site.outcome == "sparse" for head in site.heads]
    timed = [site for site in recipe.sites if site.dense_ms and site.sparse_ms]
    taken = [site.sparse_ms if site.outcome == "sparse" else site.dense_ms for site in timed]
    return {
        "sites": len(recipe.sites),
        "outcomes": dict(Counter(site.outcome for site in recipe.sites)),
        "heads": len(heads),
        "dense_heads": sum(head.outcome == "dense" for head in heads),
        "policies": dict(sum((sparse_policies(site) for site in recipe.sites), Counter())),
        "mean_sparsity": recipe.sparsity,
        "worst_error": max((head.error for head in running), default=0.0),
        "attention_dense_ms": sum(site.dense_ms or 0.0 for site in timed) if timed else None,
        "attention_ms": sum(ms or 0.0 for ms in taken) if timed else None,
        "tolerance": recipe.tolerance,
        "budget": None if recipe.budget is None else asdict(recipe.budget),
        "promise": promise(recipe),
        "provenance": provenance(recipe),
    }


def promise(recipe: Recipe) -> list[str]:
    """What the thresholds were shown to hold, and what not, a sentence each."""
    inputs = min((g.samples.validation_inputs for g in recipe.graphs if any(s.heads for s in g.sites)), default=0)
    if not inputs:
        return ["Nothing was calibrated, so nothing is promised."]
    shortest, longest = _lengths(recipe)
    tokens = f"{longest:,} tokens" if shortest == longest else f"{shortest:,} to {longest:,} tokens"
    if recipe.budget is not None:
        return [
            *_budget(recipe.budget, tokens),
            "Inputs of another kind may cost more, and no other length was measured.",
        ]
    return [
        f"Every sparse head stayed within a relative L1 error of {recipe.tolerance:g} on each of {inputs} validation "
        f"{'input' if inputs == 1 else 'inputs'} of {tokens}.",
        *_bounds(recipe),
        "No error per head bounds the model's output, and at lengths that were not validated nothing is promised.",
    ]


def _budget(budget: BudgetRecord, tokens: str) -> Iterator[str]:
    """How the budget on the output was spent, and whether other samples confirmed it."""
    of_tokens = f"of {tokens}" if budget.unit == "samples" else f"of one sample of {tokens}"
    yield (
        f"One threshold for all heads: {budget.amount(budget.measured)}, {budget.amount(budget.limit, 'at most ')}, on "
        f"the {budget.chosen_on} {budget.unit} {of_tokens} that chose it."
    )
    if budget.checked is None:
        yield "No other sample checked it."
        return
    yield f"On {budget.checked_on} {budget.unit} that had no say: {budget.amount(budget.checked)}."
    if budget.checked_upper is not None:
        upper = budget.amount(budget.checked_upper, "at most ")
        rest = "" if budget.is_confirmed else ", which is more than the budget: more samples would tell"
        yield f"On such inputs it is {upper} on average (confidence 95 %){rest}."


def error_limit(recipe: Recipe) -> tuple[float, str]:
    """What the heads' errors are drawn against, and its name: the tolerance or, of a budget, the worst head's error."""
    if recipe.tolerance is not None:
        return recipe.tolerance, "tolerance"
    return max((head.error for site in recipe.sites for head in site.heads), default=0.0) or 1.0, "worst head's error"


def weakest_promise(recipe: Recipe) -> Promise | None:
    """The promise of the graph that was validated on the fewest inputs; ``None`` where no graph has one."""
    promises = [graph.promise for graph in recipe.graphs if graph.promise is not None]
    return min(promises, key=lambda promise: promise.inputs, default=None)


def _bounds(recipe: Recipe) -> Iterator[str]:
    """What the validation says about inputs that were not seen, and at which lengths."""
    weakest = weakest_promise(recipe)
    if weakest is None or weakest.inputs == 0:
        yield "Nothing is promised about other inputs: every input had a say in the choice of the thresholds."
    else:
        any_head = max(graph.promise.model_bound for graph in recipe.graphs if graph.promise is not None)
        some = f"; some head does on at most {any_head:.1%}" if any_head < 1 else ""
        yield (
            f"A head exceeds it on at most {weakest.head_bound:.1%} of new inputs of the same kind{some} "
            f"(confidence {weakest.confidence:.0%}, n = {weakest.inputs})."
        )
    ranges = [site.validated_lengths for site in recipe.sites if site.validated_lengths is not None]
    if ranges:
        low, high = max(shortest for shortest, _ in ranges), min(longest for _, longest in ranges)
        yield f"Validated at {low:,} tokens." if low >= high else f"Validated from {low:,} to {high:,} tokens."


def provenance(recipe: Recipe) -> dict[str, str]:
    """Where the recipe came from, by label."""
    shortest, longest = _lengths(recipe)
    samples = [graph.samples for graph in recipe.graphs]
    seconds = sum(graph.seconds for graph in recipe.graphs)
    evaluations = sum(graph.evaluations for graph in recipe.graphs)
    reading = recipe.options.get("parameterization") if recipe.method == "paper" else None
    return {
        "method": recipe.method + (f", Eq. 2 {reading}" if reading else ""),
        "device": f"{recipe.device}, engine {recipe.engine}",
        "samples": f"{', '.join(dict.fromkeys(s.source for s in samples))}: {max(s.count for s in samples)} of "
        f"{longest if shortest == longest else f'{shortest} to {longest}'} tokens",
        "samples digest": ", ".join(dict.fromkeys(s.digest[:SHORT_DIGEST] for s in samples)),
        "weights digest": ", ".join(dict.fromkeys(g.weights[:SHORT_DIGEST] for g in recipe.graphs if g.weights)),
        "graph digest": ", ".join(dict.fromkeys(g.graph[:SHORT_DIGEST] for g in recipe.graphs)),
        "calibration": f"{seconds:.1f} s, {evaluations:.1f} dense equivalents",
        "predictor": f"version {recipe.predictor_version}",
        "versions": ", ".join(f"{name} {number}" for name, number in recipe.versions.items()),
        "schema": f"{recipe.format} {recipe.schema_version}",
    }


def sparse_policies(site: SiteRecipe) -> Counter[str]:
    """How many sparse heads of a call have each policy."""
    names = () if site.call is None else site.call.policy
    return Counter(name for name, head in zip(names, site.heads, strict=True) if head.outcome == "sparse")


def policies(site: SiteRecipe) -> str:
    """Policies of a site's sparse heads, with counts where there are several."""
    counts = sparse_policies(site)
    return ", ".join(counts) if len(counts) < 2 else ", ".join(f"{n} {name}" for name, n in counts.most_common())


def reasons(recipe: Recipe) -> dict[tuple[str, str], list[str]]:
    """(outcome, reason) of every call that is not sparse, with the names of the calls."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for site in recipe.sites:
        if site.outcome != "sparse":
            grouped.setdefault((site.outcome, site.reason or "no reason recorded"), []).append(site.name)
    return grouped


def kernels(recipe: Recipe) -> dict[tuple[str, str | None], int]:
    """How many calls each kernel computed when they were timed, with the reason why not a quicker one."""
    return Counter((site.kernel, site.kernel_reason) for site in recipe.sites if site.kernel is not None)


def speed(site: SiteRecipe) -> float | None:
    """Dense time over sparse time of the call alone, at the calibrated length."""
    return site.dense_ms / site.sparse_ms if site.dense_ms and site.sparse_ms else None


def _lengths(recipe: Recipe) -> tuple[int, int]:
    """Shortest and longest calibrated length; of a graph that was not calibrated the length is 0."""
    lengths = [graph.samples.lengths for graph in recipe.graphs if graph.samples.lengths[1]]
    return min((s for s, _ in lengths), default=0), max((n for _, n in lengths), default=0)


def _sites(recipe: Recipe) -> RenderableType:
    several = len(recipe.graphs) > 1
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # fits a terminal of 80 columns
    if several:
        table.add_column("graph")
    table.add_column("site", overflow="fold", min_width=20)
    for header in ("outcome", "policy", "blocks"):
        table.add_column(header, no_wrap=header != "policy")
    for header in ("heads", "sparsity", "error", "speed"):
        table.add_column(header, justify="right", no_wrap=header != "heads")
    for index, graph in enumerate(recipe.graphs):
        for site in graph.sites:
            table.add_row(*([str(index)] if several else []), *_cells(site))
    return table


def _cells(site: SiteRecipe) -> list[RenderableType]:
    outcome = Text(site.outcome, style=OUTCOME_STYLE[site.outcome])
    name = Text(site.name)  # a name may hold what rich takes for markup
    if not site.heads:
        return [name, outcome, *[""] * 6]
    dense = sum(head.outcome == "dense" for head in site.heads)
    # What was found is shown, in brackets where the call stays dense all the same.
    sparsity = f"{sum(head.sparsity for head in site.heads) / len(site.heads):.1%}"
    error = f"{max(head.error for head in site.heads):.3f}"
    if site.outcome != "sparse":
        sparsity, error = f"({sparsity})", f"({error})"
    ratio = speed(site)
    return [
        name,
        outcome,
        policies(site),
        str(site.calibrated.shape),
        f"{len(site.heads)}" + (f", {dense} dense" if dense else ""),
        sparsity,
        error,
        "" if ratio is None else f"{ratio:.2f}x",
    ]


def _reasons(recipe: Recipe) -> RenderableType | None:
    if not (grouped := reasons(recipe)):
        return None
    lines = []
    for (outcome, reason), names in grouped.items():
        lines.append(Text.assemble((outcome, OUTCOME_STYLE[outcome]), f": {reason}"))
        lines.append(Text("  " + ", ".join(names), style="dim"))
    return Text("\n").join(lines)


def _kept(recipe: Recipe) -> RenderableType | None:
    sites = [site for site in recipe.sites if site.kept_tried]
    if not sites:
        return None
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("site", overflow="fold", min_width=20)
    for header in ("keys before", "last rows", *(f"with {trial.local_keys} keys" for trial in sites[0].kept_tried)):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("worst row", justify="right", no_wrap=True)
    for site in sites:
        kept = site.calibrated.kept
        tried = [f"{trial.error:.3f} at {trial.live:.0%}" for trial in site.kept_tried]
        worst = next(trial.worst_row for trial in site.kept_tried if trial.local_keys == kept.local_keys)
        table.add_row(Text(site.name), str(kept.local_keys), str(kept.last_rows), *tried, f"{worst:.2f}")
    return table


def _summary(recipe: Recipe) -> RenderableType:
    numbers = summary(recipe)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in numbers["outcomes"].items())
    lines = [
        f"{numbers['sites']} attention calls: {outcomes}",
        f"{numbers['heads']} heads, {numbers['dense_heads']} of them dense",
        f"mean sparsity {numbers['mean_sparsity']:.1%}, worst error {numbers['worst_error']:.3f}",
        recipe.goal,
    ]
    if numbers["attention_ms"]:
        dense, taken = numbers["attention_dense_ms"], numbers["attention_ms"]
        lines.append(
            f"attention at the calibrated length {taken:.3g} ms, dense {dense:.3g} ms ({dense / taken:.2f}x), "
            "predictor included"
        )
    return Text("\n".join(lines))


def _kernels(recipe: Recipe) -> RenderableType | None:
    lines = [
        f"{name}: {count} {'call' if count == 1 else 'calls'}" + (f" ({reason})" if reason else "")
        for (name, reason), count in kernels(recipe).items()
    ]
    return Text("\n".join(lines)) if lines else None


def _promise(recipe: Recipe) -> RenderableType:
    return Text("\n".join(promise(recipe)))


def _provenance(recipe: Recipe) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    for label, value in provenance(recipe).items():
        grid.add_row(Text(label, style="dim"), Text(value))
    return grid


SECTIONS: tuple[tuple[str, Callable[[Recipe], RenderableType | None]], ...] = (
    ("Attention calls", _sites),
    ("What is not sparse, and why", _reasons),
    ("Kernels", _kernels),
    ("Always kept, and what it buys (error of a row, root mean square, at the blocks that are live)", _kept),
    ("Summary", _summary),
    ("Promise", _promise),
    ("Provenance", _provenance),
)
"""Titles and what prints below them; ``None`` leaves a section out."""
