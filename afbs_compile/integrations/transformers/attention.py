"""The attention function that transformers calls under the name "afbs"."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from afbs_compile.integrations.transformers.masks import Seen
from afbs_compile.integrations.transformers.models import served_by
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import DTYPES, HEAD_DIMS, Operands
from afbs_compile.passes.rules import FEWEST_ROWS


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Seen | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: long calls sparse, as calibrated, everything else as SDPA computes it.

    Args:
        module: that makes the call. query: ``[B, H, q_len, D]``; key, value: ``[B, H_kv, k_len, D]``, not repeated.
        attention_mask: of the mask interface of this name, or a tensor that the model made.
        dropout, scaling, is_causal, position_bias: as ``sdpa`` takes them; kwargs: of other implementations, of which
            ``softcap`` and ``s_aux`` (sinks) are computed.

    Returns:
        ``[B, q_len, H, D_v]``, and no weights.
    """
    given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias, **kwargs}
    if _is_candidate(query, dropout) and not (given.get("cache") is not None or given.get("output_attentions")):
        served = served_by(module)
        if served is not None and query.shape[2] * key.shape[2] >= served[0].settings.min_length ** 2:
            operands = _operands(module, query, key, value, attention_mask, given)
            out = _sparse(*served, operands)
            if out is not None:
                return out.transpose(1, 2), None
    return _dense(module, query, key, value, attention_mask, given)


def _is_candidate(query: Tensor, dropout: float) -> bool:
    """Whether a call may be worth a look; this is all that a decode step pays."""
    return (
        query.shape[2] >= FEWEST_ROWS
        and dropout == 0.0
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and query.requires_grad)
    )


def _sparse(served: Any, name: str, operands: Operands | str) -> Tensor | None:
    if isinstance(operands, str):
        served.refuse(name, operands)
        return None
    out: Tensor | None = served.attend(name, operands)
    return out


def _operands(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Seen | Tensor | None, given: dict[str, Any]
) -> Operands | str:
    """The call in canonical form, or why it has none."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtypes {q.dtype}, {k.dtype} and {v.dtype}: half, bfloat16 or float32 is needed, one for all"
    if q.shape[3] not in HEAD_DIMS or v.shape[3] not in HEAD_DIMS or q.shape[1] % k.shape[1]:
        return f"heads of {q.shape[3]} and {v.shape[3]}, {q.shape[1]} over {k.shape[1]}: not the form of an operator"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        return f"batches of {q.shape[0]} and {k.shape[0]}"
    formula, valid, dense = mask_of("full"), None, None
    known = mask.form(q.shape[2], k.shape[2]) if isinstance(mask, Seen) else None
    if known is not None:
        formula, keys, valid = known
        k, v = k[:, :, :keys], v[:, :, :keys]
    else:
        dense = mask.dense() if isinstance(mask, Seen) else mask
        causal = given["is_causal"] if given["is_causal"] is not None else getattr(module, "is_causal", True)
        if dense is None and causal:
            formula = mask_of("causal")
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    bias = given["position_bias"]
    if bias is not None:
        if dense is not None and dense.dtype != torch.bool:
            dense = bias + dense
        elif dense is not None:
            dense = torch.where(dense, bias, -torch.inf)
        else:
            dense = bias[..., : k.shape[2]]
    scale = q.shape[3] ** -0.5 if given["scaling"] is None else float(given["scaling"])
    sinks = given.get("s_aux")
    return Operands(
        q,
        k,
        v,
        formula,
        scale,
        None if valid is None else valid.expand(q.shape[0], -1),
        dense if dense is None or dense.dtype == torch.bool else dense.to(q.dtype),
        float(given.get("softcap") or 0.0),
        None if sinks is None else sinks.detach(),
    )


def _dense(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Seen | Tensor | None, given: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """What ``sdpa`` would give or, where a cap or sinks are beyond it, the model's own eager attention."""
    tensor = mask.dense() if isinstance(mask, Seen) else mask
    if given.get("softcap") is None and given.get("s_aux") is None:
        out: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, q, k, v, tensor, **given)
        return out
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(f"{type(module).__name__} caps scores or has sinks, and has no eager attention.")
    if tensor is None and isinstance(mask, Seen):
        tensor = mask._tensor()
    if tensor is not None and tensor.dtype == torch.bool:
        lowest = torch.finfo(q.dtype).min
        tensor = torch.zeros_like(tensor, dtype=q.dtype).masked_fill(~tensor, lowest)
    given = {name: value for name, value in given.items() if name != "is_causal" and value is not None}
    eager_out: tuple[Tensor, Tensor | None] = eager(module, q, k, v, tensor, **given)
    return eager_out
