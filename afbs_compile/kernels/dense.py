"""Dense attention on the operands of a call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.blocks import chunks
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.kernels.sight import ROWS_AT_ONCE, allowed_by_rows, changed, product, weights


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
    k, v = (x.float().repeat_interleave(operands.groups, 1) for x in (operands.k, operands.v))
    for rows in chunks(operands.q_len, ROWS_AT_ONCE):
        scores = changed(operands, operands.q[:, :, rows].float() @ k.mT * operands.scale, rows)
        scores = scores.masked_fill(~allowed_by_rows(operands, rows), -torch.inf)
        out[:, :, rows] = product(weights(scores, operands.sinks), v).to(out.dtype)
    return out
