"""The specification of block-sparse attention, in plain PyTorch; it favours clarity and may hold an N x N tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.sight import allowed_by_rows, changed, product, resolved
from afbs_compile.kernels.spec.selection import live_blocks, per_head

LOG2_E = math.log2(math.e)


def masked_attention(operands: Operands, live: Tensor, lam: Sequence[float] | Tensor, shape: BlockShape) -> Tensor:
    """Attention over the live blocks only, visited in ascending order with a running maximum (online softmax).

    The softmax weights of a block always enter the row sum; a row skips their product with V when its maximum in the
    block lies more than ``-lam`` (log2 units) under its running maximum. Only the row's own scores decide, so no later
    token can.

    Args:
        operands: of the call; computed in the dtype given, or fp32 for half precisions.
        live: bool ``[B, H, n_q, n_k]``.
        lam: one number per query head, at most 0.
        shape: rows per block.

    Returns:
        ``[B, H, q_len, D_v]`` in the dtype of ``q``; 0 where a row has no live key that it sees. Of scores that the
        dtype of the computation does not hold, +inf and NaN make their row NaN, and -inf is a key that is not seen.
    """
    operands = resolved(operands)
    q = operands.q
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_len, k_len = operands.q_len, operands.k_len
    k, values = (x.to(work).repeat_interleave(operands.groups, 1) for x in (operands.k, operands.v))
    lam = per_head(lam, q.device)[..., 0]
    scores = _in_log2(changed(operands, q.to(work) @ k.transpose(-1, -2) * operands.scale, slice(0, q_len)))
    allowed = live.repeat_interleave(shape.q, 2).repeat_interleave(shape.k, 3)[..., :q_len, :k_len]
    allowed = allowed & allowed_by_rows(operands, slice(0, q_len))
    scores = scores.masked_fill(~allowed, -math.inf)

    running = scores.new_full(scores.shape[:-1], -math.inf)
    total = torch.zeros_like(running)
    if operands.sinks is not None:
        running = (operands.sinks.to(work) * LOG2_E)[:, None].expand_as(running)
        total = torch.where(running == -math.inf, 0.0, torch.ones_like(running))
    out = torch.zeros(*q.shape[:3], values.shape[3], dtype=work, device=q.device)
    for start in range(0, k_len, shape.k):
        tile = scores[..., start : start + shape.k]
        tile_max = tile.amax(-1)
        new = torch.maximum(running, tile_max)
        base = torch.where(new == -math.inf, 0.0, new)
        # l <- l * 2^(m_old - m_new) + rowsum(2^(s - m_new)),   o <- o * 2^(m_old - m_new) + 2^(s - m_new) V
        decay = torch.exp2(running - base)
        weights = torch.exp2(tile - base[..., None])
        total = total * decay + weights.sum(-1)
        out = out * decay[..., None]
        gap = torch.where(tile_max == -math.inf, -math.inf, tile_max - base)
        needed = ~(gap < lam)
        added = product(weights, values[..., start : start + shape.k, :])
        out = out + torch.where(needed[..., None], added, 0.0)
        running = new
    result: Tensor = torch.where(total[..., None] == 0, 0.0, out / total[..., None]).to(q.dtype)
    return result


def _in_log2(scores: Tensor) -> Tensor:
    """Scores in log2 units; the lowest number stays one: a row of nothing else weighs its keys alike."""
    lowest = torch.finfo(scores.dtype).min / LOG2_E
    return torch.where(scores == -math.inf, scores, scores.clamp_min(lowest)) * LOG2_E


def sparse_attention(operands: Operands, call: SparseCall) -> Tensor:
    """Choose the live blocks, then attend over them: what ``afbs::sparse_attention`` computes."""
    return masked_attention(operands, live_blocks(operands, call), call.lam, call.shape)
