"""Time a site dense and sparse on its own operands, and find the length from which sparse is the faster one."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from afbs_compile.passes.capture import Operands
from afbs_compile.tuner.measure import dense_attention, sparse_attention
from afbs_compile.tuner.space import SitePrecision, Thresholds

WORTHWHILE = 0.97
"""Sparse must take at most this share of the dense time, so that noise in the timing cannot cost 3 %."""

ROUNDS = 3
ROUND_SECONDS = {"cpu": 0.02, "cuda": 0.002}
"""Calls shorter than this are repeated within a round until they fill it."""

SHORTEST = 256
"""Tokens from which lengths are tried."""


ALIKE = 0.05
"""Sparsities that differ by less make the same crossover."""


class Stopwatch:
    """What timing one site says about later ones of its kind, so that each thing is timed once in a calibration."""

    def __init__(self) -> None:
        self._block_ms: dict[Hashable, float] = {}
        self._crossovers: dict[Hashable, list[tuple[float, int]]] = {}

    def block_ms(
        self, sample: Operands, thresholds: Thresholds, policy: Sequence[str], block_q: int, block_k: int
    ) -> float:
        """Milliseconds of a sparse call on the sample per (query, key) pair of its live blocks."""
        key = (_kind(sample), tuple(sorted(set(policy))), block_q, block_k)
        if key not in self._block_ms:
            _, counts = sparse_attention(sample, thresholds, policy, block_q, block_k)
            (ms,) = best_ms([sparse_call(sample, thresholds, policy, block_q, block_k)])
            self._block_ms[key] = ms / (float(counts.sum()) * block_q * block_k)
        return self._block_ms[key]

    def known_crossover(self, sample: Operands, sparsity: float, block_q: int, block_k: int) -> int | None:
        """Shortest worthwhile length that a site of this kind has shown with as much sparsity, or a little less."""
        known = self._crossovers.get((_kind(sample), block_q, block_k), [])
        return min((length for other, length in known if 0 <= sparsity - other <= ALIKE), default=None)

    def learn_crossover(self, sample: Operands, sparsity: float, block_q: int, block_k: int, length: int) -> None:
        """Remember a measured crossover."""
        self._crossovers.setdefault((_kind(sample), block_q, block_k), []).append((sparsity, length))


def _kind(sample: Operands) -> Hashable:
    return (sample.q.device, sample.q.dtype, sample.q.shape, sample.k.shape, sample.causal)


@dataclass(frozen=True)
class SiteSpeed:
    """Milliseconds of one site at its calibrated length, for one input.

    Attributes:
        dense_ms: plain scaled_dot_product_attention; sparse_ms: predictor and block-sparse attention together.
        min_length: shortest length at which sparse was measured to be worthwhile; ``None`` if at none.
    """

    dense_ms: float
    sparse_ms: float
    min_length: int | None

    @staticmethod
    def measure(
        sample: Operands,
        thresholds: Thresholds,
        policy: Sequence[str],
        sparsity: float,
        stopwatch: Stopwatch,
        *,
        block_q: int,
        block_k: int,
        precision: SitePrecision | None = None,
        dense_ms: float | None = None,
    ) -> SiteSpeed:
        """Time at the sample's length, then at shorter ones, from the shortest up until sparse pays.

        Args:
            sample: one input.
            thresholds: of the site; policy: a name per head; sparsity: what they skip.
            stopwatch: what earlier sites have shown.
            block_q, block_k: rows per block; precision: of the heads.
            dense_ms: milliseconds of the dense call, where they are known.
        """
        length = sample.q.shape[2]
        call = (thresholds, policy, block_q, block_k, precision)
        if dense_ms is None:
            dense_ms, sparse_ms = _times(sample, *call)
        else:
            _, sparse_ms = timed(sparse_call(sample, *call))  # it has run before
        if sparse_ms > WORTHWHILE * dense_ms:
            return SiteSpeed(dense_ms, sparse_ms, None)
        known = stopwatch.known_crossover(sample, sparsity, block_q, block_k)
        if known is not None:
            return SiteSpeed(dense_ms, sparse_ms, known)
        shorter = [length >> halvings for halvings in range(1, 20) if length >> halvings >= SHORTEST]
        min_length = length
        for tried in reversed(shorter):
            dense, sparse = _times(_first_tokens(sample, tried), *call)
            if sparse <= WORTHWHILE * dense:
                min_length = tried
                break
        stopwatch.learn_crossover(sample, sparsity, block_q, block_k, min_length)
        return SiteSpeed(dense_ms, sparse_ms, min_length)


def _first_tokens(sample: Operands, length: int) -> Operands:
    return replace(sample, q=sample.q[:, :, :length], k=sample.k[:, :, :length], v=sample.v[:, :, :length])


def _times(
    sample: Operands,
    thresholds: Thresholds,
    policy: Sequence[str],
    block_q: int,
    block_k: int,
    precision: SitePrecision | None,
) -> tuple[float, float]:
    dense, sparse = best_ms(
        [lambda: dense_attention(sample), sparse_call(sample, thresholds, policy, block_q, block_k, precision)]
    )
    return dense, sparse


def sparse_call(
    sample: Operands,
    thresholds: Thresholds,
    policy: Sequence[str],
    block_q: int,
    block_k: int,
    precision: SitePrecision | None = None,
) -> Callable[[], Tensor]:
    """Predictor and block-sparse attention on a sample, ready to be timed."""
    return lambda: sparse_attention(sample, thresholds, policy, block_q, block_k, precision)[0]


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """A call's result and its milliseconds, synchronised on accelerators."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = call()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result, (time.perf_counter() - began) * 1e3


def best_ms(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Milliseconds of each call, synchronised on accelerators: the best of rounds in which the calls take turns.

    Other work on the machine only ever adds time, and taking turns lets it hit all calls alike.
    """
    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in calls]
    devices = [call().device.type for call in calls]  # compiles, allocates
    rounds = [[timer.timeit(1).mean for timer in timers]]
    repeats = [
        max(1, round(ROUND_SECONDS.get(device, 0.02) / mean)) for device, mean in zip(devices, rounds[0], strict=True)
    ]
    # Long calls average the noise themselves, and an accelerator has none: fewer rounds will do.
    further = ROUNDS if max(repeats) > 1 else 0 if set(devices) == {"cuda"} else 1
    rounds += [[timer.timeit(n).mean for timer, n in zip(timers, repeats, strict=True)] for _ in range(further)]
    return [min(times) * 1e3 for times in zip(*rounds, strict=True)]
