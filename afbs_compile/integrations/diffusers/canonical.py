"""A call of diffusers in canonical form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands, check_operands


class Call(NamedTuple):
    """What a processor asks for, in the order of ``F.scaled_dot_product_attention``.

    Attributes:
        query: ``[B, H, q_len, D]``; key: ``[B, H_kv, k_len, D]``; value: ``[B, H_kv, k_len, D_v]``.
        attn_mask: bool or floating, anything that broadcasts to ``[B, H, q_len, k_len]``.
        dropout_p, is_causal, scale, enable_gqa: as PyTorch has them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def canonical(call: Call) -> Operands | str:
    """The operands of a call, or why it has no canonical form."""
    q, k, v, mask = call.query, call.key, call.value, call.attn_mask
    if call.dropout_p != 0.0:
        return f"dropout of {call.dropout_p:g}: sparse attention has none"
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"operands of {q.dim()}, {k.dim()} and {v.dim()} dimensions, not 4"
    if q.shape[1] != k.shape[1] and not call.enable_gqa:
        return f"{q.shape[1]} heads of queries over {k.shape[1]} of keys, without enable_gqa"
    formula, valid = mask_of("full"), None
    if call.is_causal:
        if mask is not None:
            return "is_causal and a mask at once, which PyTorch refuses too"
        if q.shape[2] > k.shape[2]:
            return f"is_causal with {q.shape[2]} rows over {k.shape[2]} keys"
        formula = mask_of("causal")
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.dtype == torch.bool and mask.shape[1:] == (1, 1, k.shape[2]):
            valid, mask = mask[:, 0, 0].expand(q.shape[0], -1), None  # the text's padding, as most pipelines say it
    scale = q.shape[3] ** -0.5 if call.scale is None else float(call.scale)
    operands = Operands(q, k, v, formula, scale, valid, mask)
    try:
        check_operands(operands)
    except ValueError as error:
        return str(error)
    return operands
