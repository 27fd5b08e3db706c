"""What the rows of a call see, and what that makes of its blocks: formula, valid keys and dense mask together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.attend.machine import reads_freely, runs_triton
from afbs_compile.kernels.blocks import BlockShape, chunks
from afbs_compile.kernels.operands import Operands

if TYPE_CHECKING:
    from afbs_compile.kernels.sight_triton import MaskBlocks

ROWS_AT_ONCE = 512
"""Query rows whose keys are looked at one by one at a time; a multiple of every block shape."""


LARGEST = BlockShape(128, 128)


class Sight(NamedTuple):
    """What the rows of a call see of its blocks; bool ``[B or 1, H or 1, n_q, n_k]`` each.

    Attributes:
        visible: some row of the query block sees some key of the key block.
        whole: every row sees every key, no key is missing at the end, and nothing is added to a score.
        blurred: visible, and some key of the key block is seen by no row of the query block. Statistics of the key
            block would tell the rows of what they do not see: it takes no part in any softmax of blocks, and is kept.
        bias: fp32, the logarithm of the mean of ``exp(bias)`` over what is seen of the block; ``None`` where nothing
            is added to scores.
        ends: int64 ``[B or 1, H or 1, n_q, 2]``, the last key that the first row of a query block sees, and the last
            one that any of its rows does; -1 for none. ``None`` where the formula says it.
    """

    visible: Tensor
    whole: Tensor
    blurred: Tensor
    bias: Tensor | None = None
    ends: Tensor | None = None


def allowed_by_rows(operands: Operands, rows: slice | Tensor) -> Tensor:
    """Which keys some rows may attend, bool, broadcastable to ``[B, H, rows, k_len]``; numbers that are added apart.

    Args:
        operands: of the call; rows: from where to where, or int64 ``[rows]``.
    """
    parts = []
    if operands.attn_mask is not None:
        given = of_rows(operands.attn_mask, rows)
        parts.append(given if given.dtype == torch.bool else given != -math.inf)
    if not operands.mask.hides_nothing or not parts or parts[0].shape[2] == 1:
        keys = torch.arange(operands.k_len, device=operands.device)
        places = torch.arange(rows.start, rows.stop, device=operands.device) if isinstance(rows, slice) else rows
        parts.append(operands.mask.sees(places[:, None] + operands.offset, keys)[None, None])
    if operands.valid is not None:
        parts.append(operands.valid[:, None, None, :])
    return functools.reduce(torch.bitwise_and, parts)


def seen_by_rows(operands: Operands, rows: slice | Tensor) -> Tensor:
    """Which keys some rows see: those that they may attend, and of which anything is left with the numbers added.

    Arguments and result: see :func:`allowed_by_rows`.
    """
    seen = allowed_by_rows(operands, rows)
    if operands.attn_mask is None or not operands.has_bias:
        return seen
    given = of_rows(operands.attn_mask, rows)
    clearly = seen & ~(given <= torch.finfo(given.dtype).min)
    # Beside anything larger the lowest number has no weight; a row of nothing else weighs its keys by the scores.
    return torch.where(clearly.any(-1, keepdim=True), clearly, seen)


def some(x: Tensor, dim: int) -> Tensor:
    """``x.any(dim)`` of a bool tensor: on a CPU the largest of bytes is found twenty times as fast."""
    return x.view(torch.uint8).amax(dim).view(torch.bool)


def every(x: Tensor, dim: int) -> Tensor:
    """``x.all(dim)``, as :func:`some` computes ``any``."""
    return x.view(torch.uint8).amin(dim).view(torch.bool)


def of_rows(mask: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows of a dense mask that may have one for all."""
    return mask if mask.shape[2] == 1 else mask[:, :, rows]


def changed(operands: Operands, scores: Tensor, rows: slice | Tensor) -> Tensor:
    """Scores ``[B, H, rows, k_len]`` of some rows, capped, and with what the mask adds to them."""
    scores = capped(scores, operands.softcap)
    if operands.attn_mask is not None and operands.has_bias:
        scores = scores + of_rows(operands.attn_mask, rows).to(scores.dtype)
    return scores


def weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of ``[B, H, rows, k_len]``, hidden keys at -inf, over what is there and the sinks ``[H]``.

    A row without a key is 0.
    """
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None]
        peak = torch.maximum(peak, sink)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    powers = torch.exp(scores - peak)
    total = powers.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - peak)
    return torch.where(total == 0, 0.0, powers / total)


def product(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values`` that reads no value of weight 0: NaN is not multiplied by zero.

    Args:
        weights: ``[.., rows, keys]``; values: ``[.., keys, D]``.
    """
    if values.isfinite().all():
        return weights @ values
    out = weights @ values.nan_to_num(0.0, 0.0, 0.0)
    rows = (weights > 0).to(weights.dtype)
    for value, there in ((math.inf, values == math.inf), (-math.inf, values == -math.inf), (math.nan, values.isnan())):
        out = torch.where(rows @ there.to(weights.dtype) > 0, out + value, out)
    return out


def without_idle_parts(operands: Operands) -> Operands:
    """The same call without valid keys where all are, and without keys at the end that no row sees.

    The unused end of a static cache is such keys. It is found out where values can be read without waiting.
    """
    if not reads_freely(operands.device):
        return operands
    if operands.valid is not None and bool(operands.valid.all()):
        operands = replace(operands, valid=None)
    end = _end_of_what_is_seen(operands)
    if end == operands.k_len:
        return operands
    return replace(
        operands,
        k=operands.k[:, :, :end],
        v=operands.v[:, :, :end],
        valid=None if operands.valid is None else operands.valid[:, :end],
        attn_mask=None if operands.attn_mask is None else operands.attn_mask[..., :end],
    )


