"""Run a model with any method in place of its attention, and count what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.capture import SampleRun, run_with
from afbs_compile.tuner import measure
from afbs_compile.tuner.end_to_end import find_logits, next_tokens
from paper_parts.head import BLOCK, Head
from paper_parts.methods import Method
from paper_parts.setting import Setting

EXACT = 0.005
"""How near a matched sparsity is."""

TRIES = 14


@dataclass(frozen=True)
class Point:
    """A method at one setting of its knob on one text.

    Attributes:
        t: the knob; sparsity: share of visible pairs (blocks, of methods by blocks) that are left out, mean over heads.
        perplexity: over the counted tokens.
    """

    t: float
    sparsity: float
    perplexity: float


class Replacement:
    """Attention by a method; remembers how much it left out."""

    def __init__(self, method: Method, setting: Setting, t: float) -> None:
        self._method, self._t, self._seed = method, t, setting.arguments.seed
        self._calls = None if method.calls is None else method.calls(setting)
        self._sparsities: list[float] = []

    @property
    def sparsity(self) -> float:
        """Mean over heads and windows so far."""
        return mean(self._sparsities)

    def __call__(self, name: str, operands: Operands) -> Tensor:
        """A site's output ``[1, H, N, D]``."""
        if self._calls is not None:
            call = self._calls(name, operands, self._t)
            out, counts = measure.run(operands, call)
            self._sparsities += measure.sparsity_of(operands, call.shape, counts).tolist()
            return out
        heads = [self._masked(operands.taken([head]), f"{name} {head}") for head in range(operands.heads)]
        return torch.cat(heads, 1)

    def _masked(self, operands: Operands, name: str) -> Tensor:
        q, k = operands.q[0, 0], operands.k[0, 0]
        draw = torch.Generator(q.device).manual_seed(hash_of(f"{self._seed} {name}"))
        head = Head(q.float(), k.float(), operands.scale, draw, name)
        keep = self._method.keep
        assert keep is not None, "a method has one of the two"
        kept = keep(head, self._t)
        if len(kept) < head.length:
            seen = torch.ones_like(kept).tril()
            kept = (kept | torch.eye(len(kept), dtype=torch.bool, device=kept.device)) & seen
            self._sparsities.append(1 - float(kept.sum() / seen.sum()))
            kept = kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) & head.visible
        else:
            kept = (kept | (head.distance == 0)) & head.visible
            self._sparsities.append(1 - float(kept.sum() / head.visible.sum()))
        return F.scaled_dot_product_attention(operands.q, operands.k, operands.v, kept, scale=operands.scale)


def hash_of(text: str) -> int:
    """A seed that is the same in every process."""
    return int.from_bytes(text.encode(), "little") % (2**31 - 1)


def at(method: Method, setting: Setting, runs: Sequence[SampleRun], t: float) -> Point:
    """A method at a setting of its knob."""
    replacement = Replacement(method, setting, t)
    losses = [loss(run, find_logits(run_with(run, replacement))) for run in runs]
    return Point(t, replacement.sparsity, float(np.exp(mean(losses))))


def loss(run: SampleRun, logits: Tensor) -> float:
    """Mean cross entropy of the second half of a window's tokens: each has at least half a window before it."""
    tokens = next_tokens(run, logits)
    assert tokens is not None, "a language model"
    half = tokens.shape[1] // 2
    return float(F.cross_entropy(logits[0, half:-1].float(), tokens[0, half:]))


class Matcher:
    """Finds the knob of a method at which it leaves out a given share, on one text; earlier points help later ones.

    Args:
        method, setting, runs: what is measured; starts: where to begin, by sparsity: what another text needed, say.
    """

    def __init__(
        self, method: Method, setting: Setting, runs: Sequence[SampleRun], starts: Mapping[float, float] | None = None
    ) -> None:
        self._method, self._setting, self._runs, self._starts = method, setting, runs, dict(starts or {})
        self._points: dict[float, Point] = {}

    def at(self, t: float) -> Point:
        """The method at a setting of its knob."""
        if t not in self._points:
            self._points[t] = at(self._method, self._setting, self._runs, t)
        return self._points[t]

    def matched(self, sparsity: float) -> Point:
        """The point nearest to a sparsity, within :data:`EXACT` of it where the method reaches it."""
        t = self._starts.get(sparsity, sparsity)
        for _ in range(TRIES):
            if abs(self.at(t).sparsity - sparsity) <= EXACT:
                break
            below = max((p for p in self._points.values() if p.sparsity < sparsity), key=lambda p: p.t, default=ALL)
            above = min((p for p in self._points.values() if p.sparsity >= sparsity), key=lambda p: p.t, default=None)
            if above is None:
                if below.t >= 1:  # turned as far as it goes
                    break
                t = 1.0
                continue
            if below.t == 0:  # thresholds of some methods work in the lowest hundredth of the knob
                t = above.t / 4
                continue
            share = (sparsity - below.sparsity) / max(above.sparsity - below.sparsity, 1e-9)
            t = below.t + min(max(share, 0.1), 0.9) * (above.t - below.t)
        return min(self._points.values(), key=lambda point: abs(point.sparsity - sparsity))


ALL = Point(0.0, 0.0, 0.0)
"""Where every knob begins."""
