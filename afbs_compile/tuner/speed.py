"""Time a site dense and sparse on its own operands, and find the length from which sparse is the faster one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from afbs_compile.kernels.op import sparse_attention_with_counts
from afbs_compile.passes.capture import Operands
from afbs_compile.tuner.measure import dense_attention
from afbs_compile.tuner.space import Thresholds

WORTHWHILE = 0.97
"""Sparse must take at most this share of the dense time, so that noise in the timing cannot cost 3 %."""

ROUNDS = 3
ROUND_SECONDS = 0.02
"""Calls shorter than this are repeated within a round until they fill it."""


@dataclass(frozen=True)
class SiteSpeed:
    """Milliseconds of one site at its calibrated length.

    Attributes:
        dense_ms: plain scaled_dot_product_attention; sparse_ms: predictor and block-sparse attention together.
        min_length: shortest length at which sparse was measured to be worthwhile; ``None`` if at none.
    """

    dense_ms: float
    sparse_ms: float
    min_length: int | None

    @staticmethod
    def measure(sample: Operands, thresholds: Thresholds, *, block_q: int, block_k: int) -> SiteSpeed:
        """Time at the sample's length, then at halves of it until sparse no longer pays."""
        length, min_length = sample.q.shape[2], None
        dense, sparse = first = _times(sample, thresholds, block_q, block_k)
        while sparse <= WORTHWHILE * dense:
            min_length, length = length, length // 2
            if length < 2 * block_q:
                break
            dense, sparse = _times(_first_tokens(sample, length), thresholds, block_q, block_k)
        return SiteSpeed(*first, min_length)


def _first_tokens(sample: Operands, length: int) -> Operands:
    return replace(sample, q=sample.q[:, :, :length], k=sample.k[:, :, :length], v=sample.v[:, :, :length])


def _times(sample: Operands, thresholds: Thresholds, block_q: int, block_k: int) -> tuple[float, float]:
    dense, sparse = best_ms([lambda: dense_attention(sample), sparse_call(sample, thresholds, block_q, block_k)])
    return dense, sparse


def sparse_call(sample: Operands, thresholds: Thresholds, block_q: int, block_k: int) -> Callable[[], Tensor]:
    """Predictor and block-sparse attention on a sample, ready to be timed."""
    constants = thresholds.tau.tolist(), thresholds.theta.tolist(), thresholds.lam.tolist()

    def call() -> Tensor:
        return sparse_attention_with_counts(
            sample.q,
            sample.k,
            sample.v,
            *constants,
            causal=sample.causal,
            scale=sample.scale,
            block_q=block_q,
            block_k=block_k,
        )[0]

    return call


def best_ms(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Milliseconds of each call, synchronised on accelerators: the best of rounds in which the calls take turns.

    Other work on the machine only ever adds time, and taking turns lets it hit all calls alike.
    """
    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in calls]
    repeats = []
    for call, timer in zip(calls, timers, strict=True):
        call()  # compiles, allocates
        repeats.append(max(1, round(ROUND_SECONDS / timer.timeit(1).mean)))
    rounds = [[timer.timeit(n).mean for timer, n in zip(timers, repeats, strict=True)] for _ in range(ROUNDS)]
    return [min(times) * 1e3 for times in zip(*rounds, strict=True)]
