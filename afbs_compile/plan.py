"""Decide what happens to each attention call of one graph, given a recipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from afbs_compile.errors import RecipeError
from afbs_compile.found import FoundGraph
from afbs_compile.kernels.attend.engines import precision_refusal
from afbs_compile.kernels.call import SparseCall
from afbs_compile.match import match
from afbs_compile.passes.rules import work_of
from afbs_compile.passes.site import AttentionSite
from afbs_compile.passes.sizes import holds
from afbs_compile.passes.unmask import has_mask_of_valid_keys, has_needless_mask
from afbs_compile.reasons import EXPECTED, NONE_FOUND, grouped
from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.tuner.lengths import Outside, extrapolated_tau

NO_RECIPE = "not calibrated: there is no recipe, and first_call is 'dense'"
NOT_CALIBRATED = "not calibrated: it was refused when the recipe was made"


@dataclass(frozen=True)
class Plan:
    """What is done with every attention call of a graph.

    Attributes:
        calls: the calls to rewrite, with their constants.
        rows: every call, with its outcome in THIS graph, in the recipe's terms.
        covered: whether the recipe speaks for this graph's length: a call that did not pay at a shorter one may here.
        unmasked: calls that stay dense and lose their mask; only :meth:`without_masks` names any.
        differences: in what the model differs from the one that was calibrated, as :class:`afbs_compile.match.Match`
            has them: thresholds hold only once :mod:`afbs_compile.revalidate` has looked.
        number: of the recipe's graph.
    """

    calls: Mapping[AttentionSite, SparseCall]
    rows: tuple[SiteRecipe, ...]
    covered: bool = True
    unmasked: tuple[AttentionSite, ...] = ()
    differences: tuple[str, ...] = ()
    number: int | None = None

    @classmethod
    def of(cls, found: FoundGraph, recipe: Recipe | None, outside: Outside = "extrapolate") -> Plan:
        """Match a graph with a recipe; without one every call stays dense.

        Args:
            found: the graph.
            recipe: what was calibrated.
            outside: what runs at lengths that were not validated. A graph whose length is fixed obeys it here. One
                graph for all lengths has one set of constants: with ``"extrapolate"`` they stay as validated, else the
                operator runs dense outside (it cannot calibrate).

        Raises:
            RecipeError: the recipe was made for another model, device, dtype or predictor. The message lacks its
                subject, the recipe's name.
        """
        refused = tuple(SiteRecipe(refusal.name, "refused", refusal.reason) for refusal in found.refusals)
        if recipe is None:
            return cls({}, refused)
        known = match(found, recipe)
        rows = [
            _in_precision(site, applied(site, known.sites.get(site.name), outside, recipe.tolerance))
            for site in found.sites
        ]
        calls = {
            site: _call(site, row, outside)
            for site, row in zip(found.sites, rows, strict=True)
            if row.outcome == "sparse"
        }
        longest = known.graph.samples.lengths[1]
        open_question = [row for row in rows if row.outcome == "dense" and row.sparse_ms and not _pays(row)]
        longer = any(size_now(site.k_len) > longest for site in found.sites)
        covered = not (open_question and longer)
        return cls(calls, (*rows, *refused), covered, differences=known.differences, number=known.number)

    @classmethod
    def dense(cls, found: FoundGraph, reason: str) -> Plan:
        """The plan that leaves every call dense, those that could be rewritten for one reason."""
        rows = [SiteRecipe(site.name, "dense", reason) for site in found.sites]
        return cls({}, (*rows, *(SiteRecipe(refusal.name, "refused", refusal.reason) for refusal in found.refusals)))

    def without_masks(self, found: FoundGraph) -> Plan:
        """The plan in which calls that stay dense lose a mask that PyTorch's own flag replaces.

        Args:
            found: the graph that the plan is for.
        """
        dense = {row.name for row in self.rows if row.outcome == "dense"}
        said = {site.name: f"mask dropped: {site.mask}" for site in found.sites if has_needless_mask(site)}
        said |= {site.name: "reads valid keys for a mask" for site in found.sites if has_mask_of_valid_keys(site)}
        unmasked = tuple(site for site in found.sites if site.name in dense and site.name in said)
        changed = {site.name for site in unmasked}
        rows = [
            replace(row, reason=f"{row.reason}; stays dense; {said[row.name]}") if row.name in changed else row
            for row in self.rows
        ]
        return replace(self, rows=tuple(rows), unmasked=unmasked)

    def summary(self) -> str:
        """One sentence on why nothing was rewritten."""
        if not self.rows:
            return NONE_FOUND
        return f"no attention call was rewritten: {grouped(row.reason for row in self.rows)}"

    @property
    def is_expected(self) -> bool:
        """Whether every row stays dense by design, which nobody needs to be told beside a graph that was rewritten."""
        return all((row.reason or "").startswith(EXPECTED) for row in self.rows)


def size_now(length: int | torch.SymInt) -> int:
    """A length as a number; of a symbolic one its value in this call, without a guard on it."""
    return int(length) if isinstance(length, int) else int(length.node.hint)


def _pays(row: SiteRecipe) -> bool:
    """Whether a shortest worthwhile length is known."""
    return row.calibrated.min_length > 0


class Sizes(NamedTuple):
    """What a recorded decision needs to know of an attention call that stands in no graph."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    q_len: int
    k_len: int


