"""Small models, recipes made by hand for them, and the reference operator placed by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afbs_compile.found import FoundGraph
from afbs_compile.kernels.attend.engines import family_on
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import KEEP_ALL, LAMBDA_OFF, THETA_OFF, SparseCall
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec import attention
from afbs_compile.kernels.spec.selection import PREDICTOR_VERSION
from afbs_compile.passes.record import record_graphs
from afbs_compile.recipe import GraphRecipe, HeadRecipe, Recipe, SampleRecord, SiteRecipe


def recipe_for(
    model: nn.Module,
    example: Any,
    *,
    tau: float | Sequence[float] = 0.7,
    theta: float = THETA_OFF,
    block: tuple[int, int] = (64, 64),
    min_length: int = 1,
    policy: str | Sequence[str] = "meansim",
) -> Recipe:
    """A recipe that belongs to the model, with the thresholds given and nothing measured.

    ``tau`` and ``policy`` may be one for each head.
    """
    graphs = []
    for recorded in record_graphs(model, [example]):
        found = FoundGraph.of(recorded.gm, recorded.samples[0], 1)
        sites = tuple(_site_recipe(site, tau, policy, theta, block, min_length) for site in found.sites)
        record = SampleRecord("samples", 1, 1, (1, 1), "")
        graphs.append(GraphRecipe(found.graph, found.weights, found.source, record, 0.0, 0.0, sites))
    device = torch.device("cpu")
    return Recipe(
        options={"tolerance": 0.055, "method": "afbs", "parameterization": "corrected"},
        device=device.type,
        engine=family_on(device),
        predictor_version=PREDICTOR_VERSION,
        versions={},
        graphs=tuple(graphs),
    )


def _site_recipe(
    site: Any,
    tau: float | Sequence[float],
    policy: str | Sequence[str],
    theta: float,
    block: tuple[int, int],
    min_length: int,
) -> SiteRecipe:
    call = SparseCall(
        tau=(tau,) * site.heads if isinstance(tau, float) else tuple(tau),
        theta=(theta,) * site.heads,
        lam=(LAMBDA_OFF,) * site.heads,
        policy=(policy,) * site.heads if isinstance(policy, str) else tuple(policy),
        shape=BlockShape(*block),
        min_length=min_length,
    )
    return SiteRecipe(
        name=site.name,
        outcome="sparse",
        mask=str(site.mask),
        head_dim=site.head_dim,
        kv_heads=site.kv_heads,
        dtype=str(site.dtype).removeprefix("torch."),
        call=call,
        heads=tuple(HeadRecipe("dense" if value >= KEEP_ALL else "sparse", 0.5, 0.01, (0.01,)) for value in call.tau),
    )


def all_left_alone(recipe: Recipe) -> Recipe:
    """The same recipe with the outcome ``dense`` at every call."""
    graphs = tuple(
        replace(graph, sites=tuple(replace(site, outcome="dense", reason="not faster") for site in graph.sites))
        for graph in recipe.graphs
    )
    return replace(recipe, graphs=graphs)


class Grouped(nn.Module):
    """One attention call with two query heads for each key head, as transformers spells it."""

    HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = self.HEADS * self.HEAD_DIM
        self.causal = causal
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * self.KV_HEADS * self.HEAD_DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = 4 * self.q(x).unflatten(-1, (self.HEADS, self.HEAD_DIM)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.KV_HEADS, self.HEAD_DIM)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        groups = self.HEADS // self.KV_HEADS
        k, v = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return out.transpose(1, 2).flatten(2)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest number."""
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def reference_by_hand(recipe: Recipe) -> Iterator[None]:
    """While open, every attention call is the reference operator with the thresholds of the recipe's first call."""
    call = recipe.sites[0].calibrated
    original = F.scaled_dot_product_attention

    def sparse(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
        if q.shape[2] < call.min_length:
            return original(q, k, v, is_causal=is_causal)
        mask = Causal() if is_causal else Full()
        return attention.sparse_attention(Operands(q, k, v, mask, q.shape[-1] ** -0.5), call)

    F.scaled_dot_product_attention = sparse
    try:
        with torch.no_grad():
            yield
    finally:
        F.scaled_dot_product_attention = original


def wandering(length: int, batch: int = 1, width: int = 64, seed: int = 0) -> Tensor:
    """``[batch, length, width]``: a random walk, so that neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator).cumsum(1) / 10
