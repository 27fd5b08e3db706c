"""What a sparsity makes of dense attention's time in Llama's shape, predictor included."""

from __future__ import annotations

import functools

import torch

from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.tuner.clock import timed
from afbs_compile.tuner.measure import LOCAL_KEPT, sparsity_of
from afbs_compile.tuner.speed import Stopwatch

HEADS, KV_HEADS, DIM, LENGTH = 32, 8, 128, 32768

SPARSITY, CLOSE, STEPS = 0.85, 0.03, 20
"""The rate of live blocks is measured at about this sparsity; where next to nothing is live, tiles cost the most."""


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
        call = self._call(policy, shape)
        predictor = self._watch.predictor_ms(self._operands, call)
        everything = self._watch.attention_ms(self._operands, call)
        ms = predictor + (1 - sparsity) * everything
        return {"llama_x": self.dense_ms / ms, "predictor_share": predictor / self.dense_ms}

    @functools.cache  # noqa: B019 (one object lives as long as the program)
    def _call(self, policy: str, shape: BlockShape) -> SparseCall:
        """A call that skips about :data:`SPARSITY` of the random operands' blocks."""
        low, high = 0.0, 1.0  # of 1 - tau, which more is skipped with
        for _ in range(STEPS):
            tau = 1 - (low + high) / 2
            call = SparseCall.uniform(HEADS, tau, policy=policy, shape=shape, kept=LOCAL_KEPT)
            found = float(sparsity_of(self._operands, shape, run(self._operands, call)[1]).mean())
            if abs(found - SPARSITY) < CLOSE:
                break
            low, high = ((low + high) / 2, high) if found < SPARSITY else (low, (low + high) / 2)
        return call
