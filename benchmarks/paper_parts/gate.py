"""The learned gate of the second seed, in small: linear maps of pooled queries and keys, distilled on a few windows.

As in SeerAttention (Gao et al. 2024), which the report follows: queries of a block are pooled by their mean, keys by
mean, largest and smallest; a linear map of either gives the gate's queries and keys, whose products, softmaxed over
the blocks, learn the true weights of the blocks by KL divergence. All else is fixed. The maps begin as those under
which the gate is the product of means. Means, gate and oracle keep the same share of blocks in each row; the policies,
one threshold for all heads, are matched in sparsity.

Not reproduced: end-to-end training of a model with the gate in it, gates of whole heads, rotary positions of blocks
inside the gate, other model sizes, and the report's tables, which it has none of.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from common import empty_figure, sample_runs
from torch import Tensor

from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.capture import capture
from paper_parts.bench import Matcher, at
from paper_parts.by_policy import one_threshold
from paper_parts.head import BLOCK, Head, largest
from paper_parts.methods import Method
from paper_parts.setting import Setting

NAME = "gate"
STEPS, RATE = 100, 1e-3
"""Of Adam, at each site."""

SPARSITIES = (0.6, 0.7, 0.8, 0.9)


def run(setting: Setting) -> None:
    """Train, measure, print, write ``paper_gate`` and its picture."""
    began = time.perf_counter()
    gates: dict[str, tuple[Tensor, Tensor]] = {}
    divergence: dict[str, tuple[float, float]] = {}
    for name, operands in capture(sample_runs(setting.model, setting.calibration_windows())):
        queries, keys, losses = trained(operands)
        for head in range(len(queries)):
            gates[f"{name} {head}"] = queries[head], keys[head]
        divergence[name] = losses
        print(f"{name}: KL {losses[0]:.4f} of pooled means, {losses[1]:.4f} of the gate", flush=True)
    seconds = time.perf_counter() - began

    def learned(head: Head, t: float) -> Tensor:
        return largest(scores(*gates[head.name], *pooled(head.q, head.k), head.scale), t)

    methods = (
        Method("pooled means", "", "", keep=by_means),
        Method("gate", "", "", keep=learned),
        Method("policy meanshare", "", "", calls=lambda _: one_threshold("meanshare")),
        Method("policy cumulant", "", "", calls=lambda _: one_threshold("cumulant")),
        Method("oracle", "", "", keep=lambda head, t: largest(head.mass, t)),
    )
    dense = Method("dense", "", "", keep=lambda head, _: head.visible)
    rows: list[dict[str, Any]] = []
    for text in setting.texts:
        runs = setting.tested(text, setting.length)
        perplexity = at(dense, setting, runs, 0.0).perplexity
        for method in methods:
            matcher = Matcher(method, setting, runs)
            for sparsity in SPARSITIES:
                point = matcher.matched(sparsity)
                rise = point.perplexity / perplexity - 1
                rows.append({"text": text, "method": method.name, **vars(point), "rise": rise})
                print(f"{text:>18} {method.name:>14} {point.sparsity:.1%}: {rise:+.2%}", flush=True)
    setting.save(NAME, training_seconds=round(seconds, 1), kl=divergence, rows=rows)
    plot(rows, setting.picture(NAME))


def pooled(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``[.., N, D]``: means of queries ``[.., n, D]``; mean, largest and smallest of keys ``[.., n, 3 D]``."""
    q, k = (x.float().unflatten(-2, (-1, BLOCK)) for x in (q, k))
    return q.mean(-2), torch.cat([k.mean(-2), k.amax(-2), k.amin(-2)], -1)


def scores(of_queries: Tensor, of_keys: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``[.., n, n]``, of pooled queries and keys under their maps ``[.., D, D]`` and ``[.., 3 D, D]``."""
    return (q @ of_queries) @ (k @ of_keys).mT * scale


def by_means(head: Head, t: float) -> Tensor:
    """What the gate is before it has learned anything."""
    q, k = pooled(head.q, head.k)
    return largest(q @ k[:, : q.shape[1]].T * head.scale, t)


@torch.enable_grad()
def trained(samples: list[Operands]) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Maps of every head of a site, ``[H, D, D]`` and ``[H, 3 D, D]``, and the KL divergence before and after."""
    pairs, masses = [], []
    for sample in samples:
        q, k = sample.q[0].float(), sample.k[0].float().repeat_interleave(sample.groups, 0)
        pairs.append(pooled(q, k))
        draw = torch.Generator(q.device)
        masses.append(torch.stack([Head(*both, sample.scale, draw).mass for both in zip(q, k, strict=True)]))
    q, k = (torch.stack(column).detach() for column in zip(*pairs, strict=True))  # [samples, H, n, ..]
    mass, dim, heads = torch.stack(masses), q.shape[-1], q.shape[1]
    eye = torch.eye(dim, device=q.device)
    of_queries = eye.repeat(heads, 1, 1).requires_grad_()
    of_keys = torch.cat([eye, torch.zeros(2 * dim, dim, device=q.device)]).repeat(heads, 1, 1).requires_grad_()
    ahead = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    optimizer = torch.optim.Adam([of_queries, of_keys], lr=RATE)
    losses = []
    for _ in range(STEPS):
        logits = scores(of_queries, of_keys, q, k, samples[0].scale).masked_fill(ahead, -torch.inf)
        found = logits.log_softmax(-1).masked_fill(ahead, 0.0)
        loss = torch.xlogy(mass, mass).sum(-1).mean() - (mass * found).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return of_queries.detach(), of_keys.detach(), (losses[0], losses[-1])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over sparsity, one panel for each text."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    figure = empty_figure((3.2 * len(texts), 3.2))
    if figure is None:
        return
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        for name in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if (row["text"], row["method"]) == (text, name)]
            points = [(100 * row["sparsity"], 100 * row["rise"]) for row in mine]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set_title(text, fontsize=9)
        axes.set_xlabel("sparsity, %")
    panels[0].set_ylabel("perplexity above dense, %")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")
