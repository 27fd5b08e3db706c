"""Which blocks the heads of a recipe keep on one input, packed for a page."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from afbs_compile.kernels.attend.engines import engines_on
from afbs_compile.kernels.blocks import live_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.sight import resolved, sight_of
from afbs_compile.recipe import SiteRecipe
from afbs_compile.report.applied import AppliedGraph, operands

BYTES = 4 * 2**20
"""What the masks of one page may weigh; of more heads than fit an evenly spread choice is kept."""


@dataclass(frozen=True)
class HeadMask:
    """Live blocks of one head.

    Attributes:
        graph, site, head: which one; the graph by its number in the recipe.
        rows, columns: blocks of queries and of keys.
        sight: which of :attr:`Masks.sights` says what can be seen.
        live: one bit per block, highest bit first, each row filled up to whole bytes, base64.
        sparsity: 1 - live / visible blocks on this input.
    """

    graph: int
    site: str
    head: int
    rows: int
    columns: int
    sight: int
    live: str
    sparsity: float


@dataclass(frozen=True)
class Masks:
    """Masks of the heads of a recipe.

    Attributes:
        source: what the input was; tokens: its length at the attention calls, of the longest one.
        heads: those that are shown; notes: which are not, and why.
        sights: visible blocks of some heads, packed as their live ones.
    """

    source: str
    tokens: int
    heads: tuple[HeadMask, ...]
    notes: tuple[str, ...]
    sights: tuple[str, ...]


def block_masks(graphs: Sequence[AppliedGraph], source: str) -> Masks:
    """Masks of every sparse head, whether its call is rewritten or stayed dense because it was not faster.

    Args:
        graphs: of a run on one input, of which the first batch element is shown, with a recipe applied.
        source: what the input was, for the page.
    """
    keep_every = max(1, -(-sum(map(_weight, graphs)) // BYTES))
    heads: list[HeadMask] = []
    sights: dict[str, int] = {}
    notes: list[str] = []
    tokens = number = 0
    for graph, row, (sample, *_) in _numbered(graphs):
        tokens = max(tokens, sample.k_len)
        wanted = []
        for index, head in enumerate(row.heads):
            if head.outcome == "dense":
                continue
            if number % keep_every == 0:
                wanted.append(index)
            number += 1
        heads += _site_masks(graph, row, wanted, sample, sights)
    if keep_every > 1:
        notes.append(f"{len(heads)} of {number} sparse heads are shown, every {keep_every}th: all would be too large")
    return Masks(source, tokens, tuple(heads), tuple(notes), tuple(sights))


def _numbered(graphs: Sequence[AppliedGraph]) -> Iterator[tuple[int, SiteRecipe, Sequence[Operands]]]:
    """Each calibrated site with the number of its graph in the recipe."""
    for graph in graphs:
        for row, samples in operands([graph]):
            yield graph.plan.number or 0, row, samples


def _weight(graph: AppliedGraph) -> int:
    """Bytes of the masks of a graph's sparse heads in base64."""
    sites = {site.name: site for site in graph.found.sites}
    total = 0
    for row in graph.plan.rows:
        if row.call is not None and row.name in sites:
            site, shape = sites[row.name], row.call.shape
            sparse = row.call.dense_heads.count(False)
            total += sparse * (int(site.q_len) // shape.q + 1) * (int(site.k_len) // shape.k + 1) // 6
    return total


def _site_masks(
    graph: int, row: SiteRecipe, wanted: list[int], sample: Operands, sights: dict[str, int]
) -> list[HeadMask]:
    if not wanted:
        return []
    one = sample.element(0)
    # With those that they share a selection with; few of many, for the lists of all would be large.
    together = row.calibrated.shape.heads
    heads = sorted({head - head % together + i for head in wanted for i in range(together)})
    call = row.calibrated.in_own_precision().taken(heads, one.k.shape[1])
    part = one.taken(heads)
    places = [heads.index(head) for head in wanted]
    live = live_of(engines_on(one.device)[0].select(part, call))[0][places].cpu()
    visible = sight_of(resolved(part), call.shape).visible[0].cpu()
    rows, columns = visible.shape[1:]
    pairs = zip(wanted, live, visible.expand(len(wanted), -1, -1), strict=True)
    return [
        HeadMask(
            graph,
            row.name,
            index,
            rows,
            columns,
            sights.setdefault(_packed(seen), len(sights)),
            _packed(mask),
            round(1 - int(mask.sum()) / max(1, int(seen.sum())), 4),
        )
        for index, mask, seen in pairs
    ]


def _packed(mask: Tensor) -> str:
    return base64.b64encode(np.packbits(mask.numpy(), axis=1).tobytes()).decode()
