"""Time a site dense and sparse on its own operands, and find the length from which sparse is the faster one."""

from __future__ import annotations

from collections.abc import Callable
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

MIN_RUN_SECONDS = 0.2


@dataclass(frozen=True)
class SiteSpeed:
    """Median milliseconds of one site at its calibrated length.

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
    return median_ms(lambda: dense_attention(sample)), sparse_ms(sample, thresholds, block_q, block_k)


def sparse_ms(sample: Operands, thresholds: Thresholds, block_q: int, block_k: int) -> float:
    """Median milliseconds of predictor and block-sparse attention together."""
    constants = thresholds.tau.tolist(), thresholds.theta.tolist(), thresholds.lam.tolist()
    shape = {"causal": sample.causal, "scale": sample.scale, "block_q": block_q, "block_k": block_k}
    return median_ms(lambda: sparse_attention_with_counts(sample.q, sample.k, sample.v, *constants, **shape)[0])


def median_ms(call: Callable[[], Tensor]) -> float:
    """Median wall-clock milliseconds of a call, synchronised on accelerators, after one call to warm up."""
    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=MIN_RUN_SECONDS).median * 1e3
