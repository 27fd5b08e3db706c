"""Random attention calls with every kind of mask, and what they give, element by element in float64."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import LAMBDA_OFF, THETA_OFF, Kept, SparseCall
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import POLICIES

SHAPES = (BlockShape(16, 16), BlockShape(32, 16), BlockShape(64, 32), BlockShape(64, 64), BlockShape(128, 64))


def random_operands(
    seed: int,
    *,
    smallest: int = 1,
    largest: int = 300,
    groups: int = 3,
    dtype: torch.dtype = torch.float32,
    plain: bool = False,
) -> Operands:
    """A call of a random size with a random mask, valid keys, a dense mask, a cap and sinks.

    Args:
        seed: of everything; smallest, largest: number of rows and keys.
        groups: most query heads per key head; dtype: of q, k and v.
        plain: without bias, cap and sinks.
    """
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, count = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, groups)
    heads, k_len = kv_heads * count, draw.randint(smallest, largest)
    q_len = k_len if draw.random() < 0.4 else draw.randint(smallest, largest)
    dim = draw.choice((8, 16, 24, 32, 64))
    value_dim = dim if draw.random() < 0.8 else draw.choice((16, 24, 64))

    def tensor(count: int, length: int, width: int) -> Tensor:
        if draw.random() < 0.5:
            return torch.randn(batch, count, length, width, generator=torch_draw).to(dtype)
        return torch.randn(batch, length, count, width, generator=torch_draw).to(dtype).transpose(1, 2)

    width = draw.randint(1, k_len)
    kinds = ("full", "causal", "causal_end", f"window({width})", f"chunk({width})", f"around({width},{width // 2})")
    softcap = sinks = None
    if not plain and draw.random() < 0.25:
        softcap = draw.choice((2.0, 20.0))
    if not plain and draw.random() < 0.2:
        sinks = torch.randn(heads, generator=torch_draw)
    return Operands(
        tensor(heads, q_len, dim),
        tensor(kv_heads, k_len, dim),
        tensor(kv_heads, k_len, value_dim),
        mask_of(draw.choice(kinds)),
        draw.choice((dim**-0.5, 1.0, -0.3)),
        _valid(draw, torch_draw, batch, k_len),
        _attn_mask(draw, torch_draw, (batch, heads, q_len, k_len), plain),
        softcap or 0.0,
        sinks,
    )


def _valid(draw: random.Random, torch_draw: torch.Generator, batch: int, k_len: int) -> Tensor | None:
    places, kind = torch.arange(k_len), draw.choice(("none", "none", "all", "left", "right", "some", "nothing"))
    counts = torch.randint(0, k_len + 1, (batch, 1), generator=torch_draw)
    return {
        "none": None,
        "all": torch.ones(batch, k_len, dtype=torch.bool),
        "left": places >= counts,
        "right": places < counts,
        "some": torch.rand(batch, k_len, generator=torch_draw) < 0.5,
        "nothing": (places < counts) & (counts > k_len // 2),
    }[kind]


def _attn_mask(draw: random.Random, torch_draw: torch.Generator, sizes: tuple[int, ...], plain: bool) -> Tensor | None:
    kind = draw.choice(
        ("none", "none", "none", "bool", "documents") + (() if plain else ("bias", "lowest", "infinite"))
    )
    if kind == "none":
        return None
    q_len, k_len = sizes[2:]
    shape = [size if draw.random() < 0.5 else 1 for size in sizes[:3]]
    if kind == "documents":
        edges = torch.rand(k_len, generator=torch_draw) < 0.02
        document = edges.cumsum(0)
        rows = torch.arange(q_len).clamp_max(k_len - 1)
        return (document[rows][:, None] == document)[None, None]
    noise = torch.randn(*shape, k_len, generator=torch_draw)
    # Whole stretches of keys and of rows, so that blocks of every kind occur.
    stretch = torch.nn.functional.interpolate(noise.flatten(0, 1)[:, None, :, ::16], noise.shape[2:]).view_as(noise)
    if kind == "bool":
        return stretch > -0.5
    if kind == "bias":
        return noise
    hidden = torch.finfo(torch.float32).min if kind == "lowest" else -math.inf
    return noise.masked_fill(stretch < -0.3, hidden)


def random_call(seed: int, heads: int) -> SparseCall:
    """Random thresholds, policies, block shape and kept blocks."""
    draw = random.Random(seed)
    policies = tuple(draw.choice(sorted(POLICIES)) for _ in range(heads))
    theta = tuple(draw.choice((THETA_OFF, 0.3)) if POLICIES[name].has_theta else THETA_OFF for name in policies)
    tau = tuple(draw.choice((0.0, 0.3, 0.7, 0.95, 1.0)) for _ in range(heads))
    kept = Kept(draw.choice((0, 5, 64)), draw.choice((0, 10, 128)))
    return SparseCall(tau, theta, (LAMBDA_OFF,) * heads, policies, draw.choice(SHAPES), kept)


def hidden(operands: Operands) -> Tensor:
    """bool ``[B, H, q_len, k_len]``, true where a row does not see a key: written for tests, one element at a time."""
    q_len, k_len = operands.q_len, operands.k_len
    rows, keys = torch.arange(q_len)[:, None], torch.arange(k_len)
    name, _, given = str(operands.mask).partition("(")
    numbers = [int(number) for number in given.rstrip(")").split(",") if number]
    own = rows + k_len - q_len
    seen = {
        "full": lambda: keys >= 0,
        "causal": lambda: keys <= rows,
        "causal_end": lambda: keys <= own,
        "window": lambda: (keys <= own) & (own - keys < numbers[0]),
        "chunk": lambda: (keys <= own) & (keys // numbers[0] == own // numbers[0]),
        "around": lambda: (own - keys <= numbers[0]) & (keys - own <= numbers[1]),
    }[name]()
    result = (~seen).expand(*operands.q.shape[:2], q_len, k_len).clone()
    if operands.valid is not None:
        result |= ~operands.valid.cpu()[:, None, None, :]
    mask = operands.attn_mask
    if mask is not None:
        mask = mask.cpu()
        result |= ~mask if mask.dtype == torch.bool else mask == -math.inf
    return result


def in_float64(operands: Operands, live: Tensor | None = None, block: BlockShape | None = None) -> Tensor:
    """Attention of every row over what it sees, ``[B, H, q_len, D_v]``; of dead blocks nothing where ``live`` is."""
    groups = operands.groups
    q, k, v = (x.cpu().double() for x in (operands.q, operands.k, operands.v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    away = hidden(operands)
    if live is not None:
        assert block is not None
        wide = live.cpu().repeat_interleave(block.q, 2).repeat_interleave(block.k, 3)
        away = away | ~wide[:, :, : operands.q_len, : operands.k_len]
    scores = q @ k.mT * operands.scale
    if operands.softcap:
        scores = operands.softcap * torch.tanh(scores / operands.softcap)
    if operands.has_bias:
        scores = scores + operands.attn_mask.cpu().double()
    scores = scores.masked_fill(away, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    if operands.sinks is not None:
        sinks = operands.sinks.cpu().double()[:, None, None]
        peak = torch.maximum(peak, sinks)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    powers = (scores - peak).exp()
    total = powers.sum(-1, keepdim=True)
    if operands.sinks is not None:
        total = total + (sinks - peak).exp()
    mass = torch.where(total == 0, 0.0, powers / total)
    # Keys that a row does not see are not read: their values may be anything.
    finite = v.isfinite().all(-1)
    out = mass @ v.masked_fill(~finite[..., None], 0.0)
    for b, h, c in (~finite).nonzero().tolist():
        rows = ~away[b, h, :, c]
        out[b, h, rows] += mass[b, h, rows, c, None] * v[b, h, c]
    return out


def undecided(operands: Operands, live: Tensor, block: BlockShape) -> Tensor:
    """bool ``[B, H, q_len]``: rows that have larger numbers added than the lowest, but in dead blocks alone.

    What their live keys weigh is nothing beside those; among themselves it may be anything.
    """
    if not operands.has_bias:
        return torch.zeros(operands.q.shape[:3], dtype=torch.bool)
    clear = ~hidden(operands) & ~(operands.attn_mask.cpu() <= torch.finfo(torch.float32).min)
    wide = live.cpu().repeat_interleave(block.q, 2).repeat_interleave(block.k, 3)
    return clear.any(-1) & ~(clear & wide[:, :, : operands.q_len, : operands.k_len]).any(-1)


def poisoned(operands: Operands, value: float) -> Operands:
    """The same call with a value in the keys, and the values, that no row of a batch element sees."""
    unseen = hidden(operands).all(2).to(operands.device)
    unseen = unseen.unflatten(1, (-1, operands.groups)).all(2)[..., None]
    return replace(operands, k=operands.k.masked_fill(unseen, value), v=operands.v.masked_fill(unseen, value))
