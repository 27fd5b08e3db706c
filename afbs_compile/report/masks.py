"""Which blocks the heads of a recipe keep on one input, packed for a page."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from afbs_compile.kernels.policy import predict_mask
from afbs_compile.kernels.reference import visible_blocks
from afbs_compile.passes.capture import Operands
from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.report.applied import AppliedGraph, operands

BYTES = 4 * 2**20
"""What the masks of one page may weigh; of more heads than fit an evenly spread choice is kept."""


@dataclass(frozen=True)
class HeadMask:
    """Live blocks of one head.

    Attributes:
        graph, site, head: which one; the graph by its number in the recipe.
        rows, columns: blocks of queries and of keys.
        causal: whether blocks above the diagonal cannot be seen.
        live: one bit per block, highest bit first, each row filled up to whole bytes, base64.
        sparsity: 1 - live / visible blocks on this input.
    """

    graph: int
    site: str
    head: int
    rows: int
    columns: int
    causal: bool
    live: str
    sparsity: float


@dataclass(frozen=True)
class Masks:
    """Masks of the heads of a recipe.

    Attributes:
        source: what the input was; tokens: its length at the attention calls, of the longest one.
        heads: those that are shown; notes: which are not, and why.
    """

    source: str
    tokens: int
    heads: tuple[HeadMask, ...]
    notes: tuple[str, ...]


def block_masks(graphs: Sequence[AppliedGraph], recipe: Recipe, source: str) -> Masks:
    """Masks of every sparse head, whether its call is rewritten or stayed dense because it was not faster.

    Args:
        graphs: of a run on one input, of which the first batch element is shown, with this recipe applied.
        recipe: whose thresholds are drawn.
        source: what the input was, for the page.
    """
    keep_every = max(1, -(-sum(map(_weight, graphs)) // BYTES))
    heads: list[HeadMask] = []
    notes: list[str] = []
    tokens = number = 0
    for graph, row, (sample, *_) in _numbered(graphs, recipe):
        tokens = max(tokens, int(sample.q.shape[2]))
        wanted = []
        for index, head in enumerate(row.heads):
            if head.outcome == "dense":
                continue
            if number % keep_every == 0:
                wanted.append(index)
            number += 1
        heads += _site_masks(graph, row, wanted, sample)
    if keep_every > 1:
        notes.append(f"{len(heads)} of {number} sparse heads are shown, every {keep_every}th: all would be too large")
    return Masks(source, tokens, tuple(heads), tuple(notes))


def _numbered(graphs: Sequence[AppliedGraph], recipe: Recipe) -> Iterator[tuple[int, SiteRecipe, Sequence[Operands]]]:
    """Each calibrated site with the number of its graph in the recipe."""
    for graph in graphs:
        found = graph.found
        alike = [n for n, g in enumerate(recipe.graphs) if (g.graph, g.weights) == (found.graph, found.weights)]
        same = [n for n in alike if recipe.graphs[n].source == found.source]
        for row, samples in operands([graph]):
            yield (same or alike)[0], row, samples


def _weight(graph: AppliedGraph) -> int:
    """Bytes of the masks of a graph's sparse heads in base64."""
    lengths = {site.name: site.length for site in graph.found.sites}
    total = 0
    for row in graph.plan.rows:
        if row.block_q is not None and row.block_k is not None and row.name in lengths:
            length, sparse = int(lengths[row.name]), sum(head.outcome == "sparse" for head in row.heads)
            total += sparse * (length // row.block_q + 1) * (length // row.block_k + 1) // 6
    return total


def _site_masks(graph: int, row: SiteRecipe, wanted: list[int], sample: Operands) -> list[HeadMask]:
    if not wanted:
        return []
    assert row.block_q is not None
    assert row.block_k is not None
    groups = sample.q.shape[1] // sample.k.shape[1]
    q = sample.q[:1, wanted]
    k = sample.k[:1, [index // groups for index in wanted]]
    live = predict_mask(
        q,
        k,
        [row.heads[index].tau for index in wanted],
        [row.heads[index].theta for index in wanted],
        [row.heads[index].policy for index in wanted],
        causal=sample.causal,
        scale=sample.scale,
        block_q=row.block_q,
        block_k=row.block_k,
        kept=sample.kept,
    )[0].cpu()
    rows, columns = int(live.shape[1]), int(live.shape[2])
    visible = visible_blocks(rows, columns, row.block_q, row.block_k, sample.causal, torch.device("cpu")).sum()
    return [
        HeadMask(
            graph,
            row.name,
            index,
            rows,
            columns,
            sample.causal,
            _packed(mask),
            round(1 - int(mask.sum()) / int(visible), 4),
        )
        for index, mask in zip(wanted, live, strict=True)
    ]


def _packed(mask: Tensor) -> str:
    return base64.b64encode(np.packbits(mask.numpy(), axis=1).tobytes()).decode()
