"""What a sparsity makes of dense attention's time in Llama's shape, predictor included."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from afbs_compile.kernels.attend.engines import engine_of
from afbs_compile.kernels.blocks import BlockShape, lists_of
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.kernels.sight import resolved, sight_of
from afbs_compile.kernels.spec.selection import kept_blocks
from afbs_compile.tuner.clock import timed
from afbs_compile.tuner.measure import LOCAL_KEPT
from afbs_compile.tuner.speed import Stopwatch

HEADS, KV_HEADS, DIM, LENGTH = 32, 8, 128, 32768

LIVE = 0.15
"""Share of the blocks, at random in every row, that the rate of live blocks is measured with, beside those near it."""


class LlamaTime:
    """Times dense attention, predictors and live blocks once each, on random operands in bf16."""

    def __init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, LENGTH, DIM, device="cuda", dtype=torch.bfloat16, generator=generator)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        self._operands = Operands(q, k, v, mask_of("causal"), DIM**-0.5)
        self._watch = Stopwatch()
        (self.dense_ms,) = timed([lambda: dense_attention(self._operands)]).ms

    def of(self, sparsity: float, policy: str, shape: BlockShape) -> dict[str, float]:
        """Times dense attention's speed, and the predictor's share of dense attention's time."""
        tau = 0.9 if POLICIES[policy].rule == "mass" else 0.98
        call = SparseCall.uniform(HEADS, tau, policy=policy, shape=shape, kept=LOCAL_KEPT)
        predictor = self._watch.predictor_ms(self._operands, call)
        ms = predictor + (1 - sparsity) * self._everything_ms(shape)
        return {"llama_x": self.dense_ms / ms, "predictor_share": predictor / self.dense_ms}

    @functools.cache  # noqa: B019 (one object lives as long as the program)
    def _everything_ms(self, shape: BlockShape) -> float:
        """Milliseconds that all visible blocks would take, at the rate of live ones.

        What is live is drawn: no threshold gives random operands lists like those of a text.
        """
        operands, call = self._operands, SparseCall.uniform(HEADS, 0.5, shape=shape)
        sight = sight_of(resolved(operands), shape)
        near = kept_blocks(operands, shape, LOCAL_KEPT)
        generator = torch.Generator("cuda").manual_seed(1)
        drawn = torch.rand(1, HEADS // shape.heads, *near.shape[2:], device="cuda", generator=generator) < LIVE
        live = (drawn.repeat_interleave(shape.heads, 1) | near) & sight.visible
        lists, out = lists_of(live, sight.whole), empty_output(operands.q, operands.v)
        engine, _ = engine_of(operands, call)

        def attended() -> Tensor:
            engine.attend(operands, call, lists, out)
            return out

        (ms,) = timed([attended]).ms
        return ms * float(sight.visible.sum() * HEADS / live.sum())
