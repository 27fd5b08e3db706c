"""Which rule would select better: predictors, shares of a threshold among heads, and corrections, before any kernel.

    python benchmarks/candidates.py --model M --texts A.txt B.txt stdlib --length 8192

Selection is simulated in PyTorch inside the model's attention: scores of every block, one threshold, dense attention
under the mask that it gives. For every candidate the threshold is bracketed on each text until the perplexity rises by
1 %; a line says the sparsity there. Blocks of 64 x 64 unless a name says otherwise; what calibration always keeps is
kept. What is learned is learned from the OTHER texts.

Scores: ``truth`` the true mass; ``S4`` exact mass of 4 rows of a block; ``S4fp8``, ``S4int8`` the same of rounded
queries and keys; ``S4g8`` the same rows against means and variances of 8 keys, ``R4g8`` with the variance's part held
below what 8 keys can reach; ``Q4g8`` means of 4 queries against those; ``cumulant`` is 16 against 16, ``main`` the same
with the keys' variance along the head's main query direction as it is; ``antidiagonal`` XAttention's, of stride 16;
``gate`` SeerAttention's, linear maps of pooled queries and keys; ``prior``: ``cumulant`` times a factor for each head
and distance; ``A+B`` the mean of two masses, ``AvB`` their maximum; ``before``: and what the query block before had in
the same column and at the same distance. ``reuse``: the scores of the layer before, head by head, or (``matched``) of
the head there that has most in common; ``pairs of layers``: every second layer's, from the one before it.

Selections: ``a0``, ``a.5``: strength is ``p n^a``. ``mass``: the smallest set that holds a share. ``value``: mass times
the distance of the block's mean value from the output. ``group``: two heads of a key head share a selection, by their
mean mass; ``union``: a block that either keeps. ``corrected``: skipped blocks enter by their mean key and value.
``local 64``: that many keys before a query block are always kept (elsewhere 128); ``last 0``: so many last rows (64).

Budgets: ``w0.5``: thresholds divided by the root of each head's sensitivity (of the output to it, by a backward pass).
``dense heads``: the 5 % most sensitive skip nothing. ``shapley``: thresholds divided by the root of a layer's KL
divergence when it alone is sparse. ``layers``: thresholds of the first and of the last third of the layers times 1/2, 1
or 2, the best of nine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from candidate_learned import Summaries, gate, heads_alike, prior, sensitivity, summaries
from candidate_scores import Score, cumulant, layer_before, mixed, pairs_of_layers, scores
from candidate_selection import Probe, Select
from common import RESULTS, SHIPPED_MODEL, load, save, settings, text_windows
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GOAL = 0.01
TRIES, CHEAP_TRIES = 5, 4
START = 0.03
DENSE_HEADS = 0.05

Make = Callable[[float], Select]
"""A selection at a threshold."""


class Text:
    """Windows of one text, their dense logits, and what they teach, each found when first asked for."""

    def __init__(self, model: Any, probe: Probe, windows: Sequence[Tensor]) -> None:
        self.model, self.probe, self.windows = model, probe, windows
        with torch.no_grad():
            self._dense = [model(ids, use_cache=False).logits[0] for ids in windows]

    @torch.no_grad()
    def rise(self, select: Select) -> tuple[float, float]:
        """Relative rise of perplexity, and sparsity."""
        losses = []
        for ids, dense, sparse in zip(self.windows, self._dense, self._sparse(select), strict=True):
            a, b = (F.cross_entropy(x[:-1].float(), ids[0, 1:]) for x in (dense, sparse))
            losses.append(float(b - a))
        return math.expm1(sum(losses) / len(losses)), sum(select.skipped) / len(select.skipped)

    @torch.no_grad()
    def divergence(self, select: Select) -> float:
        """Mean KL divergence of the next token's distribution from the dense one."""
        found = []
        for dense, sparse in zip(self._dense, self._sparse(select), strict=True):
            a, b = (x.float().log_softmax(-1) for x in (dense, sparse))
            found.append(float(F.kl_div(b, a, reduction="batchmean", log_target=True)))
        return sum(found) / len(found)

    def _sparse(self, select: Select) -> Iterator[Tensor]:
        for ids in self.windows:
            self.probe.select = select
            logits = self.model(ids, use_cache=False).logits[0]
            self.probe.select = None
            yield logits

    @cached_property
    def sensitivity(self) -> Tensor:
        """See :func:`~candidate_learned.sensitivity`."""
        return sensitivity(self.model, self.probe, self.windows)

    @cached_property
    def summaries(self) -> Summaries:
        """See :func:`~candidate_learned.summaries`."""
        return summaries(self.model, self.probe, self.windows)

    @cached_property
    def divergences(self) -> Tensor:
        """``[layers, 1]``: of each layer, sparse alone by ``cumulant`` at :data:`START`."""
        layers = self.model.config.num_hidden_layers
        alone = torch.full((layers, layers, 1), math.inf, device=self.model.device)  # thresholds of 0 but for one
        alone[range(layers), range(layers)] = 1.0
        found = [self.divergence(Select(cumulant, START, weights=weights)) for weights in alone]
        return torch.tensor(found, device=self.model.device)[:, None].clamp_min(1e-9)


