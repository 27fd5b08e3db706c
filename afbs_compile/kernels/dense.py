"""Dense attention on the operands of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.blocks import chunks
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.kernels.sight import ROWS_AT_ONCE, allowed_by_rows, changed, product, weights

SCORES_AT_ONCE = 2**26
"""Elements: 256 MiB in fp32."""


def dense_attention(operands: Operands) -> Tensor:
    """Attention over every key that is seen, ``[B, H, q_len, D_v]`` in the operands' dtype.

    ``F.scaled_dot_product_attention`` computes it, unless scores are capped or have sinks.
    """
    if operands.softcap or operands.sinks is not None:
        return _by_rows(operands)
    # PyTorch's CPU kernels return NaN for is_causal=True with a scale of 0 or less.
    call = operands.with_positive_scale()
    return F.scaled_dot_product_attention(
        call.q, call.k, call.v, scale=call.scale, enable_gqa=call.groups > 1, **_sdpa_arguments(call)
    )


def _sdpa_arguments(operands: Operands) -> dict[str, Any]:
    """What SDPA is told of the keys that rows see."""
    mask, q_len, k_len = operands.mask, operands.q_len, operands.k_len
    if operands.by_formula:
        return mask.sdpa_arguments(q_len, k_len, operands.device)
    seen = None if mask.hides_nothing else mask.matrix(q_len, k_len, operands.device)
    if operands.valid is not None:
        valid = operands.valid[:, None, None, :]
        seen = valid if seen is None else seen & valid
    given = operands.attn_mask
    if given is None or seen is None:
        return {"attn_mask": seen if given is None else _as_sdpa_takes(given, operands)}
    if given.dtype == torch.bool:
        return {"attn_mask": given & seen}
    return {"attn_mask": _as_sdpa_takes(given, operands).masked_fill(~seen, -torch.inf)}


def _as_sdpa_takes(mask: Tensor, operands: Operands) -> Tensor:
    """SDPA wants a floating mask in the dtype of q."""
    return mask if mask.dtype in (torch.bool, operands.q.dtype) else mask.to(operands.q.dtype)


def _by_rows(operands: Operands) -> Tensor:
    """Attention by its definition, a few hundred rows at a time."""
    out = empty_output(operands.q, operands.v)
    for rows in chunks(operands.q_len, ROWS_AT_ONCE):
        out[:, :, rows] = dense_rows(operands, rows).to(out.dtype)
    return out


def dense_rows(
    operands: Operands, rows: slice | Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = product
) -> Tensor:
    """Some rows of the output, in fp32, a few heads at a time.

    Args:
        operands: of the call; rows: from where to where, or int64 ``[rows]``.
        multiply: weights ``[.., rows, keys]`` and values ``[.., keys, D_v]``; by default such that values without
            weight have no effect whatever they are, for which the host waits for the device.

    Returns:
        ``[B, H, rows, D_v]`` fp32.
    """
    groups, kv_heads = operands.groups, operands.k.shape[1]
    taken = operands.q[:, :, rows]
    step = max(1, SCORES_AT_ONCE // max(1, taken[:, :groups, :, 0].numel() * operands.k_len))
    parts = []
    for first in range(0, kv_heads, step):
        last = min(first + step, kv_heads)
        part = operands.grouped(first * groups, last * groups)
        # Query heads that share a key head are rows of one product.
        q = part.q[:, :, rows].float().unflatten(1, (-1, groups)).flatten(2, 3)
        scores = (q @ part.k.float().mT).unflatten(2, (groups, -1)).flatten(1, 2) * part.scale
        scores = changed(part, scores, rows).masked_fill(~allowed_by_rows(part, rows), -torch.inf)
        shares = weights(scores, part.sinks).unflatten(1, (-1, groups)).flatten(2, 3)
        parts.append(multiply(shares, part.v.float()).unflatten(2, (groups, -1)).flatten(1, 2))
    return torch.cat(parts, 1)
