"""Time a site dense and sparse on its own operands, and find the length from which sparse is the faster one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.attend.engines import engines_on
from afbs_compile.kernels.attend.machine import clocked, is_shared
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.operands import Operands
from afbs_compile.peers import Peers
from afbs_compile.tuner.clock import is_busy, timed
from afbs_compile.tuner.measure import visible_count
from afbs_compile.tuner.rates import Rates, Work

WORTHWHILE = 0.97
"""Sparse must take at most this share of the dense time, so that noise in the timing cannot cost 3 %."""

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


class Pair(NamedTuple):
    """A dense and a sparse call timed together; ``busy`` as in :class:`afbs_compile.tuner.clock.Times`."""

    dense_ms: float
    sparse_ms: float
    busy: bool


class Stopwatch:
    """What timing one site says about later ones of its kind, so that each thing is timed once in a calibration.

    Args:
        peers: processes that have other heads of the same sites: the slowest one decides for all.

    On a quiet machine it learns what kernels take there; on a busy one that is what counts, where it is known.
    """

    def __init__(self, peers: Peers | None = None) -> None:
        self.peers = peers or Peers()
        self._rates: dict[torch.device, Rates] = {}
        self._crowded: dict[torch.device, bool] = {}
        self._attention_ms: dict[Hashable, float] = {}
        self._predictor_ms: dict[Hashable, float] = {}
        self._dense_ms: dict[Hashable, float] = {}
        self._crossovers: dict[Hashable, list[tuple[float, int]]] = {}
        self._shapes: dict[Hashable, list[dict[BlockShape, float]]] = {}

    def is_crowded(self, device: torch.device, *, now: bool = False) -> bool:
        """Whether other processes use a GPU, as it was when that was first asked, or ``now``."""
        if now or device not in self._crowded:
            self._crowded[device] = not is_shared(device) and is_busy(device)
        return self._crowded[device]

    def rates(self, device: torch.device) -> Rates:
        """What is known of a device."""
        if device not in self._rates:
            self._rates[device] = Rates.of(device)
        return self._rates[device]

    def remember(self) -> None:
        """Leave to later calibrations what this one learnt of the machine."""
        for rates in self._rates.values():
            rates.save()

    def dense_and_sparse_ms(self, sample: Operands, call: SparseCall, sparsity: float) -> Pair:
        """Milliseconds of dense attention on the sample and of the sparse call, in turns where it is not clear.

        Args:
            sample: one input; call: of the site; sparsity: what it skips.
        """
        pair = self._pair(sample, call)
        if not pair.busy:
            self.rates(sample.device).learn(_of_dense(sample), pair.dense_ms)
            return pair
        return self._known_pair(sample, call, sparsity) or pair

    def _pair(self, sample: Operands, call: SparseCall) -> Pair:
        sparse, crowded = sparse_call(sample, call), self.is_crowded(sample.device)
        key = _kind(sample)
        if key in self._dense_ms:
            found = timed([sparse], crowded=crowded)
            (sparse_ms,) = found.ms
            if sparse_ms <= CLEAR * self._dense_ms[key]:
                return Pair(self._dense_ms[key], sparse_ms, found.busy)
        found = timed([lambda: dense_attention(sample), sparse], crowded=crowded)
        self._dense_ms[key], sparse_ms = found.ms
        return Pair(self._dense_ms[key], sparse_ms, found.busy)

    def _known_pair(self, sample: Operands, call: SparseCall, sparsity: float) -> Pair | None:
        """Of a quiet machine, where all three kernels are known."""
        rates = self.rates(sample.device)
        works = (_of_dense(sample), _of_attention(sample, call), _of_predictor(sample, call))
        dense, attention, predictor = map(rates.ms, works)
        if dense is None or attention is None or predictor is None:
            return None
        return Pair(dense, (1 - sparsity) * attention + predictor, busy=True)

    def _settled(self, work: Work, ms: float, *, busy: bool, device: torch.device) -> float:
        """A kernel's milliseconds: as measured on a quiet machine, which learns it; on a busy one as known."""
        rates = self.rates(device)
        if busy:
            known = rates.ms(work)
            return ms if known is None else known
        rates.learn(work, ms)
        return ms

    def attention_ms(self, sample: Operands, call: SparseCall) -> float:
        """Milliseconds of block-sparse attention on the sample if every block were live, at the rate of live ones."""
        key = (_kind(sample), call.shape)
        if key not in self._attention_ms:
            counts = sample.q.new_empty(0)

            def attended() -> Tensor:
                nonlocal counts
                out, counts = run(sample, call)
                return out

            found = timed([attended], crowded=self.is_crowded(sample.device))
            ms = found.ms[0] - self.predictor_ms(sample, call)
            live = float(counts.float().sum(-1).mean()) / visible_count(sample, call.shape)
            # Predictor and attention are timed apart, and both are noisy: the difference may come out as nothing.
            ms, work = max(ms, 0.0) / live, _of_attention(sample, call)
            self._attention_ms[key] = self._settled(work, ms, busy=found.busy, device=sample.device)
        return self._attention_ms[key]

    def predictor_ms(self, sample: Operands, call: SparseCall) -> float:
        """Milliseconds of the predictor on the sample."""
        has_theta = any(theta >= 0 for theta in call.theta)
        key = (_kind(sample), tuple(sorted(set(call.policy))), has_theta, call.shape)
        if key not in self._predictor_ms:
            engine = engines_on(sample.device)[0]
            found = timed([lambda: engine.select(sample, call).whole], crowded=self.is_crowded(sample.device))
            (ms,), work = found.ms, _of_predictor(sample, call)
            self._predictor_ms[key] = self._settled(work, ms, busy=found.busy, device=sample.device)
        return self._predictor_ms[key]

    def contenders(self, sample: Operands, shapes: Sequence[BlockShape]) -> list[BlockShape]:
        """The block shapes that are still worth exploring: those that have not lost clearly at every site so far."""
        sites = self._shapes.get(_kind(sample), [])

        def lost(shape: BlockShape) -> bool:
            behind = [times[shape] > BEHIND * min(times.values()) for times in sites if shape in times]
            return len(behind) >= FEWEST_SITES and all(behind)

        return [shape for shape in shapes if not lost(shape)]

    def slowest_shapes(self, milliseconds: dict[BlockShape, float]) -> dict[BlockShape, float]:
        """What a site takes with each of its block shapes in the process that takes longest."""
        slowest: dict[BlockShape, float] = {}
        for mine in self.peers.gathered(milliseconds):
            slowest.update((shape, max(ms, slowest.get(shape, 0.0))) for shape, ms in mine.items())
        return slowest

    def slowest_speed(self, speed: SiteSpeed | None) -> SiteSpeed | None:
        """A site's speed where all processes have timed their heads; ``None`` of those whose heads are all DENSE."""
        all_timed = [mine for mine in self.peers.gathered(speed) if mine is not None]
        if not all_timed:
            return None
        lengths = [mine.min_length for mine in all_timed if mine.min_length is not None]
        return SiteSpeed(
            max(mine.dense_ms for mine in all_timed),
            max(mine.sparse_ms for mine in all_timed),
            max(lengths) if len(lengths) == len(all_timed) else None,
            any(mine.busy for mine in all_timed),
        )

    def learn_shapes(self, sample: Operands, milliseconds: dict[BlockShape, float]) -> None:
        """Remember what a site takes with each of its block shapes."""
        self._shapes.setdefault(_kind(sample), []).append(milliseconds)

    def crossover_bounds(self, sample: Operands, call: SparseCall, sparsity: float) -> tuple[int, int]:
        """Lengths between which the shortest worthwhile one of a site lies, both of them included.

        Sites of this kind that skip less pay no earlier, those that skip more no later. A little is no difference.
        """
        known = self._crossovers.get(_crossover_key(sample, call), [])
        for other, length in known:
            if abs(other - sparsity) <= ALIKE:
                return length, length
        latest = min((length for other, length in known if other <= sparsity), default=side(sample))
        earliest = max((length for other, length in known if other >= sparsity), default=0)
        return min(earliest, latest), latest

    def learn_crossover(self, sample: Operands, call: SparseCall, sparsity: float, length: int) -> None:
        """Remember a measured crossover."""
        self._crossovers.setdefault(_crossover_key(sample, call), []).append((sparsity, length))


