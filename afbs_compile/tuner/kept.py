"""Which blocks a site always keeps under a budget, by what they buy.

The error of a head does not show what the keys before a query block are worth, for it is a sum of absolute errors in
which a few ruined rows disappear. The output feels them: to second order a divergence of it grows with the square of
what changes. So what counts here is the mean over rows of ``|o - o_dense|^2 / |o_dense|^2``, and keeping a block pays
where it takes more of that away than the same block would if the threshold bought it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import Kept, SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.cumulant import Cumulant
from afbs_compile.kernels.sight import rows_that_count
from afbs_compile.recipe import KeptTrial
from afbs_compile.tuner.measure import nothing_to_skip, some_heads, sparsity_of

LOCAL_KEYS = (0, 64, 128, 256)
"""Keys before a query block that are tried."""

POLICY = Cumulant.name
"""What scores the blocks meanwhile: of two contenders that win on a GPU or on a CPU the one that knows more, so that
nothing is bought which it sees by itself."""

MOST_ROWS = 4096
"""Rows that are looked at where a prefix is an input of its own: what the keys right before a token are worth does not
depend on how many others there are."""

PRICED_AT = 2.0
"""The price of a block is what it buys between a threshold and this many times it."""

LEAST_PRICE = 1e-3
"""Of all blocks, in squared error; a tenth of the least that was measured of a head that a threshold matters to."""

TELLS = 0.02
"""Costs that differ by less, as a share of the error, are equal: then the usual number, or else the most keys."""

LEAST_LOSS = 0.5
"""Last rows are whole where any row of the sample loses more than this of its output: the next prompt's last row may
ask what that row asked, and nothing after it could make up for it."""


@dataclass(frozen=True)
class KeptChoice:
    """What a site always keeps.

    Attributes:
        kept: the choice; tried: what every number of local keys was measured to do, empty where nothing was measured.
    """

    kept: Kept
    tried: tuple[KeptTrial, ...] = ()


def choose_kept(sample: Operands, usual: Kept, shape: BlockShape, threshold: float) -> KeptChoice:
    """What pays for itself at a site.

    Args:
        sample: batch size 1.
        usual: what is kept where nothing tells otherwise; where it has no local keys nothing is tried.
        shape: of the blocks; threshold: strength that a block must exceed.
    """
    short = sample.first_rows(min(sample.q_len, MOST_ROWS)) if sample.mask.local else sample
    if not usual.local_keys or nothing_to_skip([short], usual, [shape]) is not None:
        return KeptChoice(usual)
    dense = dense_attention(short)

    def at(local_keys: int, threshold: float) -> KeptTrial:
        kept = Kept(0, local_keys)  # last rows that are whole have no error, and it is asked what they would lose
        call = SparseCall.uniform(short.heads, 1 / (1 + threshold), policy=POLICY, shape=shape, kept=kept)
        return _trial(short, dense, call)

    tried = tuple(at(local_keys, threshold) for local_keys in LOCAL_KEYS)
    dearer = at(usual.local_keys, PRICED_AT * threshold)
    if not all(math.isfinite(trial.worst_row) for trial in (*tried, dearer)):
        return KeptChoice(usual)
    return KeptChoice(chosen(usual, tried, dearer), tried)


def chosen(usual: Kept, tried: Sequence[KeptTrial], dearer: KeptTrial) -> Kept:
    """What is kept, from what was measured.

    Args:
        usual: what is kept where the difference does not tell; tried: every number of local keys, the usual one among
            them; dearer: the usual one at a larger threshold.
    """
    plain = next(trial for trial in tried if trial.local_keys == usual.local_keys)
    saved = plain.live - dearer.live
    price = max(LEAST_PRICE, (dearer.error**2 - plain.error**2) / saved if saved > 0 else 0.0)
    cost = {trial: trial.error**2 + price * trial.live for trial in tried}
    least = min(cost.values()) + TELLS * plain.error**2
    equal = [trial for trial in tried if cost[trial] <= least]
    best = plain if plain in equal else max(equal, key=lambda trial: trial.local_keys)
    return Kept(usual.last_rows if best.worst_row > LEAST_LOSS else 0, best.local_keys)


def _trial(sample: Operands, dense: Tensor, call: SparseCall) -> KeptTrial:
    out, counts = run(sample, call)
    squares = row_errors(out, dense)
    counted = rows_that_count(sample)
    squares = squares if counted is None else squares[counted[:, None].expand_as(squares)]
    live = 1 - float(sparsity_of(sample, call.shape, counts).mean())
    return KeptTrial(
        call.kept.local_keys, _rounded(live), _rounded(squares.mean() ** 0.5), _rounded(squares.amax() ** 0.5)
    )


def row_errors(out: Tensor, dense: Tensor) -> Tensor:
    """``|o - o_dense|^2 / |o_dense|^2`` of every row, ``[B, H, N]`` fp32; 0 where both are 0.

    Args:
        out, dense: ``[B, H, N, D]``.
    """
    parts = []
    for a, b in some_heads(out, dense):
        apart, size = ((x.float().square().sum(-1)) for x in (a.float() - b.float(), b))
        parts.append(apart / size.clamp_min(torch.finfo(torch.float32).tiny))
    return torch.cat(parts, 1)


def _rounded(value: Tensor | float) -> float:
    return float(f"{float(value):.4g}")