def _end_of_what_is_seen(operands: Operands) -> int:
    """How many keys there are up to the last one that any row sees, in whole blocks.

    All where a formula has a say; and where only valid keys say it, at least those at the positions of rows: which
    blocks lie near a row would be others.
    """
    mask = operands.attn_mask
    seen = [] if operands.valid is None else [operands.valid.any(0)]
    seen += [some(mask.flatten(0, 2), 0)] if mask is not None and mask.dtype == torch.bool else []
    if not operands.mask.hides_nothing or not seen:
        return operands.k_len
    by_rows = mask is not None and mask.dtype == torch.bool and not mask.shape[1] == mask.shape[2] == 1
    places = functools.reduce(torch.bitwise_and, seen).nonzero()
    end = int(places[-1]) + 1 if len(places) else operands.k_len
    end = end if by_rows else max(end, operands.q_len)
    return min(operands.k_len, -(-end // LARGEST.k) * LARGEST.k)


def resolved(operands: Operands, shape: BlockShape = LARGEST) -> Operands:
    """The same call, in which a key that the mask hides from every row is not valid.

    What is not valid enters no statistic of a block; so a mask that hides padding blurs nothing.

    Args:
        operands: of the call.
        shape: rows per block that the result is looked at with; a GPU finds out about these at the same time.
    """
    # A mark, and not the operands themselves: those would hold their own memory until Python looks for cycles.
    if operands.attn_mask is None or "is resolved" in operands.derived:
        return operands
    if "resolved" not in operands.derived:
        operands.derived["resolved"] = _resolved(operands, shape)
    found: Operands = operands.derived["resolved"]
    found.derived["is resolved"] = True
    return found


def _resolved(operands: Operands, shape: BlockShape) -> Operands:
    mask = operands.attn_mask
    if mask is None:
        return operands
    if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
        valid = mask[:, 0, 0].expand(operands.q.shape[0], -1)
        return replace(operands, valid=valid if operands.valid is None else valid & operands.valid, attn_mask=None)
    if _by_triton(operands):
        return _resolved_by_triton(operands, shape)
    parts = [some(seen_by_rows(operands, rows), 2).any(1) for rows in chunks(operands.q_len, ROWS_AT_ONCE)]
    seen = torch.stack(parts).any(0).expand(operands.q.shape[0], -1)
    return replace(operands, valid=seen)


def _by_triton(operands: Operands) -> bool:
    """Whether a kernel looks at the mask."""
    return (
        runs_triton(operands.device)
        and not operands.has_bias
        and operands.mask.band(operands.q_len, operands.k_len) is not None
    )


def _resolved_by_triton(operands: Operands, shape: BlockShape) -> Operands:
    from afbs_compile.kernels import sight_triton  # Triton is not installed everywhere.

    blocks = sight_triton.mask_blocks(operands, shape)
    by_key = ((_anywhere(blocks)[..., None] & _bits(operands)) != 0).flatten(1)[:, : operands.k_len]
    found = replace(operands, valid=by_key.expand(operands.q.shape[0], -1))
    found.derived[shape] = _of_mask_blocks(blocks, _bits(operands))
    return found


def _by_kernel(operands: Operands, shape: BlockShape) -> Sight:
    from afbs_compile.kernels import sight_triton  # Triton is not installed everywhere.

    return _of_mask_blocks(sight_triton.mask_blocks(operands, shape), _bits(operands))


def _bits(operands: Operands) -> Tensor:
    """The bits of a word, lowest first."""
    from afbs_compile.kernels import sight_triton  # Triton is not installed everywhere.

    return 1 << torch.arange(sight_triton.WORD, dtype=torch.int32, device=operands.device)


def _anywhere(blocks: MaskBlocks) -> Tensor:
    """Bits of the keys that any row of any head sees, ``[B, n_k, words]``."""
    return _any_of_bits(_any_of_bits(blocks.seen, 2), 1)


def _of_mask_blocks(blocks: MaskBlocks, bits: Tensor) -> Sight:
    """The sight that follows from what a kernel saw of the mask; keys that no row sees do not count."""
    blurred = blocks.visible & ((_anywhere(blocks)[:, None, None] & ~blocks.seen) != 0).any(-1)
    width = bits.shape[0]
    highest = ((blocks.seen[..., None] & bits) != 0).int() * (torch.arange(width, device=bits.device) + 1)
    words = torch.arange(blocks.seen.shape[-2] * blocks.seen.shape[-1], device=bits.device).view(blocks.seen.shape[-2:])
    inside = highest.amax(-1)
    last = torch.where(inside > 0, words * width + inside - 1, -1).flatten(3).amax(-1)
    ends = torch.stack([blocks.first.amax(-1).long(), last.long()], -1)
    return Sight(blocks.visible, blocks.whole, blurred, None, ends)


def _any_of_bits(words: Tensor, dim: int) -> Tensor:
    """OR over a dimension: PyTorch has no such reduction."""
    while words.shape[dim] > 1:
        half = words.shape[dim] // 2
        joined = words.narrow(dim, 0, half) | words.narrow(dim, half, half)
        odd = words.narrow(dim, 2 * half, words.shape[dim] - 2 * half)
        words = torch.cat([joined, odd], dim)
    return words.squeeze(dim)


def sight_of(operands: Operands, shape: BlockShape) -> Sight:
    """What the rows of a call see of its blocks.

    Args:
        operands: of the call, :func:`resolved`; shape: rows per block.
    """
    if shape not in operands.derived:
        operands.derived[shape] = _look(operands)(operands, shape)
    found: Sight = operands.derived[shape]
    return found


def _look(operands: Operands) -> Callable[[Operands, BlockShape], Sight]:
    """What finds out about blocks."""
    if operands.attn_mask is None:
        return _by_keys
    return _by_kernel if _by_triton(operands) else _by_elements


def valid_blocks(valid: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Whether any, and whether every key of each block is valid, bool ``[B, n_k]`` each; missing keys do not count."""
    missing = -valid.shape[1] % block
    some = F.pad(valid, (0, missing)).unflatten(1, (-1, block)).any(2)
    return some, F.pad(valid, (0, missing), value=True).unflatten(1, (-1, block)).all(2)


def _by_keys(operands: Operands, shape: BlockShape) -> Sight:
    grid = operands.grid(shape)
    visible, whole, blurred = (x[None, None] for x in operands.mask.visibility(grid, operands.device))
    if operands.valid is None:
        return Sight(visible, whole, blurred)
    any_valid, all_valid = (x[:, None, None, :] for x in valid_blocks(operands.valid, shape.k))
    return Sight(visible & any_valid, whole & all_valid, blurred & any_valid)


def _by_elements(operands: Operands, shape: BlockShape) -> Sight:
    grid, mask = operands.grid(shape), operands.attn_mask
    assert mask is not None
    exists = operands.valid
    if exists is None:
        exists = torch.ones(1, grid.k_len, dtype=torch.bool, device=mask.device)
    parts = []
    for rows in chunks(grid.q_len, ROWS_AT_ONCE):
        seen = seen_by_rows(operands, rows)
        seen = seen.expand(*seen.shape[:2], rows.stop - rows.start, -1)
        given = of_rows(mask, rows) if operands.has_bias else None
        parts.append(_sight_of_rows(seen, given, exists[:, None, None, :], shape))
    joined = [torch.cat([part[place] for part in parts], 2) for place in range(4)]
    bias = torch.cat([part[4] for part in parts], 2) if operands.has_bias else None
    visible, whole, blurred, ends = joined
    return Sight(visible, whole, blurred, bias, ends)


def _sight_of_rows(seen: Tensor, given: Tensor | None, exists: Tensor, shape: BlockShape) -> tuple[Tensor, ...]:
    """Of whole query blocks: visible, whole, blurred, ends and, where numbers are ``given``, bias."""
    by_q = _in_rows(seen, shape.q, value=False)
    somewhere = some(by_q, 3)  # [.., n_q, k_len]
    everywhere = every(_in_rows(seen, shape.q, value=True), 3)
    if given is not None:
        nothing = given == 0
        everywhere = everywhere & (nothing if given.shape[2] == 1 else every(_in_rows(nothing, shape.q, value=True), 3))
    visible = _in_keys(somewhere, shape.k, value=False).any(-1)
    whole = _in_keys(everywhere, shape.k, value=False).all(-1)
    blurred = visible & _in_keys(exists & ~somewhere, shape.k, value=False).any(-1)
    places = torch.arange(1, seen.shape[3] + 1, device=seen.device)
    first, last = ((rows * places).amax(-1) - 1 for rows in (by_q[:, :, :, 0], somewhere))
    ends = torch.stack([first, last], -1)
    if given is None:
        return visible, whole, blurred, ends
    numbers = given.float().expand(*given.shape[:2], seen.shape[2], -1).masked_fill(~seen, -math.inf)
    numbers = _in_keys(_in_rows(numbers, shape.q, value=-math.inf), shape.k, value=-math.inf)
    counts = _in_keys(by_q, shape.k, value=False).sum((3, 5))
    return visible, whole, blurred, ends, numbers.logsumexp((3, 5)) - counts.clamp_min(1).log()


def _in_rows(x: Tensor, block: int, *, value: float) -> Tensor:
    """``[.., rows, k]`` as ``[.., n, block, k]``."""
    padded: Tensor = F.pad(x, (0, 0, 0, -x.shape[2] % block), value=value).unflatten(2, (-1, block))
    return padded


def _in_keys(x: Tensor, block: int, *, value: float) -> Tensor:
    """``[.., k]`` as ``[.., n, block]``."""
    padded: Tensor = F.pad(x, (0, -x.shape[-1] % block), value=value).unflatten(-1, (-1, block))
    return padded


def adjusted(operands: Operands, shape: BlockShape, scores: Tensor) -> Tensor:
    """Scores of blocks ``[B, H, n_q, n_k]``, capped as those of keys are, and with what the mask adds on average."""
    scores = capped(scores, operands.softcap)
    return scores + sight_of(operands, shape).bias if operands.has_bias else scores  # type: ignore[operator]


def capped(scores: Tensor, softcap: float) -> Tensor:
    """``softcap * tanh(scores / softcap)``; the scores themselves where softcap is 0."""
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def rows_that_count(operands: Operands) -> Tensor | None:
    """The rows whose errors count, bool ``[B, q_len]``; ``None`` for all: rows of padding are nobody's output.

    Where rows have keys of their own, a row whose key is not valid is padding.
    """
    if operands.valid is None or not operands.mask.local:
        return None
    own = torch.arange(operands.q_len, device=operands.device) + operands.offset
    return operands.valid[:, own.clamp(0, operands.k_len - 1)]


def looks_back(operands: Operands) -> bool:
    """Whether rows look back: each sees no further than its own key, and later rows see later keys."""
    if operands.mask.local or operands.attn_mask is None or operands.q_len < 2:
        return operands.mask.local
    if "looks back" not in operands.derived:
        places = torch.arange(1, operands.k_len + 1, device=operands.device)
        parts = [(seen_by_rows(operands, rows) * places).amax(-1) for rows in chunks(operands.q_len, ROWS_AT_ONCE)]
        ends = torch.cat([part.expand(*part.shape[:2], -1) for part in parts], 2)
        steps = ends.diff(dim=2)
        # Rows of padding see nothing.
        ordinary = (steps == 1) | (ends[:, :, 1:] == 0) | (ends[:, :, :-1] == 0)
        operands.derived["looks back"] = bool(ordinary.all()) and bool((ends > 0).any())
    return bool(operands.derived["looks back"])