def _crossover_key(sample: Operands, call: SparseCall) -> Hashable:
    return _kind(sample), call.shape, "fp8" in call.precision


def side(sample: Operands) -> int:
    """The length of self-attention with as many (row, key) pairs."""
    return isqrt(sample.q_len * sample.k_len)


def _kind(sample: Operands) -> Hashable:
    given = sample.attn_mask
    extras = (sample.valid is None, None if given is None else (given.dtype, given.shape), sample.softcap)
    shapes = (sample.q.shape, sample.k.shape, sample.v.shape)
    return (sample.device, sample.q.dtype, *shapes, sample.mask, *extras, sample.sinks is None)


def _kernel(what: str, sample: Operands) -> str:
    """Name of a kernel: calls of one name differ in how many tokens they have, and in nothing else that counts."""
    extras = [name for name in ("valid", "attn_mask", "sinks") if getattr(sample, name) is not None]
    shape = f"{sample.heads} heads of {sample.q.shape[-1]} and {sample.v.shape[-1]}, {sample.groups} a key head"
    return f"{what}, {sample.q.dtype}, {shape}, {sample.mask!r}, {extras}, cap {bool(sample.softcap)}"


def _of_dense(sample: Operands) -> Work:
    """Pairs of a row and a key."""
    return Work(_kernel("dense", sample), sample.q.shape[0] * sample.heads * sample.q_len * sample.k_len)


