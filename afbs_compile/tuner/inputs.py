"""The inputs of one site: their dense outputs, and passes over them that measure many thresholds at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.attend.machine import clocked
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.measure.one_pass import PassPlan, PassSums, one_pass
from afbs_compile.kernels.operands import Operands, taken
from afbs_compile.kernels.policies.registry import heads_by
from afbs_compile.kernels.spec.selection import first_whole_block
from afbs_compile.tuner.measure import WINDOWS, kept_for, visible_count

PREFIXES = (4, 2)
"""Where the mask is ``local`` an input of N tokens is one of N / 4 and of N / 2 tokens as well: its first rows see
nothing later. Only the last of these rows, which a shorter input keeps whole, are not whole in the longer one."""

FEWEST_BLOCKS = 4
"""Shorter prefixes have little to skip and say little."""


@dataclass(frozen=True)
class InputCurve:
    """What one input measures at ``P`` thresholds of each head.

    Attributes:
        error: fp32 ``[pieces, H, P]`` relative L1 (Eq. 1), of the whole input or, where it is the only one, of its
            disjoint windows of queries; overall: ``[H, P]``, of the whole input.
        prefixes: ``[H, P]`` by length, for the prefixes of the input that are inputs.
        sparsity: fp32 ``[H, P]``, ``1 - live / visible blocks``.
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


class SiteInputs:
    """The batch elements of all samples of one site.

    Args:
        samples: operands in canonical form, all with the same heads.

    Attributes:
        elements: one input each, batch size 1.
        kept: which blocks calibrated calls of the site always keep.
        windows: pieces that an input is split into: :data:`WINDOWS` where it is the only one.
        first: the input to explore on, the longest one.
    """

    def __init__(self, samples: Sequence[Operands]) -> None:
        self.elements = [sample.element(i) for sample in samples for i in range(sample.q.shape[0])]
        self.kept = kept_for(samples[0])
        self.windows = WINDOWS if len(self.elements) == 1 else 1
        work = [element.q_len * element.k_len for element in self.elements]
        self.first = work.index(max(work))
        self.length = self.elements[self.first].k_len
        self._work: list[Tensor | float] = []
        self._clocks: list[Callable[[], float]] = []
        self._dense: dict[int, Tensor] = {}

    @property
    def heads(self) -> int:
        """Query heads of the site."""
        return self.elements[0].heads

    @property
    def explored(self) -> Operands:
        """The input to explore on."""
        return self.elements[self.first]

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
        return self.elements[index].work / self.explored.work

    def spend_blocks(self, index: int, shape: BlockShape, live: Tensor) -> None:
        """Count live blocks of an input's heads, of all that dense attention computes there."""
        element = self.elements[index]
        everything = self.heads * visible_count(element, shape)
        self.spend(live.sum() * (self.cost(index) / everything))

    def dense(self, index: int) -> Tensor:
        """Dense output ``[1, H, N, D]`` of an input, computed once."""
        if index not in self._dense:
            element = self.elements[index]
            self._dense[index], clock = clocked(lambda: dense_attention(element), element.device)
            self.spend(self.cost(index))
            if self.cost(index) == 1:
                self._clocks.append(clock)
        return self._dense[index]

    def sums(
        self,
        index: int,
        tau: Tensor,
        call: SparseCall,
        *,
        heads: Tensor | None = None,
        rows: tuple[int, ...] | None = None,
    ) -> PassSums:
        """One pass over an input.

        Args:
            index: of the input.
            tau: ``[h, P]``, ascending.
            call: what selects in each of the h heads, but for its taus.
            heads: int64 ``[h]``, the query heads to measure, all by default.
            rows: query blocks to measure, all by default.
        """
        element, dense = self.elements[index], self.dense(index)
        wanted = range(self.heads) if heads is None else heads.tolist()
        theta = torch.tensor(call.theta)
        parts, places = [], []
        for name, mine in heads_by(call.policy).items():
            plan = PassPlan(name, call.shape, call.kept, rows)
            if len(mine) == self.heads:
                parts.append(one_pass(element, dense, tau, theta, plan))
                break
            some = [wanted[place] for place in mine]
            parts.append(one_pass(element.taken(some), taken(dense, some), tau[mine], theta[mine], plan))
            places += mine
        found = parts[0]
        if len(parts) > 1:
            back = torch.tensor(places).argsort().to(element.device, non_blocking=True)
            difference, magnitude, live = (torch.cat(x)[back] for x in list(zip(*parts, strict=True))[:3])
            visible = found.visible if len(found.visible) == 1 else torch.cat([part.visible for part in parts])[back]
            found = PassSums(difference, magnitude, live, visible)
        # Blocks that the largest tau keeps were visited.
        self.spend_blocks(index, call.shape, found.live[..., -1])
        return found

    def curve(self, index: int, tau: Tensor, call: SparseCall, *, heads: Tensor | None = None) -> InputCurve:
        """Error and sparsity of every threshold on all rows of an input, on its device. Arguments: see :meth:`sums`."""
        sums = self.sums(index, tau, call, heads=heads)
        element, block = self.elements[index], call.shape.q
        blocks = sums.magnitude.shape[1]
        edges = [blocks * i // self.windows for i in range(self.windows + 1)]
        pieces = [_error(sums, a, b) for a, b in itertools.pairwise(edges) if b > a]
        counts = [element.q_len // share // block for share in PREFIXES] if element.mask.local else []
        prefixes = {
            count * block + element.offset: _error(
                sums, 0, count, first_whole_block(count * block, block, call.kept.last_rows)
            )
            for count in counts
            if count >= FEWEST_BLOCKS
        }
        sparsity = 1 - sums.live.sum(1).float() / sums.visible.sum(-1).clamp_min(1)[:, None]
        overall = pieces[0] if len(pieces) == 1 else _error(sums, 0, blocks)
        return InputCurve(torch.stack(pieces), overall, prefixes, sparsity)


def _error(sums: PassSums, first: int, last: int, exact_from: int | None = None) -> Tensor:
    """Relative L1 ``[H, P]`` over a range of query blocks; 0 where nothing is there to differ from.

    Blocks from ``exact_from`` on count as computed whole, without error.
    """
    difference = sums.difference[:, first : last if exact_from is None else exact_from].sum(1)
    magnitude = sums.magnitude[:, first:last].sum(1, keepdim=True)
    return (difference / magnitude.clamp_min(torch.finfo(torch.float32).tiny)).float()
