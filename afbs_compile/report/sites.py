"""The attention calls of a graph before and after the rewrite, as lines for a reader."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from afbs_compile.kernels.call import LAMBDA_OFF, SparseCall
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.passes.effects import submodule_of, value_of
from afbs_compile.passes.names import SiteNames
from afbs_compile.passes.operands import Call, is_attention
from afbs_compile.passes.rewrite import rewrite
from afbs_compile.passes.rules import hidden_refusal
from afbs_compile.recipe import SiteRecipe
from afbs_compile.report.applied import AppliedGraph

MARK = "# <<<"
"""Begins the mark behind a line of a graph that calls attention."""


@dataclass(frozen=True)
class SiteDiff:
    """One attention call.

    Attributes:
        site: where it stands in the model; outcome, reason: as in :class:`SiteRecipe`.
        before: the call as it was; after: as it is, or ``None`` where it was left.
        constants: thresholds of a rewritten call, folded, a line each.
    """

    site: str
    outcome: str
    reason: str | None
    before: str
    after: str | None
    constants: tuple[str, ...]


@dataclass(frozen=True)
class GraphText:
    """One graph, before and after the rewrite.

    Attributes:
        before, after: as readable Python, attention calls marked.
        sites: its attention calls in graph order.
    """

    before: str
    after: str
    sites: tuple[SiteDiff, ...]


def graph_text(graph: AppliedGraph) -> GraphText:
    """Rewrite a graph as its plan says, in place, and describe both states."""
    rows = {row.name: row for row in graph.plan.rows}
    calls = {name: node for name, node in _calls(graph.found.gm, SiteNames(graph.found.prefixes)) if name in rows}
    shapes = {name: _call(node, rows[name]) for name, node in calls.items()}
    marks = {node.name: _mark(rows[name]) for name, node in calls.items()}
    made = {site.name: call for site, call in graph.plan.calls.items()}
    sparse = iter([_mark(rows[name]) for name in calls if name in made])
    done = rewrite(graph.found.gm, graph.plan.calls)
    sites = tuple(_diff(rows[name], shapes[name], made.get(name)) for name in calls)
    return GraphText(_marked(done.before, marks, sparse), _marked(done.after, marks, sparse), sites)


def diff_lines(site: SiteDiff) -> list[str]:
    """One call as lines: its name and outcome, then what went (-), what came (+), or what stays (=)."""
    lines = [f"{site.site}: {site.outcome}" + (f" ({site.reason})" if site.reason else "")]
    if site.after is None:
        return [*lines, f"  = {site.before}"]
    return [*lines, f"  - {site.before}", f"  + {site.after}", *(f"      {line}" for line in site.constants)]


def folded(name: str, values: Sequence[float], off: float | None = None) -> str:
    """Per-head numbers as a reader takes them in: ``0.91-0.98 (8 heads)``."""
    counts = Counter(values)
    if off is not None and all(value == off for value in values):
        return f"{name} off"
    used = [value for value in values if value != off]
    low, high = min(used), max(used)
    spread = f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}" if low >= 0 else f"{low:.4g} to {high:.4g}"
    without = f", off in {counts[off]}" if off is not None and counts[off] else ""
    return f"{name} {spread} ({len(used)} {'head' if len(used) == 1 else 'heads'}){without}"


def _calls(gm: fx.GraphModule, names: SiteNames) -> Iterator[tuple[str, fx.Node]]:
    """Every attention call with its name, in the order in which ``find`` names them."""
    for node in gm.graph.nodes:
        if is_attention(node) or hidden_refusal(node):
            yield names.name(node), node
        elif body := submodule_of(node):
            yield from _calls(body, names)


def _diff(row: SiteRecipe, text: tuple[str, str], call: SparseCall | None) -> SiteDiff:
    function, operands = text
    before = f"{function}({operands})"
    if call is None:
        return SiteDiff(row.name, row.outcome, row.reason, before, None, ())
    after = f"afbs.sparse_attention({operands}, blocks {call.shape}"
    last_rows, local_keys = call.kept
    after += f", {local_keys} keys before a block kept" if local_keys else ""
    after += f", last {last_rows} rows whole" if last_rows else ""
    after += f", from {call.min_length:,} tokens)" if call.min_length else ")"
    return SiteDiff(row.name, row.outcome, row.reason, before, after, tuple(_constants(call)))


def _constants(call: SparseCall) -> list[str]:
    """Thresholds of the sparse heads; a dense head's own say nothing."""
    sparse = [index for index, dense in enumerate(call.dense_heads) if not dense]
    dense = call.heads - len(sparse)
    if not sparse:
        return [f"{dense} dense"]
    tau = folded("tau", [call.tau[i] for i in sparse])
    theta = [call.theta[i] if call.theta[i] >= 0 else -1.0 for i in sparse]
    lam = [max(call.lam[i], LAMBDA_OFF) for i in sparse]
    policies = Counter(call.policy[i] for i in sparse)
    in_fp8 = call.precision.count("fp8")
    precision = f", {in_fp8} in FP8" if in_fp8 else ""
    return [
        tau + (f", {dense} dense" if dense else ""),
        f"{folded('theta', theta, -1.0)}, {folded('lambda', lam, LAMBDA_OFF)}",
        "policy "
        + ", ".join(name if len(policies) == 1 else f"{n} {name}" for name, n in policies.most_common())
        + precision,
    ]


def _call(node: fx.Node, row: SiteRecipe) -> tuple[str, str]:
    """Name and operands of a call as it stands in the graph."""
    if not is_attention(node):
        return str(getattr(node.target, "__name__", node.target)), "..."
    call = Call.of(node)
    parts = [f"{name} {_shape(value_of(operand))}" for name, operand in (("q", call.q), ("k", call.k), ("v", call.v))]
    parts.append(str(value_of(call.q).dtype).removeprefix("torch."))
    if call.mask is not None:
        parts.append(f"mask {_shape(value_of(call.mask))}")
    mask = None if row.mask is None else mask_of(row.mask)
    if mask is None and isinstance(call.is_causal, bool):
        mask = Causal() if call.is_causal else Full()
    parts += [] if mask is None else [mask.words]
    parts += [f"softcap {call.softcap:g}"] if call.softcap else []
    parts += [] if call.sinks is None else [f"sinks {_shape(value_of(call.sinks))}"]
    return call.spelling, ", ".join(parts)


def _shape(value: Any) -> str:
    return (
        str([int(size) if isinstance(size, int) else str(size) for size in value.shape])
        if isinstance(value, Tensor)
        else "?"
    )


def _mark(row: SiteRecipe) -> str:
    return f"{MARK} {row.name}: {row.outcome}" + (f" ({row.reason})" if row.reason else "")


def _marked(text: str, marks: dict[str, str], sparse: Iterator[str]) -> str:
    """The text with a mark behind each line that calls attention; ``sparse`` has those of rewritten calls in order."""
    lines = []
    for line in text.splitlines():
        assigned = re.match(r"\s*(\w+)(: \"[^\"]*\")? = (.*)", line)
        if assigned is not None and "torch.ops.afbs.sparse_attention" in assigned[3]:
            lines.append(f"{line}  {next(sparse)}")
        elif assigned is not None and assigned[1] in marks:
            lines.append(f"{line}  {marks[assigned[1]]}")
        else:
            lines.append(line)
    return "\n".join(lines)
