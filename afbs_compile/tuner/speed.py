"""Time a site dense and sparse on its own operands, and find the length from which sparse is the faster one."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from afbs_compile.kernels.op import engine_name
from afbs_compile.kernels.policy import predict_mask
from afbs_compile.kernels.predict import predict_blocks
from afbs_compile.kernels.reference import block_count
from afbs_compile.passes.capture import Operands
from afbs_compile.tuner.measure import dense_attention, sparse_attention
from afbs_compile.tuner.space import SitePrecision, Thresholds

if TYPE_CHECKING:
    from afbs_compile.tuner.inputs import BlockShape

Result = TypeVar("Result")

WORTHWHILE = 0.97
"""Sparse must take at most this share of the dense time, so that noise in the timing cannot cost 3 %."""

ROUND_SECONDS = {"cpu": 0.02, "cuda": 0.001}
"""Calls shorter than this are repeated within a round until they fill it."""

ROUNDS = {"cpu": 3, "cuda": 1}
"""Rounds of short calls. Other work disturbs a CPU; an accelerator has none, and is better spent elsewhere."""

ROUNDS_OF_LONG_CALLS = {"cpu": 1, "cuda": 0}
"""Long calls average the noise themselves."""

SHORTEST = 256
"""Tokens from which lengths are tried."""

BEHIND = 1.25
"""A block shape that takes this many times the fastest one's time has lost clearly."""

FEWEST_SITES = 2
"""Sites that must agree before a block shape is no longer explored at others of their kind."""

ALIKE = 0.05
"""Sparsities that differ by less make the same crossover."""

CLEAR = 0.5
"""A sparse call that takes at most this share of a dense time that is known is faster, however noisy the machine is."""


class Stopwatch:
    """What timing one site says about later ones of its kind, so that each thing is timed once in a calibration."""

    def __init__(self) -> None:
        self._attention_ms: dict[Hashable, float] = {}
        self._predictor_ms: dict[Hashable, float] = {}
        self._dense_ms: dict[Hashable, float] = {}
        self._crossovers: dict[Hashable, list[tuple[float, int]]] = {}
        self._shapes: dict[Hashable, list[dict[BlockShape, float]]] = {}

    def dense_and_sparse_ms(
        self,
        sample: Operands,
        thresholds: Thresholds,
        policy: Sequence[str],
        block_q: int,
        block_k: int,
        precision: SitePrecision | None,
    ) -> tuple[float, float]:
        """Milliseconds of dense attention on the sample and of the sparse call, in turns where it is not clear."""
        sparse = sparse_call(sample, thresholds, policy, block_q, block_k, precision)
        key = _kind(sample)
        if key in self._dense_ms:
            (sparse_ms,) = best_ms([sparse])
            if sparse_ms <= CLEAR * self._dense_ms[key]:
                return self._dense_ms[key], sparse_ms
        self._dense_ms[key], sparse_ms = best_ms([lambda: dense_attention(sample), sparse])
        return self._dense_ms[key], sparse_ms

    def attention_ms(
        self, sample: Operands, thresholds: Thresholds, policy: Sequence[str], block_q: int, block_k: int
    ) -> float:
        """Milliseconds of block-sparse attention on the sample if every block were live, at the rate of live ones."""
        key = (_kind(sample), block_q, block_k)
        if key not in self._attention_ms:
            counts = sample.q.new_empty(0)

            def call() -> Tensor:
                nonlocal counts
                out, counts = sparse_attention(sample, thresholds, policy, block_q, block_k)
                return out

            (ms,) = best_ms([call])
            ms -= self.predictor_ms(sample, thresholds.tau, thresholds.theta, policy, block_q, block_k)
            live = float(counts.float().mean()) / block_count(sample.q.shape[2], block_k)
            # Predictor and attention are timed apart, and both are noisy: the difference may come out as nothing.
            self._attention_ms[key] = max(ms, 0.0) / (2 * live if sample.causal else live)
        return self._attention_ms[key]

    def predictor_ms(
        self, sample: Operands, tau: Tensor, theta: Tensor, policy: Sequence[str], block_q: int, block_k: int
    ) -> float:
        """Milliseconds of the predictor on the sample."""
        has_theta = bool((theta >= 0).any())
        key = (_kind(sample), tuple(sorted(set(policy))), has_theta, block_q, block_k)
        if key not in self._predictor_ms:
            call = _predictor_call(sample, tau, theta, policy, block_q, block_k)
            (self._predictor_ms[key],) = best_ms([call])
        return self._predictor_ms[key]

    def contenders(self, sample: Operands, shapes: Sequence[BlockShape]) -> list[BlockShape]:
        """The block shapes that are still worth exploring: those that have not lost clearly at every site so far."""
        sites = self._shapes.get(_kind(sample), [])

        def lost(shape: BlockShape) -> bool:
            behind = [times[shape] > BEHIND * min(times.values()) for times in sites if shape in times]
            return len(behind) >= FEWEST_SITES and all(behind)

        return [shape for shape in shapes if not lost(shape)]

    def learn_shapes(self, sample: Operands, milliseconds: dict[BlockShape, float]) -> None:
        """Remember what a site takes with each of its block shapes."""
        self._shapes.setdefault(_kind(sample), []).append(milliseconds)

    def crossover_bounds(
        self, sample: Operands, sparsity: float, block_q: int, block_k: int, fp8: bool = False
    ) -> tuple[int, int]:
        """Lengths between which the shortest worthwhile one of a site lies, both of them included.

        Sites of this kind that skip less pay no earlier, those that skip more no later. A little is no difference.
        """
        known = self._crossovers.get((_kind(sample), block_q, block_k, fp8), [])
        for other, length in known:
            if 0 <= sparsity - other <= ALIKE:
                return length, length
        latest = min((length for other, length in known if other <= sparsity), default=int(sample.q.shape[2]))
        earliest = max((length for other, length in known if other >= sparsity), default=0)
        return min(earliest, latest), latest

    def learn_crossover(
        self, sample: Operands, sparsity: float, block_q: int, block_k: int, length: int, fp8: bool = False
    ) -> None:
        """Remember a measured crossover."""
        self._crossovers.setdefault((_kind(sample), block_q, block_k, fp8), []).append((sparsity, length))


