"""Thresholds of a model that is not quite the calibrated one, checked on inputs at hand in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afbs_compile.errors import AfbsWarning
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.plan import Plan
from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.measure import Meter, attend_sparsely
from afbs_compile.tuner.space import all_dense, dense_heads
from afbs_compile.tuner.speed import SiteSpeed, Stopwatch
from afbs_compile.tuner.validate import validate

SLACK = 1.5
"""Times the tolerance that a head's error may be: inputs of another kind move errors too, and are no other model."""

NOT_HELD = "not re-validated: its error exceeds the tolerance on this model in every head"


@dataclass(frozen=True)
class Checked:
    """A call of the plan after it was measured.

    Attributes:
        row: with what was measured; call: its constants, heads that failed DENSE; held, heads: how many of how many.
    """

    row: SiteRecipe
    call: SparseCall
    held: int
    heads: int


def revalidated(plan: Plan, runs: Sequence[SampleRun], recipe: Recipe, name: str) -> Plan:
    """The plan with every head DENSE whose error does not hold here; the plan itself where nothing differs.

    Args:
        plan: of the graph that the runs are of; runs: at least one.
        recipe: what it was made from; name: how the user knows it.

    Warns:
        AfbsWarning: in what the model differs, and how many heads hold.
    """
    if not plan.differences or not plan.calls:
        return plan
    by_name = {row.name: row for row in plan.rows}
    calls = {site.name: call for site, call in plan.calls.items()}
    done: dict[str, Checked] = {}

    def chosen(name: str, operands: Operands) -> Tensor | None:
        return attend_sparsely(operands, done[name].call) if name in done else None

    with closing(capture(runs, chosen)) as walk:
        for site, operands in walk:
            if site in calls:
                done[site] = checked(by_name[site], calls[site], operands, recipe.tolerance)
    told(name, plan.differences, list(done.values()))
    rows = tuple(done[row.name].row if row.name in done else row for row in plan.rows)
    kept = {site: done[site.name].call for site in plan.calls if not done[site.name].call.is_dense}
    return replace(plan, calls=kept, rows=rows)


def checked(row: SiteRecipe, call: SparseCall, operands: Sequence[Operands], tolerance: float | None) -> Checked:
    """Measure a call's heads and make those DENSE that do not hold."""
    error = Meter(operands)(call).error.amax(0).tolist()
    holds = [
        dense or e <= SLACK * max(tolerance or 0.0, head.error)
        for dense, e, head in zip(call.dense_heads, error, row.heads, strict=True)
    ]
    sparse = [not dense for dense in call.dense_heads]
    kept = call.where(holds, all_dense(call))
    heads = tuple(
        replace(head, error=round(e, 6), validation_errors=(round(e, 6),))
        if hold and is_sparse
        else replace(head, outcome="dense", sparsity=0.0, error=0.0)
        for head, e, hold, is_sparse in zip(row.heads, error, holds, sparse, strict=True)
    )
    row = replace(row, heads=heads, call=row.calibrated.where(holds, all_dense(row.calibrated)))
    if kept.is_dense:
        row = replace(row, outcome="dense", reason=NOT_HELD)
    return Checked(row, kept, sum(h and s for h, s in zip(holds, sparse, strict=True)), sum(sparse))


def raised(
    row: SiteRecipe, call: SparseCall, operands: Sequence[Operands], tolerance: float, stopwatch: Stopwatch
) -> Checked:
    """Measure a call's heads and raise the thresholds of those that exceed the tolerance, until they hold here too.

    A threshold is never lowered: more is kept than where it was found, and what held there holds still. Heads that no
    threshold helps are DENSE, and so are all where the call is no longer faster.

    Args:
        row: as recorded; call: its constants at the length of the operands.
        tolerance: relative L1 on every input; stopwatch: what timing earlier calls has shown.
    """
    error = Meter(operands)(call).error.amax(0)
    sparse = ~dense_heads(call)
    failing = sparse & ~(error <= tolerance)
    if not failing.any():
        return Checked(row, call, int(sparse.sum()), int(sparse.sum()))
    found = validate(SiteInputs(operands), call.where(failing.tolist(), all_dense(call)), tolerance)
    recorded = row.calibrated
    tau = torch.where(failing, found.tau.maximum(torch.tensor(recorded.tau)), torch.tensor(recorded.tau))
    new = recorded.with_tau(tau)
    new = new.where([not dense for dense in new.dense_heads], all_dense(new))
    measured = Meter(operands)(new)
    heads = tuple(
        head
        if not fails
        else replace(head, outcome="dense", sparsity=0.0, error=0.0)
        if dense
        else replace(head, sparsity=round(s, 6), error=round(e, 6), validation_errors=(round(e, 6),))
        for head, fails, dense, s, e in zip(
            row.heads,
            failing.tolist(),
            new.dense_heads,
            measured.sparsity.tolist(),
            measured.error.amax(0).tolist(),
            strict=True,
        )
    )
    reason = NOT_HELD
    if not new.is_dense:
        speed = SiteSpeed.measure(operands[0], new, float(measured.sparsity.mean()), stopwatch)
        reason = f"not faster after checks: {speed.sparse_ms:.3g} ms sparse, {speed.dense_ms:.3g} ms dense"
        new = replace(new, min_length=speed.min_length or 0)
        row = replace(row, sparse_ms=speed.sparse_ms, dense_ms=speed.dense_ms)
        if speed.min_length is not None:
            row = replace(row, heads=heads, call=new)
            return Checked(row, new, int((sparse & ~failing).sum()), int(sparse.sum()))
    row = replace(row, heads=heads, call=new, outcome="dense", reason=reason)
    return Checked(row, new, int((sparse & ~failing).sum()), int(sparse.sum()))


def told(name: str, differences: Sequence[str], done: Sequence[Checked]) -> None:
    """Say what differs and what holds."""
    held, heads = sum(site.held for site in done), sum(site.heads for site in done)
    rest = "" if held == heads else "; the others are dense: calibrate again to have them sparse"
    warnings.warn(
        f"{name} was made for a model that differs: {'; '.join(differences)}. "
        f"Checked on these inputs, {held} of {heads} sparse heads hold{rest}.",
        AfbsWarning,
        stacklevel=2,
    )
