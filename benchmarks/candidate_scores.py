"""Scores of blocks for ``candidates.py``: the mass of every block, true or predicted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afbs_compile.kernels.policies.vertical_slash import with_previous

GROUP = 16
"""Tokens that ``cumulant``, ``main`` and ``antidiagonal`` take together."""


@dataclass(frozen=True)
class Inputs:
    """What a score sees of a layer.

    Attributes:
        layer: its index; q, k: ``[H, N, D]``; scale: of their products; block_q, block_k: tokens of a block.
    """

    layer: int
    q: Tensor
    k: Tensor
    scale: float
    block_q: int = 64
    block_k: int = 64

    def first(self) -> tuple[Tensor, Tensor]:
        """First token of every query block ``[n_q, 1]`` and of every key block ``[n_k]``."""
        first_q = torch.arange(0, self.q.shape[1], self.block_q, device=self.q.device)[:, None]
        return first_q, torch.arange(0, self.k.shape[1], self.block_k, device=self.k.device)

    def visible(self) -> Tensor:
        """Bool ``[n_q, n_k]``: the blocks with a pair that is not masked."""
        first_q, first_k = self.first()
        return first_k < first_q + self.block_q


Score = Callable[[Inputs], Tensor]
"""Mass ``[H, n_q, n_k]`` of the blocks of a layer."""


def sampled(count: int) -> Score:
    """Exact mass of some rows of each query block, all of them where count is 0."""

    def score(x: Inputs) -> Tensor:
        index = sampled_rows(x, count or x.block_q)
        keys = torch.arange(x.k.shape[1], device=x.k.device)
        mass = []
        for head in range(len(x.q)):  # one matrix at a time
            logits = (x.q[head, index].float() @ x.k[head].float().T) * x.scale
            weights = logits.masked_fill_(keys > index[:, None], -math.inf).softmax(-1)
            rows = weights.unflatten(-1, (-1, x.block_k)).sum(-1)
            mass.append(rows.unflatten(0, (x.q.shape[1] // x.block_q, -1)).mean(1))
        return torch.stack(mass)

    return score


def sampled_rows(x: Inputs, count: int) -> Tensor:
    """Index of so many queries of each block, evenly spread over it."""
    offsets = torch.tensor([int((i + 0.5) * x.block_q / count) for i in range(count)], device=x.q.device)
    return (x.first()[0] + offsets).flatten()


def coarse(rows: int, mean: bool, group: int, held: bool) -> Score:
    """Rows (or means of as many neighbours) against moments of key groups.

    Args:
        rows: of a query block that are taken (``mean``: queries of a group); group: keys of a group.
        held: whether the second cumulant is replaced, beyond the spread that so many keys can show, by what their
            maximum reaches (the random energy model's frozen phase).
    """

    def score(x: Inputs) -> Tensor:
        if mean:
            taken = in_groups(x.q, rows).mean(2) * x.scale
            last = last_of_groups(x.q, rows)
        else:
            last = sampled_rows(x, rows)
            taken = x.q[:, last].float() * x.scale
        keys = in_groups(x.k, group)
        variance = taken.square() @ keys.var(2, unbiased=False).mT
        second = variance / 2
        if held:
            critical = math.sqrt(2 * math.log(group))
            spread = variance.clamp_min(0).sqrt()
            second = torch.where(spread < critical, second, spread * critical - math.log(group))
        return mass_of_groups(taken @ keys.mean(2).mT + second, last, group, x)

    return score


def in_groups(x: Tensor, group: int) -> Tensor:
    """``[H, groups, group, D]`` fp32 of ``[H, N, D]``."""
    return x.float().unflatten(1, (-1, group))


def last_of_groups(x: Tensor, group: int) -> Tensor:
    """The last token of every group."""
    return torch.arange(group - 1, x.shape[1], group, device=x.device)


def mass_of_groups(logits: Tensor, last: Tensor, group: int, x: Inputs) -> Tensor:
    """Mass of blocks from logits ``[H, rows, key groups]``, of which a row sees those that begin by its last token."""
    first = torch.arange(logits.shape[-1], device=logits.device) * group
    weights = logits.masked_fill_(first > last[:, None], -math.inf).softmax(-1)
    columns = weights.unflatten(-1, (-1, x.block_k // group)).sum(-1)
    return columns.unflatten(1, (x.q.shape[1] // x.block_q, -1)).mean(2)


truth: Score = sampled(0)
cumulant: Score = coarse(GROUP, True, GROUP, False)


def antidiagonal(x: Inputs) -> Tensor:
    """XAttention's score: of every 16 x 16 square of products the mean of the antidiagonal."""
    # logit_ab = scale / 16 * sum_t <q[a 16 + 15 - t], k[b 16 + t]>
    rows, columns = in_groups(x.q, GROUP).flip(2).flatten(2), in_groups(x.k, GROUP).flatten(2)
    return mass_of_groups(rows @ columns.mT * (x.scale / GROUP), last_of_groups(x.q, GROUP), GROUP, x)


def main_direction(x: Inputs) -> Tensor:
    """``cumulant``, with the variance of the keys along the main query direction u not taken coordinate by coordinate.

    u is the top eigenvector of the mean of q q^T over all queries of the head, later ones included.
    """
    # logit_ab = <q, mean_k> + ((q.u)^2 Var(k.u) + sum_d (q - (q.u) u)_d^2 Var(k_d)) / 2
    q, keys = in_groups(x.q, GROUP).mean(2) * x.scale, in_groups(x.k, GROUP)
    u = torch.linalg.eigh(x.q.float().mT @ x.q.float()).eigenvectors[..., -1:]
    along = q @ u
    rest = (q - along @ u.mT).square() @ keys.var(2, unbiased=False).mT
    second = (along.square() @ (keys @ u[:, None]).var(2, unbiased=False).mT + rest) / 2
    return mass_of_groups(q @ keys.mean(2).mT + second, last_of_groups(x.q, GROUP), GROUP, x)


def rounded(score: Score, rounding: Callable[[Tensor], Tensor]) -> Score:
    """The score of rounded queries and keys."""
    return lambda x: score(replace(x, q=rounding(x.q), k=rounding(x.k)))


def to_fp8(x: Tensor) -> Tensor:
    """Rounded to e4m3, with one scale a head."""
    dtype = torch.float8_e4m3fn
    step = x.float().abs().amax((-2, -1), keepdim=True).clamp_min(1e-12) / torch.finfo(dtype).max
    return (x.float() / step).to(dtype).float() * step


def to_int8(x: Tensor) -> Tensor:
    """Rounded to -127 .. 127, with one scale a token."""
    step = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x.float() / step).round() * step


