"""What a sparsity makes of dense attention's time in Llama's shape, predictor included."""

from __future__ import annotations

import torch

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.tuner.clock import timed
from afbs_compile.tuner.measure import LOCAL_KEPT
from afbs_compile.tuner.speed import Stopwatch

HEADS, KV_HEADS, DIM, LENGTH = 32, 8, 128, 32768


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
        everything = self._watch.attention_ms(self._operands, call)
        ms = predictor + (1 - sparsity) * everything
        return {"llama_x": self.dense_ms / ms, "predictor_share": predictor / self.dense_ms}
