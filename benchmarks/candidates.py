"""Which rule would select better: predictors, shares of a threshold among heads, and corrections, before any kernel.

    python benchmarks/candidates.py --model M --texts A.txt B.txt stdlib --length 8192

Selection is simulated in PyTorch inside the model's attention: scores of every block, one threshold, dense attention
under the mask that it gives. For every candidate the threshold is bracketed on each text until the perplexity rises by
1 %; a line says the sparsity there. Blocks of 64 x 64 unless a name says otherwise; what calibration always keeps is
kept. Names: ``truth`` the true mass; ``S4`` exact mass of 4 rows of a block; ``S4g8`` the same rows against means and
variances of 8 keys, ``R4g8`` with the variance's part held below what 8 keys can reach; ``Q4g8`` means of 4 queries
against those; ``A+B`` the mean of two masses, ``AvB`` their maximum; ``before``: and what the query block before had in
the same column and at the same distance. ``a0``, ``a.5``: strength is ``p n^a``. ``mass``: the smallest set that holds
a share. ``w0.5``: thresholds divided by the root of each head's sensitivity (of the output
to it, by a backward pass on OTHER texts). ``value``: mass times the distance of the block's mean value from the output.
``group``: two heads of a key head share a selection. ``corrected``: skipped blocks enter by their mean key and value.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, SHIPPED_MODEL, load, save, settings, text_windows
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from afbs_compile.kernels.policies.vertical_slash import with_previous

GOAL = 0.01
TRIES = 5
LOCAL_KEYS, LAST_ROWS = 128, 64

Score = Callable[[Tensor, Tensor, float, int, int], Tensor]
"""Mass ``[H, n_q, n_k]`` from q, k ``[H, N, D]``, the scale and the two block sizes."""


def rows_of(count: int, block: int) -> list[int]:
    """Offsets of so many rows, evenly spread over a block."""
    return [int((i + 0.5) * block / count) for i in range(count)]


def sampled(count: int) -> Score:
    """Exact mass of some rows of each query block, all of them where count is 0."""

    def score(q: Tensor, k: Tensor, scale: float, block_q: int, block_k: int) -> Tensor:
        rows = torch.tensor(rows_of(count or block_q, block_q), device=q.device)
        blocks, keys = q.shape[1] // block_q, torch.arange(k.shape[1], device=q.device)
        index = (torch.arange(blocks, device=q.device)[:, None] * block_q + rows).flatten()
        mass = []
        for head in range(len(q)):  # one matrix at a time
            logits = (q[head, index].float() @ k[head].float().T) * scale
            weights = logits.masked_fill_(keys > index[:, None], -math.inf).softmax(-1)
            mass.append(weights.unflatten(-1, (-1, block_k)).sum(-1).unflatten(0, (blocks, -1)).mean(1))
        return torch.stack(mass)

    return score


def coarse(rows: int, mean: bool, group: int, held: bool) -> Score:
    """Rows (or means of as many neighbours) against moments of key groups.

    Args:
        rows: of a query block that are taken (``mean``: queries of a group); group: keys of a group.
        held: whether the second cumulant is replaced, beyond the spread that so many keys can show, by what their
            maximum reaches (the random energy model's frozen phase).
    """

    def score(q: Tensor, k: Tensor, scale: float, block_q: int, block_k: int) -> Tensor:
        blocks, device = q.shape[1] // block_q, q.device
        if mean:
            taken = q.float().unflatten(1, (-1, rows)).mean(2) * scale
            last = torch.arange(taken.shape[1], device=device) * rows + rows - 1
        else:
            offsets = torch.tensor(rows_of(rows, block_q), device=device)
            last = (torch.arange(blocks, device=device)[:, None] * block_q + offsets).flatten()
            taken = q[:, last].float() * scale
        keys = k.float().unflatten(1, (-1, group))
        variance = taken.square() @ keys.var(2, unbiased=False).mT
        second = variance / 2
        if held:
            critical = math.sqrt(2 * math.log(group))
            spread = variance.clamp_min(0).sqrt()
            second = torch.where(spread < critical, second, spread * critical - math.log(group))
        logits = taken @ keys.mean(2).mT + second
        first = torch.arange(k.shape[1] // group, device=device) * group
        weights = logits.masked_fill_(first > last[:, None], -math.inf).softmax(-1)
        return weights.unflatten(-1, (-1, block_k // group)).sum(-1).unflatten(1, (blocks, -1)).mean(2)

    return score


def scores() -> dict[str, Score]:
    """Every score by name."""
    found: dict[str, Score] = {"truth": sampled(0), "cumulant": coarse(16, True, 16, False)}
    found |= {f"S{rows}": sampled(rows) for rows in (1, 2, 4, 8, 16)}
    for group in (4, 8, 16):
        found |= {f"S{rows}g{group}": coarse(rows, False, group, False) for rows in (4, 8, 16)}
        found |= {f"R{rows}g{group}": coarse(rows, False, group, True) for rows in (8, 16, 32)}
        found |= {f"Q{size}g{group}": coarse(size, True, group, True) for size in (2, 4, 8, 16)}
    plain = dict(found)

    def mixed(a: str, b: str, how: Callable[[Tensor, Tensor], Tensor]) -> Score:
        return lambda *x: how(plain[a](*x), plain[b](*x))

    for a, b in (("S4", "cumulant"), ("S8", "cumulant"), ("S2", "cumulant"), ("S4", "Q8g8"), ("S8", "Q8g8")):
        found[f"{a}+{b}"] = mixed(a, b, lambda x, y: (x + y) / 2)
    found["SvQ"] = mixed("S4", "Q8g8", torch.maximum)
    for name in ("cumulant", "S4", "S2+cumulant", "S4+cumulant"):
        found[f"{name} before"] = with_block_before(found[name])
    return found


def with_block_before(score: Score) -> Score:
    """The mass, with half of what the query block before had in the same column and at the same distance."""

    def smoothed(q: Tensor, k: Tensor, scale: float, block_q: int, block_k: int) -> Tensor:
        mass = with_previous(score(q, k, scale, block_q, block_k), block_q // block_k)
        return mass / mass.sum(-1, keepdim=True)

    return smoothed


@dataclass
class Select:
    """Attention of one layer under a selection; counts what it skips.

    Attributes:
        score: of blocks; threshold: of strength, of all heads; weights: ``[layers, H]``, what multiplies strengths.
        exponent: of the number of visible blocks; mass: whether the smallest set is kept that holds 1 - threshold.
        value, group, corrected: see the module.
    """

    score: Score
    threshold: float
    block_q: int = 64
    block_k: int = 64
    exponent: float = 0.25
    weights: Tensor | None = None
    mass: bool = False
    value: bool = False
    group: int = 1
    corrected: bool = False

    def __post_init__(self) -> None:
        self.skipped: list[float] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``[H, N, D]`` each."""
        live, visible = self._live(layer, q, k, v, scale)
        self.skipped.append(1 - float(live.sum() / (visible.sum() * len(live))))
        length = q.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        return torch.stack([self._head(q[h], k[h], v[h], live[h], visible, seen, scale) for h in range(len(q))])

    def _live(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        p = self.score(q, k, scale, self.block_q, self.block_k)
        first_q = torch.arange(p.shape[1], device=q.device)[:, None] * self.block_q
        first_k = torch.arange(p.shape[2], device=q.device) * self.block_k
        visible = first_k < first_q + self.block_q
        near = first_k + self.block_k + LOCAL_KEYS > first_q
        near[(q.shape[1] - LAST_ROWS) // self.block_q :] = True
        if self.value:
            mean = v.float().unflatten(1, (-1, self.block_k)).mean(2)
            out = p @ mean
            p = p * torch.cdist(out, mean) / out.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        if self.group > 1:
            p = p.unflatten(0, (-1, self.group)).mean(1).repeat_interleave(self.group, 0)
        weights = 1.0 if self.weights is None else self.weights[layer][:, None, None]
        if self.mass:
            ordered, place = p.masked_fill(~visible, 0).sort(-1, descending=True)
            needed = ordered.cumsum(-1) - ordered < 1 - self.threshold / weights
            live = torch.zeros_like(visible.expand_as(p)).scatter(-1, place, needed)
        else:
            live = p * visible.sum(-1, keepdim=True) ** self.exponent * weights > self.threshold
        return (live | near) & visible, visible

    def _head(
        self, q: Tensor, k: Tensor, v: Tensor, live: Tensor, visible: Tensor, seen: Tensor, scale: float
    ) -> Tensor:
        allowed = live.repeat_interleave(self.block_q, 0).repeat_interleave(self.block_k, 1) & seen
        if not self.corrected:
            return F.scaled_dot_product_attention(q[None], k[None], v[None], allowed, scale=scale)[0]
        logits = (q.float() @ k.float().T * scale).masked_fill(~allowed, -math.inf)
        mean_k, mean_v = (x.float().unflatten(0, (-1, self.block_k)).mean(1) for x in (k, v))
        dead = (~live & visible).repeat_interleave(self.block_q, 0)
        column = (q.float() @ mean_k.T * scale + math.log(self.block_k)).masked_fill(~dead, -math.inf)
        weights = torch.cat([logits, column], -1).softmax(-1)
        return (weights @ torch.cat([v.float(), mean_v])).to(q.dtype)


class Probe:
    """The attention function that the model is given: dense, or by a selection."""

    def __init__(self) -> None:
        self.select: Select | None = None
        self.outputs: list[Tensor] | None = None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        """Transformers' attention interface."""
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        if self.select is None:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        else:
            out = self.select(module.layer_idx, query[0], key[0], value[0], scaling)[None]
        if self.outputs is not None:
            out.retain_grad()
            self.outputs.append(out)
        return out.transpose(1, 2).contiguous(), None


class Text:
    """Windows of one text, with their dense logits."""

    def __init__(self, model: Any, windows: Sequence[Tensor]) -> None:
        self._model, self._windows = model, windows
        with torch.no_grad():
            self._dense = [model(ids, use_cache=False).logits[0] for ids in windows]

    @torch.no_grad()
    def rise(self, probe: Probe, select: Select) -> tuple[float, float]:
        """Relative rise of perplexity, and sparsity."""
        probe.select = select
        losses = []
        for ids, dense in zip(self._windows, self._dense, strict=True):
            sparse = self._model(ids, use_cache=False).logits[0]
            a, b = (F.cross_entropy(x[:-1].float(), ids[0, 1:]) for x in (dense, sparse))
            losses.append(float(b - a))
        probe.select = None
        return math.expm1(sum(losses) / len(losses)), sum(select.skipped) / len(select.skipped)


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


def at_goal(text: Text, probe: Probe, make: Callable[[float], Select], start: float) -> tuple[float | None, float]:
    """Sparsity where the perplexity rises by :data:`GOAL`, ``None`` if it was not bracketed; and the threshold."""
    points: list[tuple[float, float, float]] = []
    threshold = start
    for _ in range(TRIES):
        rise, sparsity = text.rise(probe, make(threshold))
        points.append((threshold, max(rise, 1e-5), sparsity))
        points.sort()
        below = [p for p in points if p[1] <= GOAL]
        above = [p for p in points if p[1] > GOAL]
        if below and above:
            (t0, r0, s0), (t1, r1, s1) = below[-1], above[0]
            share = math.log(GOAL / r0) / math.log(r1 / r0)
            found = s0 + share * (s1 - s0)
            threshold = t0 * (t1 / t0) ** share
            if abs(s1 - s0) < 0.01:
                return found, threshold
        else:
            nearest = below[-1] if below else above[0]
            threshold = nearest[0] * min(max((GOAL / nearest[1]) ** 0.7 * (1.15 if below else 0.85), 1 / 4), 4)
    return (found if below and above else None), threshold


def candidates(weights: Tensor) -> dict[str, tuple[float, Callable[[float], Select]]]:
    """Name, first threshold, and selection at a threshold.

    Args:
        weights: sensitivities of other texts.
    """
    known = scores()
    found: dict[str, tuple[float, Callable[[float], Select]]] = {}

    def add(name: str, score: str, start: float = 0.03, **how: Any) -> None:
        found[name] = start, lambda threshold: Select(known[score], threshold, **how)

    for score in known:
        add(score, score)
    for score in ("cumulant", "S4+cumulant", "truth"):
        add(f"{score} a0", score, 0.01, exponent=0.0)
        add(f"{score} a.5", score, 0.08, exponent=0.5)
        add(f"{score} mass", score, 0.15, mass=True)
        for power in (0.25, 0.5, 1.0):
            add(f"{score} w{power}", score, weights=weights**power)
        add(f"{score} value", score, 0.02, value=True)
        add(f"{score} group", score, group=2)
        add(f"{score} corrected", score, corrected=True)
        for shape in ((32, 32), (64, 32), (128, 64), (128, 128)):
            add(f"{score} {shape[0]}x{shape[1]}", score, block_q=shape[0], block_k=shape[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a Llama with whole attention")
    parser.add_argument("--texts", nargs="+", default=["topics", "stdlib"])
    parser.add_argument("--length", type=int, default=2048, help="a multiple of 128")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="candidates by name, by default all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="candidates", help="name of the result file")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = Probe()
    ALL_ATTENTION_FUNCTIONS.register("probe", probe)
    model, tokenizer = load(arguments.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    model.requires_grad_(False).set_attn_implementation("probe")
    windows = {
        Path(text).stem: text_windows(tokenizer, text, arguments.length, arguments.windows, device)
        for text in arguments.texts
    }
    texts = {name: Text(model, some) for name, some in windows.items()}
    own = {name: sensitivity(model, probe, some) for name, some in windows.items()}
    others = {
        name: torch.stack([w for n, w in own.items() if n != name or len(own) == 1]).log().mean(0).exp() for name in own
    }
    rows: dict[str, dict[str, float | None]] = {}
    for name in candidates(next(iter(own.values()))):
        if arguments.only and name not in arguments.only:
            continue
        rows[name] = {}
        threshold = candidates(next(iter(own.values())))[name][0]
        for text, bench in texts.items():
            make = candidates(others[text])[name][1]
            rows[name][text], threshold = at_goal(bench, probe, make, threshold)
        cells = [f"{text} {'-' if x is None else f'{x:.1%}'}" for text, x in rows[name].items()]
        print(f"{name:>24}  {'  '.join(cells)}", flush=True)
    save(arguments.name, arguments.out, {"settings": settings(arguments), "sparsity_at_1_percent": rows})


if __name__ == "__main__":
    main()