def mixed(a: Score, b: Score) -> Score:
    """The mean of two masses."""
    return lambda x: (a(x) + b(x)) / 2


def with_block_before(score: Score) -> Score:
    """The mass, with half of what the query block before had in the same column and at the same distance."""

    def smoothed(x: Inputs) -> Tensor:
        mass = with_previous(score(x), x.block_q // x.block_k)
        return mass / mass.sum(-1, keepdim=True)

    return smoothed


def layer_before(score: Score, heads: Tensor | None = None) -> Score:
    """The scores of the layer before; the first layer has its own.

    Args:
        score: of a layer.
        heads: ``[layers, H]``, the head of the layer before whose scores a head takes; by default that of its number.
    """
    before = torch.empty(0)

    def reused(x: Inputs) -> Tensor:
        nonlocal before
        own, taken = score(x), before
        before = own
        return own if x.layer == 0 else taken if heads is None else taken[heads[x.layer]]

    return reused


def pairs_of_layers(score: Score, heads: Tensor | None = None) -> Score:
    """Of two layers the second takes the scores of the first; ``heads`` as in :func:`layer_before`."""
    first = torch.empty(0)

    def reused(x: Inputs) -> Tensor:
        nonlocal first
        if x.layer % 2 == 0:
            first = score(x)
            return first
        return first if heads is None else first[heads[x.layer]]

    return reused


def scores() -> dict[str, Score]:
    """Every score that nothing is learned for, by name."""
    found: dict[str, Score] = {"truth": truth, "cumulant": cumulant}
    found |= {"antidiagonal": antidiagonal, "main": main_direction}
    found |= {f"S{rows}": sampled(rows) for rows in (1, 2, 4, 8, 16)}
    found |= {"S4fp8": rounded(found["S4"], to_fp8), "S4int8": rounded(found["S4"], to_int8)}
    for group in (4, 8, 16):
        found |= {f"S{rows}g{group}": coarse(rows, False, group, False) for rows in (4, 8, 16)}
        found |= {f"R{rows}g{group}": coarse(rows, False, group, True) for rows in (8, 16, 32)}
        found |= {f"Q{size}g{group}": coarse(size, True, group, True) for size in (2, 4, 8, 16)}
    pairs = [("S4", "cumulant"), ("S8", "cumulant"), ("S2", "cumulant"), ("S4", "Q8g8"), ("S8", "Q8g8")]
    for a, b in (*pairs, ("S4fp8", "cumulant")):
        found[f"{a}+{b}"] = mixed(found[a], found[b])
    exact, means = found["S4"], found["Q8g8"]
    found["SvQ"] = lambda x: torch.maximum(exact(x), means(x))
    for name in ("cumulant", "S4", "S2+cumulant", "S4+cumulant"):
        found[f"{name} before"] = with_block_before(found[name])
    return found