def _kind(sample: Operands) -> Hashable:
    return (sample.q.device, sample.q.dtype, sample.q.shape, sample.k.shape, sample.causal)


@dataclass(frozen=True)
class SiteSpeed:
    """Milliseconds of one site at its calibrated length, for one input.

    Attributes:
        dense_ms: plain scaled_dot_product_attention; sparse_ms: predictor and block-sparse attention together.
        min_length: shortest length at which sparse was measured to be worthwhile, here or, with what that says about
            this one, at other sites; ``None`` if at none.
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
        sparse_ms: float | None = None,
    ) -> SiteSpeed:
        """Time at the sample's length, then find the shortest of its halvings at which sparse pays, by bisection.

        Args:
            sample: one input.
            thresholds: of the site; policy: a name per head; sparsity: what they skip.
            stopwatch: what earlier sites have shown.
            block_q, block_k: rows per block; precision: of the heads.
            dense_ms, sparse_ms: milliseconds of the dense and of the sparse call, where they are known. The latter's
                call may have been the first one, which compiles: where it was slow, it is timed again.
        """
        length = sample.q.shape[2]
        call = (thresholds, policy, block_q, block_k, precision)
        if dense_ms is None:
            dense_ms, sparse_ms = stopwatch.dense_and_sparse_ms(sample, *call)
        elif sparse_ms is None or sparse_ms > CLEAR * dense_ms:
            sparse_ms = clocked(sparse_call(sample, *call), sample.q.device)[1]()
        if sparse_ms > WORTHWHILE * dense_ms:
            return SiteSpeed(dense_ms, sparse_ms, None)
        fp8 = precision is not None and "fp8" in precision.names
        earliest, latest = stopwatch.crossover_bounds(sample, sparsity, block_q, block_k, fp8)
        halvings = {length >> times for times in range(20) if length >> times >= SHORTEST} | {length}
        lengths = sorted(tried for tried in halvings if earliest <= tried <= latest)

        def worthwhile(tried: int) -> bool:
            dense, sparse = stopwatch.dense_and_sparse_ms(_first_tokens(sample, tried), *call)
            return sparse <= WORTHWHILE * dense

        min_length = lengths[bisect_left(lengths[:-1], True, key=worthwhile)]
        stopwatch.learn_crossover(sample, sparsity, block_q, block_k, min_length, fp8)
        return SiteSpeed(dense_ms, sparse_ms, min_length)


def _first_tokens(sample: Operands, length: int) -> Operands:
    return replace(sample, q=sample.q[:, :, :length], k=sample.k[:, :, :length], v=sample.v[:, :, :length])


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


def _predictor_call(
    sample: Operands, tau: Tensor, theta: Tensor, policy: Sequence[str], block_q: int, block_k: int
) -> Callable[[], Tensor]:
    """The predictor of the sample's engine, ready to be timed."""
    constants = tau.tolist(), theta.tolist()
    call: dict[str, Any] = {
        "policy": policy,
        "causal": sample.causal,
        "scale": sample.scale,
        "block_q": block_q,
        "block_k": block_k,
        "kept": sample.kept,
    }
    if engine_name(sample.q.device) == "triton":
        return lambda: predict_blocks(sample.q, sample.k, *constants, **call).counts
    return lambda: predict_mask(sample.q, sample.k, *constants, **call)


def clocked(call: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], float]]:
    """A call's result, and what gives its milliseconds: nothing waits for an accelerator before that is asked for."""
    if device.type != "cuda":
        began = time.perf_counter()
        result = call()
        ms = (time.perf_counter() - began) * 1e3
        return result, lambda: ms
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = call()
        end.record()

    def elapsed() -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))

    return result, elapsed


def best_ms(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Milliseconds of each call, synchronised on accelerators: the best of rounds in which the calls take turns.

    Other work on the machine only ever adds time, and taking turns lets it hit all calls alike.
    """
    from torch.utils.benchmark import Timer  # looks for compilers as it is imported, and may print what it lacks

    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in calls]
    devices = [call().device.type for call in calls]  # compiles, allocates
    rounds = [[timer.timeit(1).mean for timer in timers]]
    repeats = [
        max(1, round(ROUND_SECONDS.get(device, 0.02) / mean)) for device, mean in zip(devices, rounds[0], strict=True)
    ]
    further = (ROUNDS if max(repeats) > 1 else ROUNDS_OF_LONG_CALLS).get(devices[0], 1)
    rounds += [[timer.timeit(n).mean for timer, n in zip(timers, repeats, strict=True)] for _ in range(further)]
    return [min(times) * 1e3 for times in zip(*rounds, strict=True)]