class Others:
    """What the texts beside the one that is measured teach, each found when first asked for."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self._texts = texts

    @cached_property
    def sensitivity(self) -> Tensor:
        """``[layers, H]``, the geometric mean."""
        return torch.stack([text.sensitivity for text in self._texts]).log().mean(0).exp()

    @cached_property
    def divergence(self) -> Tensor:
        """``[layers, 1]``, the geometric mean over texts, divided by that over layers."""
        found = torch.stack([text.divergences for text in self._texts]).log().mean(0)
        return (found - found.mean()).exp()

    @cached_property
    def gate(self) -> Score:
        """See :func:`~candidate_learned.gate`."""
        return gate(self._summaries)

    @cached_property
    def prior(self) -> Score:
        """See :func:`~candidate_learned.prior`."""
        return prior(self._summaries)

    @cached_property
    def heads_alike(self) -> Tensor:
        """See :func:`~candidate_learned.heads_alike`."""
        return heads_alike(self._summaries)

    @property
    def _summaries(self) -> Summaries:
        return [window for text in self._texts for window in text.summaries]

    def dense_heads(self) -> Tensor:
        """``[layers, H]``: infinite for the most sensitive heads, so that nothing is below their threshold."""
        count = max(1, round(DENSE_HEADS * self.sensitivity.numel()))
        least = self.sensitivity.flatten().topk(count).values[-1]
        return torch.where(self.sensitivity >= least, math.inf, 1.0)

    @cached_property
    def thirds(self) -> Tensor:
        """``[layers, 1]``: what divides thresholds where ``cumulant`` skips most at the goal, on one window a text."""
        model, probe = self._texts[0].model, self._texts[0].probe
        text = Text(model, probe, [other.windows[0] for other in self._texts])
        layers = model.config.num_hidden_layers
        threshold = START
        found: list[tuple[float, Tensor]] = []
        for first, last in itertools.product((1.0, 0.5, 2.0), repeat=2):
            times = [(first, 1.0, last)[3 * layer // layers] for layer in range(layers)]
            weights = 1 / torch.tensor(times, device=model.device)[:, None]
            sparsity, threshold = at_goal(text, partial(Select, cumulant, weights=weights), threshold, CHEAP_TRIES)
            found.append((sparsity or 0.0, weights))
        return max(found, key=lambda pair: pair[0])[1]


def at_goal(text: Text, make: Make, start: float, tries: int = TRIES) -> tuple[float | None, float]:
    """Sparsity where the perplexity rises by :data:`GOAL`, ``None`` if it was not bracketed; and the threshold."""
    points: list[tuple[float, float, float]] = []
    threshold = start
    for _ in range(tries):
        rise, sparsity = text.rise(make(threshold))
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


def candidates(others: Others) -> dict[str, tuple[float, Make]]:
    """Name, first threshold, and selection at a threshold; nothing is learned before a selection is made."""
    known = scores()
    found: dict[str, tuple[float, Make]] = {}

    def add(
        name: str,
        score: str | Callable[[], Score],
        start: float = START,
        weights: Callable[[], Tensor | None] = lambda: None,
        **how: Any,
    ) -> None:
        def make(threshold: float) -> Select:
            return Select(known[score] if isinstance(score, str) else score(), threshold, weights=weights(), **how)

        found[name] = start, make

    for score in ("antidiagonal", "main", "S4fp8", "S4int8", "S4fp8+cumulant"):
        add(score, score)
    add("gate", lambda: others.gate)
    add("gate+cumulant", lambda: mixed(others.gate, known["cumulant"]))
    add("prior", lambda: others.prior)
    for score in ("truth", "cumulant"):
        add(f"{score} reuse", partial(layer_before, known[score]))
        add(f"{score} reuse matched", lambda of=known[score]: layer_before(of, others.heads_alike))
    add("truth pairs of layers", lambda: pairs_of_layers(known["truth"]))
    add("truth pairs of layers matched", lambda: pairs_of_layers(known["truth"], others.heads_alike))
    for score in ("truth", "cumulant", "S4+cumulant"):
        add(f"{score} union", score, group=2, union=True)
    for score in ("truth", "cumulant"):
        add(f"{score} group 32x32", score, group=2, block_q=32, block_k=32)
        add(f"{score} union 32x32", score, group=2, union=True, block_q=32, block_k=32)
    add("cumulant layers", "cumulant", weights=lambda: others.thirds)
    add("cumulant dense heads", "cumulant", weights=others.dense_heads)
    add("cumulant shapley", "cumulant", weights=lambda: others.divergence.sqrt())
    add("cumulant local 64", "cumulant", local_keys=64)
    add("cumulant local 256", "cumulant", local_keys=256)
    add("cumulant last 0", "cumulant", last_rows=0)

    for score in known:
        add(score, score)
    for score in ("cumulant", "S4+cumulant", "truth"):
        add(f"{score} a0", score, 0.01, exponent=0.0)
        add(f"{score} a.5", score, 0.08, exponent=0.5)
        add(f"{score} mass", score, 0.15, mass=True)
        for power in (0.25, 0.5, 1.0):
            add(f"{score} w{power}", score, weights=lambda power=power: others.sensitivity**power)
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
    texts = {
        Path(text).stem: Text(model, probe, text_windows(tokenizer, text, arguments.length, arguments.windows, device))
        for text in arguments.texts
    }
    tables = {
        name: candidates(Others([text for n, text in texts.items() if n != name or len(texts) == 1])) for name in texts
    }
    starts = {name: start for name, (start, _) in next(iter(tables.values())).items()}
    if unknown := set(arguments.only or ()) - set(starts):
        parser.error(f"no candidates: {', '.join(sorted(unknown))}")
    rows: dict[str, dict[str, float | None]] = {}
    for name, threshold in starts.items():
        if arguments.only and name not in arguments.only:
            continue
        rows[name] = {}
        for text, bench in texts.items():
            rows[name][text], threshold = at_goal(bench, tables[text][name][1], threshold)
        cells = [f"{text} {'-' if x is None else f'{x:.1%}'}" for text, x in rows[name].items()]
        print(f"{name:>24}  {'  '.join(cells)}", flush=True)
        with contextlib.redirect_stdout(None):  # after each, since a run may be cut off
            save(arguments.name, arguments.out, {"settings": settings(arguments), "sparsity_at_1_percent": rows})
    print(f"wrote {arguments.out / arguments.name}.json")


if __name__ == "__main__":
    main()