def _of_attention(sample: Operands, call: SparseCall) -> Work:
    """Such pairs in blocks, if every block were live."""
    what = f"attention {call.shape} {'fp8' if 'fp8' in call.precision else 'own'}"
    return Work(_kernel(what, sample), _blocks(sample, call) * call.shape.q * call.shape.k)


def _of_predictor(sample: Operands, call: SparseCall) -> Work:
    """Blocks."""
    what = f"predictor {call.shape} {sorted(set(call.policy))} {any(theta >= 0 for theta in call.theta)}"
    return Work(_kernel(what, sample), _blocks(sample, call))


def _blocks(sample: Operands, call: SparseCall) -> float:
    return sample.q.shape[0] * sample.heads * visible_count(sample, call.shape)


@dataclass(frozen=True)
class SiteSpeed:
    """Milliseconds of one site at its calibrated length, for one input.

    Attributes:
        dense_ms: plain scaled_dot_product_attention; sparse_ms: predictor and block-sparse attention together.
        min_length: shortest length at which sparse was measured to be worthwhile, here or, with what that says about
            this one, at other sites; ``None`` if at none.
        busy: whether the machine had other work: both are CPU times, or those of a GPU that others use too.
    """

    dense_ms: float
    sparse_ms: float
    min_length: int | None
    busy: bool = False

    @property
    def is_unsure(self) -> bool:
        """Whether a quiet machine could show another one of the two to be the faster one."""
        return self.busy and CLEAR * self.dense_ms < self.sparse_ms < self.dense_ms / CLEAR

    @staticmethod
    def measure(
        sample: Operands,
        call: SparseCall,
        sparsity: float,
        stopwatch: Stopwatch,
        *,
        dense_ms: float | None = None,
        sparse_ms: float | None = None,
    ) -> SiteSpeed:
        """Time at the sample's length, then find the shortest of its halvings at which sparse pays, by bisection.

        A length is the :func:`side` of a square: what counts is rows times keys.

        Args:
            sample: one input.
            call: of the site; sparsity: what it skips.
            stopwatch: what earlier sites have shown.
            dense_ms, sparse_ms: milliseconds of the dense and of the sparse call, where they are known. The latter's
                call may have been the first one, which compiles: where it was slow, it is timed again.
        """
        rows, busy = sample.q_len, False
        if stopwatch.is_crowded(sample.device, now=True) or dense_ms is None:
            dense_ms, sparse_ms, busy = stopwatch.dense_and_sparse_ms(sample, call, sparsity)
        elif sparse_ms is None or sparse_ms > CLEAR * dense_ms:
            sparse_ms = clocked(sparse_call(sample, call), sample.device)[1]()
        if sparse_ms > WORTHWHILE * dense_ms:
            return SiteSpeed(dense_ms, sparse_ms, None, busy)
        earliest, latest = stopwatch.crossover_bounds(sample, call, sparsity)
        halvings = {rows >> times for times in range(20) if rows >> times >= SHORTEST} | {rows}
        shorter = {side(part): part for part in (sample.first_rows(tried) for tried in halvings)}
        lengths = sorted(length for length in shorter if earliest <= length <= latest)

        def worthwhile(length: int) -> bool:
            dense, sparse, _ = stopwatch.dense_and_sparse_ms(shorter[length], call, sparsity)
            return sparse <= WORTHWHILE * dense

        min_length = lengths[bisect_left(lengths[:-1], True, key=worthwhile)]
        stopwatch.learn_crossover(sample, call, sparsity, min_length)
        return SiteSpeed(dense_ms, sparse_ms, min_length, busy)


def sparse_call(sample: Operands, call: SparseCall) -> Callable[[], Tensor]:
    """Predictor and block-sparse attention on a sample, ready to be timed."""
    return lambda: run(sample, call)[0]
