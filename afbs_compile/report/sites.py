"""The attention calls of a graph before and after the rewrite, as lines for a reader."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from afbs_compile.kernels.reference import KEEP_ALL, LAMBDA_OFF
from afbs_compile.passes.effects import submodule_of, value_of
from afbs_compile.passes.names import SiteNames
from afbs_compile.passes.operands import Call, is_sdpa
from afbs_compile.passes.rewrite import SiteConstants, rewrite
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
    calls = {name: node for name, node in _calls(graph.found.gm, SiteNames()) if name in rows}
    shapes = {name: _call(node, rows[name]) for name, node in calls.items()}
    marks = {node.name: _mark(rows[name]) for name, node in calls.items()}
    constants = {site.name: values for site, values in graph.plan.constants.items()}
    sparse = iter([_mark(rows[name]) for name in calls if name in constants])
    done = rewrite(graph.found.gm, graph.plan.constants)
    sites = tuple(_diff(rows[name], shapes[name], constants.get(name)) for name in calls)
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
        if is_sdpa(node) or hidden_refusal(node):
            yield names.name(node), node
        elif body := submodule_of(node):
            yield from _calls(body, names)


def _diff(row: SiteRecipe, call: tuple[str, str], constants: SiteConstants | None) -> SiteDiff:
    function, operands = call
    before = f"{function}({operands})"
    if constants is None:
        return SiteDiff(row.name, row.outcome, row.reason, before, None, ())
    after = f"afbs.sparse_attention({operands}, blocks {constants.block_q}x{constants.block_k}"
    last_rows, local_keys = constants.kept
    after += f", {local_keys} keys before a block kept" if local_keys else ""
    after += f", last {last_rows} rows whole" if last_rows else ""
    after += f", from {constants.min_length:,} tokens)" if constants.min_length else ")"
    return SiteDiff(row.name, row.outcome, row.reason, before, after, tuple(_constants(row, constants)))


def _constants(row: SiteRecipe, constants: SiteConstants) -> list[str]:
    """Thresholds of the sparse heads; a dense head's own say nothing."""
    sparse = [index for index, tau in enumerate(constants.tau) if tau < KEEP_ALL]
    dense = len(constants.tau) - len(sparse)
    if not sparse:
        return [f"{dense} dense"]
    tau = folded("tau", [constants.tau[i] for i in sparse])
    theta = [max(constants.theta[i], -1.0) if constants.theta[i] >= 0 else -1.0 for i in sparse]
    lam = [max(constants.lam[i], LAMBDA_OFF) for i in sparse]
    policies = Counter(row.heads[i].policy for i in sparse)
    in_fp8 = constants.precision.count("fp8")
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
    if not is_sdpa(node):
        return str(getattr(node.target, "__name__", node.target)), "..."
    call = Call.of(node)
    parts = [f"{name} {_shape(value_of(operand))}" for name, operand in (("q", call.q), ("k", call.k), ("v", call.v))]
    parts.append(str(value_of(call.q).dtype).removeprefix("torch."))
    if call.mask is not None:
        parts.append(f"mask {_shape(value_of(call.mask))}")
    causal = call.is_causal if row.causal is None else row.causal
    if isinstance(causal, bool):
        parts.append("causal" if causal else "not causal")
    return "scaled_dot_product_attention", ", ".join(parts)


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
