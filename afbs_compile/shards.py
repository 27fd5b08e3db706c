"""What a recipe says of a call's heads, taken apart and put together: processes that share a model have some each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from afbs_compile.errors import RecipeError
from afbs_compile.kernels.call import PER_HEAD, SparseCall, fp8_constant_count
from afbs_compile.peers import Part
from afbs_compile.recipe import SiteRecipe

NO_SPARSE_HEAD = "every head that this process has is dense"


class Heads(NamedTuple):
    """The heads of a call in one process."""

    query: int
    key: int
    dim: int


def fits(site: SiteRecipe, here: Heads) -> bool:
    """Whether the heads here are all of a recorded call, or one of several equal parts of them."""
    total = len(site.heads)
    parts = max(1, total // here.query)
    return (parts * here.query, max(1, (site.kv_heads or 0) // parts), site.head_dim) == (total, here.key, here.dim)


def of_part(name: str, site: SiteRecipe, here: Heads, number: int) -> SiteRecipe:
    """What a recipe says of the heads that a process has.

    Args:
        name: of the call here; site: with all heads; here: the heads of the process.
        number: of the part; where there are more parts than key heads, several have the same one.

    Raises:
        RecipeError: these are no part of the call's heads.
    """
    total = len(site.heads)
    parts = max(1, total // here.query)
    first = 0 if parts == 1 else number * here.query
    if not fits(site, here) or first + here.query > total:
        raise RecipeError(
            f"the recipe belongs to another model: {site.name} has {total} heads of {site.head_dim} over "
            f"{site.kv_heads}, {name} has {here.query} of {here.dim} over {here.key} on each rank."
        )
    if parts == 1:
        return replace(site, name=name)
    call = site.calibrated.grouped(first, first + here.query, site.kv_heads or 1)
    mine = replace(site, name=name, heads=site.heads[first : first + here.query], kv_heads=here.key, call=call)
    if mine.outcome == "sparse" and call.is_dense:
        return replace(mine, outcome="dense", reason=NO_SPARSE_HEAD)
    return mine


def joined(rows: Sequence[tuple[Part, SiteRecipe]]) -> SiteRecipe:
    """One call of what each process found of its heads; of several that have the same part, the first.

    Args:
        rows: of every process; all have the same block shape and outcome.
    """
    parts: dict[int, SiteRecipe] = {}
    for part, row in rows:
        parts.setdefault(part.number, row)
    ordered = [parts[number] for number in sorted(parts)]
    whole = ordered[0]
    if len(ordered) == 1:
        return whole
    timed = next((row for row in ordered if row.kernel is not None), whole)
    spans = [row.validated_lengths for row in ordered if row.validated_lengths is not None]
    return replace(
        timed,
        kv_heads=sum(row.kv_heads or 0 for row in ordered),
        call=_joined_call(ordered),
        heads=tuple(head for row in ordered for head in row.heads),
        validated_lengths=(max(low for low, _ in spans), min(high for _, high in spans)) if spans else None,
    )


def _joined_call(rows: Sequence[SiteRecipe]) -> SparseCall:
    calls = [row.calibrated for row in rows]
    columns: dict[str, Any] = {name: tuple(x for call in calls for x in getattr(call, name)) for name in PER_HEAD}
    constants: tuple[float, ...] = ()
    if any(call.fp8_constants for call in calls):  # heads in their own precision do not look at theirs
        unused = [(1.0,) * fp8_constant_count(row.kv_heads or 0, row.head_dim or 0) for row in rows]
        constants = tuple(x for call, ones in zip(calls, unused, strict=True) for x in call.fp8_constants or ones)
    return replace(calls[0], **columns, fp8_constants=constants, min_length=max(call.min_length for call in calls))