def applied(
    site: AttentionSite | Sizes, recorded: SiteRecipe | None, outside: Outside, tolerance: float | None
) -> SiteRecipe:
    """The recorded decision, as it applies to a call at its length.

    Raises:
        RecipeError: the call has other heads.
    """
    if recorded is None or recorded.outcome == "refused":
        return SiteRecipe(site.name, "dense", NOT_CALIBRATED)
    recorded = replace(recorded, name=site.name)
    # What rows see is not part of it: thresholds hold for a model's weights, and calls differ in their masks.
    here = (site.heads, site.kv_heads, site.head_dim)
    there = (len(recorded.heads), recorded.kv_heads, recorded.head_dim)
    if here != there:
        raise RecipeError(f"does not fit {site.name}: (heads, kv heads, head_dim) is {here}, not {there}.")
    if recorded.outcome != "sparse":
        return recorded
    # Of a symbolic length this makes a guard, so that Dynamo compiles again for the other side and short sequences keep
    # the real call, at its real cost. Where no guard can be made the operator decides at run time.
    shortest = recorded.calibrated.min_length
    if shortest and holds(site.q_len * site.k_len < shortest**2):
        reason = f"too short: {work_of(site.q_len, site.k_len)}, sparse was measured to pay from {shortest}"
        return replace(recorded, outcome="dense", reason=reason)
    validated = recorded.validated_lengths
    if validated is None or not isinstance(site.k_len, int):
        return recorded
    if validated[0] <= site.k_len <= validated[1]:
        return recorded
    if outside == "extrapolate":
        return _extrapolated(recorded, validated, site.k_len, tolerance)
    reason = f"outside the validated lengths: {site.k_len} tokens, validated from {validated[0]} to {validated[1]}"
    return replace(recorded, outcome="dense", reason=reason)


def _in_precision(site: AttentionSite, row: SiteRecipe) -> SiteRecipe:
    """The row with its heads in their own precision where this device has no FP8; nothing of it is less accurate."""
    if row.outcome != "sparse" or "fp8" not in row.calibrated.precision:
        return row
    reason = precision_refusal(site.shapes().operands(), row.calibrated, "fp8")
    return row if reason is None else in_own_precision(row, reason)


def in_own_precision(row: SiteRecipe, reason: str) -> SiteRecipe:
    """The row with every head in its own precision, and why those that were in FP8 are not."""
    if row.call is None:
        return row
    heads = tuple(
        head if precision == "own" else replace(head, precision_reason=reason)
        for head, precision in zip(row.heads, row.call.precision, strict=True)
    )
    return replace(row, heads=heads, call=row.call.in_own_precision())


def _extrapolated(row: SiteRecipe, validated: tuple[int, int], length: int, tolerance: float | None) -> SiteRecipe:
    """The row with taus for another length."""
    taus = []
    for tau, head in zip(row.calibrated.tau, row.heads, strict=True):
        # A budget on the output gives a head no room beyond what it was measured to cost.
        room = 1.0 if tolerance is None else max(1.0, tolerance / max(head.error, sys.float_info.min))
        taus.append(extrapolated_tau(tau, (head.tau_exponent, head.length_exponent), validated, length, room))
    return replace(row, call=replace(row.calibrated, tau=tuple(taus)))


def _call(site: AttentionSite, row: SiteRecipe, outside: Outside) -> SparseCall:
    """The constants that are written into the graph."""
    shortest, longest = row.calibrated.min_length, 0
    symbolic = isinstance(site.q_len, torch.SymInt) or isinstance(site.k_len, torch.SymInt)
    if symbolic and statically_known_true(site.q_len * site.k_len >= shortest**2):
        # A guard says so. A graph without it, or with one for another length, must not look the same: inductor's cache
        # would bring the guard along. One token less is as never reached, and tells them apart.
        shortest = max(0, shortest - 1)
    if outside != "extrapolate" and row.validated_lengths is not None and not isinstance(site.k_len, int):
        shortest, longest = max(shortest, row.validated_lengths[0]), row.validated_lengths[1]
    return replace(row.calibrated, min_length=shortest, max_length=longest)
