"""Attention under a selection for ``candidates.py``: blocks by a threshold, and what a model is given to run it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from candidate_scores import Inputs, Score
from torch import Tensor


@dataclass
class Select:
    """Attention of one layer under a selection; counts what it skips.

    Attributes:
        score: of blocks; threshold: of strength, of all heads; weights: ``[layers, H or 1]``, what divides it.
        exponent: of the number of visible blocks; mass: whether the smallest set is kept that holds 1 - threshold.
        group: neighbouring heads with one selection, by the mean of their mass or (``union``) the largest.
        local_keys: before a query block, and last_rows: of the input, that are kept whatever their strength.
        value, corrected: see ``candidates.py``.
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
    union: bool = False
    corrected: bool = False
    local_keys: int = 128
    last_rows: int = 64

    def __post_init__(self) -> None:
        self.skipped: list[float] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``[H, N, D]`` each."""
        inputs = Inputs(layer, q, k, scale, self.block_q, self.block_k)
        visible = inputs.visible()
        live = self._live(inputs, v, visible)
        kept = int(live.sum())
        self.skipped.append(1 - kept / (int(visible.sum()) * len(live)))
        if self.skipped[-1] == 0:  # dense to the last bit, by the kernel that dense runs take
            return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]
        seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        return torch.stack([self._head(q[h], k[h], v[h], live[h], visible, seen, scale) for h in range(len(q))])

    def _live(self, inputs: Inputs, v: Tensor, visible: Tensor) -> Tensor:
        p = self.score(inputs)
        first_q, first_k = inputs.first()
        near = first_k + self.block_k + self.local_keys > first_q
        near[(v.shape[1] - self.last_rows) // self.block_q :] = True
        if self.value:
            mean = v.float().unflatten(1, (-1, self.block_k)).mean(2)
            out = p @ mean
            p = p * torch.cdist(out, mean) / out.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        if self.group > 1:
            heads = p.unflatten(0, (-1, self.group))
            p = (heads.amax(1) if self.union else heads.mean(1)).repeat_interleave(self.group, 0)
        threshold = (
            self.threshold if self.weights is None else self.threshold / self.weights[inputs.layer, :, None, None]
        )
        if self.mass:
            ordered, place = p.masked_fill(~visible, 0).sort(-1, descending=True)
            needed = ordered.cumsum(-1) - ordered < 1 - threshold
            live = torch.zeros_like(visible.expand_as(p)).scatter(-1, place, needed)
        else:
            live = p * visible.sum(-1, keepdim=True) ** self.exponent >= threshold
        return (live | near) & visible

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
        self.watch: Callable[[Inputs], None] | None = None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        """Transformers' attention interface."""
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        if self.watch is not None:
            self.watch(Inputs(module.layer_idx, query[0], key[0], scaling))
        if self.select is None:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        else:
            out = self.select(module.layer_idx, query[0], key[0], value[0], scaling)[None]
        if self.outputs is not None:
            out.retain_grad()
            self.outputs.append(out)
        return out.transpose(1, 2).contiguous(), None
