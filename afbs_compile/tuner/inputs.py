"""The inputs of one site: their dense outputs, and passes over them that measure many thresholds at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.one_pass import PassSums, one_pass
from afbs_compile.kernels.policy import heads_of
from afbs_compile.kernels.reference import block_count, first_whole_block
from afbs_compile.passes.capture import Operands
from afbs_compile.tuner.measure import WINDOWS, dense_attention
from afbs_compile.tuner.speed import clocked

PREFIXES = (4, 2)
"""A causal input of N tokens is an input of N / 4 and of N / 2 tokens as well: its first rows see nothing later. Only
the last of these rows, which a shorter input keeps whole, are not whole in the longer one."""

FEWEST_BLOCKS = 4
"""Shorter prefixes have little to skip and say little."""


class BlockShape(NamedTuple):
    """Rows per block of queries and of keys."""

    block_q: int
    block_k: int


@dataclass(frozen=True)
class InputCurve:
    """What one input measures at ``P`` thresholds of each head.

    Attributes:
        error: fp32 ``[pieces, H, P]`` relative L1 (Eq. 1), of the whole input or, where it is the only one, of its
            disjoint windows of queries; overall: ``[H, P]``, of the whole input.
        prefixes: ``[H, P]`` by length, for the causal prefixes of the input.
        sparsity: fp32 ``[H, P]``, ``1 - live / causally valid blocks``.
    """

    error: Tensor
    overall: Tensor
    prefixes: dict[int, Tensor]
    sparsity: Tensor

    def cpu(self) -> InputCurve:
        """The same, on the CPU."""
        prefixes = {length: error.cpu() for length, error in self.prefixes.items()}
        return InputCurve(self.error.cpu(), self.overall.cpu(), prefixes, self.sparsity.cpu())

    def at(self, index: Tensor) -> InputCurve:
        """The curve at some of its points, ``[H, p]`` for each head."""

        def chosen(values: Tensor) -> Tensor:
            return values.gather(-1, index.expand(*values.shape[:-1], -1))

        prefixes = {length: chosen(error) for length, error in self.prefixes.items()}
        return InputCurve(chosen(self.error), chosen(self.overall), prefixes, chosen(self.sparsity))


class Inputs:
    """The batch elements of all samples of one site.

    Args:
        samples: operands in canonical form, all with the same heads.

    Attributes:
        elements: one input each, batch size 1.
        windows: pieces that an input is split into: :data:`WINDOWS` where it is the only one.
        first: the input to explore on, the longest one.
    """

    def __init__(self, samples: Sequence[Operands]) -> None:
        self.elements = [
            replace(sample, q=sample.q[i : i + 1], k=sample.k[i : i + 1], v=sample.v[i : i + 1])
            for sample in samples
            for i in range(sample.q.shape[0])
        ]
        self.windows = WINDOWS if len(self.elements) == 1 else 1
        lengths = [int(element.q.shape[2]) for element in self.elements]
        self.length = max(lengths)
        self.first = lengths.index(self.length)
        self._work: list[Tensor | float] = []
        self._clocks: list[Callable[[], float]] = []
        self._dense: dict[int, Tensor] = {}

    @property
    def heads(self) -> int:
        """Query heads of the site."""
        return int(self.elements[0].q.shape[1])

    @property
    def evaluations(self) -> float:
        """Attention work so far, in dense attention calls over an input of full length."""
        return sum(map(float, self._work))

    @property
    def dense_ms(self) -> float | None:
        """Milliseconds of the fastest dense call at full length; ``None`` after only one, which may have compiled."""
        return min(clock() for clock in self._clocks) if len(self._clocks) > 1 else None

    def spend(self, work: Tensor | float) -> None:
        """Count attention work; a tensor is not waited for."""
        self._work.append(work)

    def cost(self, index: int) -> float:
        """A dense call on an input, as a share of one at full length."""
        return float(self.elements[index].q.shape[2] / self.length) ** 2

    def dense(self, index: int) -> Tensor:
        """Dense output ``[1, H, N, D]`` of an input, computed once."""
        if index not in self._dense:
            element = self.elements[index]
            self._dense[index], clock = clocked(lambda: dense_attention(element), element.q.device)
            self.spend(self.cost(index))
            if self.cost(index) == 1:
                self._clocks.append(clock)
        return self._dense[index]

    def sums(
        self,
        index: int,
        tau: Tensor,
        theta: Tensor,
        policy: Sequence[str],
        shape: BlockShape,
        *,
        heads: Tensor | None = None,
        rows: tuple[int, ...] | None = None,
    ) -> PassSums:
        """One pass over an input.

        Args:
            index: of the input.
            tau: ``[h, P]``, ascending; theta: ``[h]``; policy: a name for each of the h heads.
            shape: rows per block.
            heads: int64 ``[h]``, the query heads to measure, all by default.
            rows: query blocks to measure, all by default.
        """
        element, dense = self.elements[index], self.dense(index)
        q, k, v, out = element.q[0], element.k[0], element.v[0], dense[0]
        call: dict[str, Any] = {
            "rows": rows,
            "causal": element.causal,
            "scale": element.scale,
            "kept": element.kept,
            **shape._asdict(),
        }
        wanted = torch.arange(self.heads) if heads is None else heads
        parts, places = [], []
        for name, mine in heads_of(policy).items():
            if len(mine) == self.heads:
                parts.append(one_pass(q, k, v, out, tau, theta, policy=name, **call))
                break
            some = wanted[mine].to(q.device, non_blocking=True)
            kv = some // (q.shape[0] // k.shape[0])
            operands = q[some], k[kv], v[kv], out[some]
            parts.append(one_pass(*operands, tau[mine], theta[mine], policy=name, **call))
            places += mine
        found = parts[0]
        if len(parts) > 1:
            back = torch.tensor(places).argsort().to(q.device, non_blocking=True)
            difference, magnitude, live = (torch.cat(x)[back] for x in list(zip(*parts, strict=True))[:3])
            found = PassSums(difference, magnitude, live, found.visible)
        # Blocks that the largest tau keeps were visited, of all that dense attention visits over all rows and heads.
        length = element.q.shape[2]
        everything = self.heads * block_count(length, shape.block_q) * block_count(length, shape.block_k)
        each = self.cost(index) / (everything / 2 if element.causal else everything)
        self.spend(found.live[..., -1].sum() * each)
        return found

    def curve(
        self,
        index: int,
        tau: Tensor,
        theta: Tensor,
        policy: Sequence[str],
        shape: BlockShape,
        *,
        heads: Tensor | None = None,
    ) -> InputCurve:
        """Error and sparsity of every threshold on all rows of an input, on its device. Arguments: see :meth:`sums`."""
        sums = self.sums(index, tau, theta, policy, shape, heads=heads)
        element = self.elements[index]
        length, blocks = int(element.q.shape[2]), sums.magnitude.shape[1]
        edges = [blocks * i // self.windows for i in range(self.windows + 1)]
        pieces = [_error(sums, a, b) for a, b in itertools.pairwise(edges) if b > a]
        counts = [length // share // shape.block_q for share in PREFIXES] if element.causal else []
        prefixes = {
            count * shape.block_q: _error(
                sums, 0, count, first_whole_block(count * shape.block_q, shape.block_q, element.kept.last_rows)
            )
            for count in counts
            if count >= FEWEST_BLOCKS
        }
        sparsity = 1 - sums.live.sum(1).float() / sums.visible.sum()
        overall = pieces[0] if len(pieces) == 1 else _error(sums, 0, blocks)
        return InputCurve(torch.stack(pieces), overall, prefixes, sparsity)


def _error(sums: PassSums, first: int, last: int, exact_from: int | None = None) -> Tensor:
    """Relative L1 ``[H, P]`` over a range of query blocks; 0 where nothing is there to differ from.

    Blocks from ``exact_from`` on count as computed whole, without error.
    """
    difference = sums.difference[:, first : last if exact_from is None else exact_from].sum(1)
    magnitude = sums.magnitude[:, first:last].sum(1, keepdim=True)
    return (difference / magnitude.clamp_min(torch.finfo(torch.float32).tiny)).float()
