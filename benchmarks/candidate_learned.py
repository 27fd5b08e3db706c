"""What candidates of ``candidates.py`` learn from texts: sensitivities, a gate, a prior of distances, heads alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from candidate_scores import Inputs, Score, cumulant, truth
from candidate_selection import Probe
from torch import Tensor

STEPS, RATE = 200, 1e-3
"""Of Adam, at each layer's gate."""


@dataclass(frozen=True)
class Summary:
    """One layer on one window, in blocks of 64: what is learned from, small enough that all layers' stay in memory.

    Attributes:
        q, k: pooled, ``[H, n, D]`` and ``[H, n, 3 D]``; scale: of products; truth, cumulant: mass ``[H, n, n]``.
    """

    q: Tensor
    k: Tensor
    scale: float
    truth: Tensor
    cumulant: Tensor


Summaries = Sequence[Sequence[Summary]]
"""Of every window, of every layer."""


def sensitivity(model: Any, probe: Probe, windows: Sequence[Tensor]) -> Tensor:
    """``[layers, H]``: root mean square over tokens of |gradient| |output| of labels drawn from the model itself."""
    squares = []
    for ids in windows:
        probe.outputs = []
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
        labels = torch.distributions.Categorical(logits=logits.detach()).sample()
        F.cross_entropy(logits, labels, reduction="sum").backward()
        squares.append(
            torch.stack(
                [
                    (o.grad.float().norm(dim=-1) * o.detach().float().norm(dim=-1))[0].square().mean(-1)
                    for o in probe.outputs
                ]  # type: ignore[union-attr]
            )
        )
        probe.outputs = None
    found = torch.stack(squares).mean(0).sqrt()
    return found / found.log().mean().exp()


@torch.no_grad()
def summaries(model: Any, probe: Probe, windows: Sequence[Tensor]) -> Summaries:
    """Of dense runs."""
    found: list[list[Summary]] = []

    def watch(x: Inputs) -> None:
        found[-1].append(Summary(*pooled(x), x.scale, truth(x), cumulant(x)))

    probe.watch = watch
    for ids in windows:
        found.append([])
        model(ids, use_cache=False)
    probe.watch = None
    return found


def pooled(x: Inputs) -> tuple[Tensor, Tensor]:
    """Means of the queries of blocks ``[H, n, D]``; mean, largest and smallest of their keys ``[H, n, 3 D]``."""
    q, k = x.q.float().unflatten(1, (-1, x.block_q)), x.k.float().unflatten(1, (-1, x.block_k))
    return q.mean(2), torch.cat([k.mean(2), k.amax(2), k.amin(2)], -1)


def gate(windows: Summaries) -> Score:
    """A gate for each head, as SeerAttention's: a softmax of products of pooled queries and keys under linear maps."""
    maps = [trained_gate(layer) for layer in zip(*windows, strict=True)]

    def score(x: Inputs) -> Tensor:
        logits = gate_logits(*maps[x.layer], *pooled(x), x.scale)
        return logits.masked_fill(~x.visible(), -torch.inf).softmax(-1)

    return score


@torch.enable_grad()
def trained_gate(layer: Sequence[Summary]) -> tuple[Tensor, Tensor]:
    """Maps ``[H, D, D]`` and ``[H, 3 D, D]`` of a layer, by the KL divergence of the true mass from the gate's.

    They begin as those under which the gate is the product of means.
    """
    q, k, mass = (torch.stack([getattr(x, name) for x in layer]) for name in ("q", "k", "truth"))
    eye = torch.eye(q.shape[-1], device=q.device)
    of_queries = eye.repeat(q.shape[1], 1, 1).requires_grad_()
    of_keys = F.pad(eye, (0, 0, 0, 2 * len(eye))).repeat(q.shape[1], 1, 1).requires_grad_()
    ahead = torch.ones_like(mass[0, 0], dtype=torch.bool).triu(1)
    optimizer = torch.optim.Adam([of_queries, of_keys], lr=RATE)
    for _ in range(STEPS):
        logits = gate_logits(of_queries, of_keys, q, k, layer[0].scale).masked_fill(ahead, -torch.inf)
        # The true mass's own entropy, which KL divergence has beside this, does not depend on the maps.
        loss = -(mass * logits.log_softmax(-1).masked_fill(ahead, 0.0)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return of_queries.detach(), of_keys.detach()


def gate_logits(of_queries: Tensor, of_keys: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``[.., H, n, n]``, of pooled queries and keys under their maps."""
    return (q @ of_queries) @ (k @ of_keys).mT * scale


def prior(windows: Summaries) -> Score:
    """``cumulant`` times what the truth has of it at a head's distances: exp of the mean of log (truth / cumulant).

    The mean is weighted by the truth. Distances are in blocks, in :func:`buckets`.
    """
    factors = [distance_factors(layer) for layer in zip(*windows, strict=True)]

    def score(x: Inputs) -> Tensor:
        known = factors[x.layer]
        mass = cumulant(x)
        place = buckets(mass.shape[1], mass.device).clamp_max(known.shape[1] - 1)
        mass = mass * known[:, place]
        return mass / mass.sum(-1, keepdim=True)

    return score


def distance_factors(layer: Sequence[Summary]) -> Tensor:
    """``[H, buckets]``, of a layer."""
    mass, guess = (torch.stack([getattr(x, name) for x in layer], 1) for name in ("truth", "cumulant"))
    place = buckets(mass.shape[2], mass.device).expand_as(mass[0]).flatten()
    tiny = torch.finfo(torch.float32).tiny
    surplus = mass * (mass.clamp_min(tiny).log() - guess.clamp_min(tiny).log())
    zeros = mass.new_zeros(len(mass), int(place.max()) + 1)
    total, weight = (zeros.index_add(1, place, x.flatten(1)) for x in (surplus, mass))
    return (total / weight.clamp_min(tiny)).exp()


def buckets(blocks: int, device: torch.device) -> Tensor:
    """``[n, n]``: buckets of the distances of blocks, one each up to 3, then widths that double every fourth bucket.

    The first key block, a sink whose mass has little to do with its distance, has a bucket of its own.
    """
    place = torch.arange(blocks, device=device)
    distance = place[:, None] - place
    found = (4 * torch.log2(1 + distance.clamp_min(0) / 4)).long() + 1
    found[:, 0] = 0
    return found


def heads_alike(windows: Summaries) -> Tensor:
    """``[layers, H]``: the head of the layer before with most of the true mass in common; the first layer's own."""
    layers = list(zip(*windows, strict=True))
    found = [torch.arange(len(layers[0][0].q), device=layers[0][0].q.device)]
    for before, layer in pairwise(layers):
        common = [torch.minimum(x.truth[:, None], y.truth).sum((-2, -1)) for x, y in zip(layer, before, strict=True)]
        found.append(torch.stack(common).sum(0).argmax(1))
    return torch.stack(found)
