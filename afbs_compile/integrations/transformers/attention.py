"""The attention function that transformers calls under the name "afbs"."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from afbs_compile.integrations.transformers.masks import Seen
from afbs_compile.integrations.transformers.models import served_by, supports_sdpa
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands, check_operands
from afbs_compile.passes.rules import FEWEST_ROWS

BEYOND_SDPA = frozenset({"softcap", "s_aux"})
"""Arguments of a call that SDPA has no form for."""


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
    if query.shape[2] < FEWEST_ROWS and not kwargs.keys() & BEYOND_SDPA and not isinstance(attention_mask, Seen):
        # A decode step: what it pays for our being there is this line.
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **kwargs
        )
    given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias, **kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    if _is_candidate(query, dropout) and not (given.get("cache") is not None or given.get("output_attentions")):
        served = served_by(module)
        if served is not None and not served[0].leaves(served[1], query.shape[2], key.shape[2]):
            operands = _operands(module, query, key, value, attention_mask, given)
            out = _sparse(*served, operands)
            if out is not None:
                return out.transpose(1, 2).contiguous(), None  # engines leave nothing to copy
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
    formula, valid, dense = mask_of("full"), None, None
    causal = _is_causal(module, mask, given)
    known = mask.form(q.shape[2], k.shape[2], causal=causal) if isinstance(mask, Seen) else None
    if known is not None:
        formula, keys, valid = known
        k, v = k[:, :, :keys], v[:, :, :keys]
    else:
        dense = mask.dense() if isinstance(mask, Seen) else mask
        if dense is None and causal:
            formula = mask_of("causal")
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    bias = given.get("position_bias")
    if bias is not None:
        if dense is not None and dense.dtype != torch.bool:
            dense = bias + dense
        elif dense is not None:
            dense = torch.where(dense, bias, -torch.inf)
        else:
            dense = bias[..., : k.shape[2]]
    scale = float(given.get("scaling", q.shape[3] ** -0.5))
    sinks = given.get("s_aux")
    operands = Operands(
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
    try:
        check_operands(operands)
    except ValueError as error:
        return str(error)
    return operands


def _is_causal(module: nn.Module, mask: Seen | Tensor | None, given: dict[str, Any]) -> bool:
    """Whether a call that gets no mask is causal: eager attention does nothing that its mask does not say.

    A model that decides by whether there is a mask has seen ours, which SDPA may do without, and says no.
    """
    if not supports_sdpa(getattr(module, "config", None)):
        return False
    own: bool = getattr(module, "is_causal", True)
    return own or bool(given.get("is_causal")) if isinstance(mask, Seen) else given.get("is_causal", own)


def _dense(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Seen | Tensor | None, given: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """What ``sdpa`` would give or, where a cap or sinks are beyond it, the model's own eager attention."""
    tensor = mask.dense() if isinstance(mask, Seen) else mask
    by_sdpa = supports_sdpa(getattr(module, "config", None))
    if by_sdpa and "softcap" not in given and "s_aux" not in given:
        if tensor is None:
            given["is_causal"] = _is_causal(module, mask, given)
        out: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, q, k, v, tensor, **given)
        return out
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(f"{type(module).__name__} is beyond SDPA, and its module has no eager attention.")
    if tensor is None and isinstance(mask, Seen):
        tensor = mask.materialised()
    if tensor is not None and tensor.dtype == torch.bool:
        lowest = torch.finfo(q.dtype).min
        tensor = torch.zeros_like(tensor, dtype=q.dtype).masked_fill(~tensor, lowest)
    given.pop("is_causal", None)
    eager_out: tuple[Tensor, Tensor | None] = eager(module, q, k, v, tensor, **given)
    return eager_out
