"""Attention as diffusers asks for it, through its dispatcher or past it: sparse as calibrated, all else native."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from afbs_compile.integrations.diffusers.canonical import Call, canonical
from afbs_compile.integrations.diffusers.dispatcher import native
from afbs_compile.integrations.diffusers.models import (
    Denoiser,
    calling,
    denoiser_of,
    enter,
    forget,
    learn,
    leave,
    model_on_the_stack,
)
from afbs_compile.passes.rules import FEWEST_ROWS

PARALLEL = "context parallel: a device sees a part of the rows or heads, and thresholds are those of whole calls"


def dispatched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The backend: long calls sparse, as calibrated, everything else as the native backend computes it.

    Args:
        query: ``[B, q_len, H, D]``; key, value: ``[B, k_len, H_kv, D]``.
        attn_mask: anything the native backend takes, ``[B, k_len]`` too.
        dropout_p, is_causal, scale, enable_gqa, return_lse: as the native backend has them.

    Returns:
        ``[B, q_len, H, D]``.
    """
    if not torch.compiler.is_compiling() and not return_lse:
        mask = attn_mask
        if mask is not None and mask.shape == (query.shape[0], key.shape[1]):
            mask = mask[:, None, None]
        q, k, v = (x.transpose(1, 2) if x.dim() == 4 else x for x in (query, key, value))
        reason = None if _parallel_config is None else PARALLEL
        out = attended(Call(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa), reason)
        if out is not None:
            return out.transpose(1, 2)
    return native(
        query,
        key,
        value,
        attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
        _parallel_config=_parallel_config,
    )


def attended(call: Call, reason: str | None = None) -> Tensor | None:
    """The result of a call, ``[B, H, q_len, D_v]``; ``None`` where it is to be computed densely.

    Args:
        call: of whichever module is running; reason: why it has to be dense in any case.
    """
    caller = calling()
    if caller is None:
        model = model_on_the_stack()
        if model is not None and denoiser_of(model) is None:  # this call is dense, those of the next modules are known
            attach(model, {}).begin_pass()
        return None
    denoiser, name = caller
    q_len, k_len = call.query.shape[-2], call.key.shape[-2]
    if q_len < FEWEST_ROWS or q_len * k_len < denoiser.settings.min_length**2:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in call[:3]):
        reason = reason or "gradients are asked for: sparse attention has none"
    operands = reason or canonical(call)
    if isinstance(operands, str):
        denoiser.served.refuse(name, operands)
        return None
    return denoiser.served.attend(name, operands)


class _DirectCalls(TorchFunctionMode):
    """While a module runs whose processor asks PyTorch for attention and not the dispatcher."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            out = attended(Call(*args, **(kwargs or {})))
            if out is not None:
                return out
        return func(*args, **(kwargs or {}))


def attach(model: nn.Module, options: Mapping[str, Any]) -> Denoiser:
    """Serve a model from now on: each module that has an attention processor says when it runs.

    Raises:
        OptionError: an option is unknown or out of range.
        RecipeError: the recipe is damaged or belongs to another model.
    """
    denoiser = learn(model, options)
    _unhook(model)
    model.register_forward_pre_hook(_begin_pass)
    for module in model.modules():
        if getattr(module, "processor", None) is not None:
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)
    return denoiser


def detach(model: nn.Module) -> None:
    """Leave a model as it was."""
    _unhook(model)
    forget(model)


def _unhook(model: nn.Module) -> None:
    """Take our hooks away, those too that came along when a model was copied."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_begin_pass, _enter, _leave)]:
                del hooks[key]


def _begin_pass(model: nn.Module, _: Any) -> None:
    denoiser = denoiser_of(model)
    if denoiser is not None and not torch.compiler.is_compiling():
        denoiser.begin_pass()


def _enter(module: nn.Module, _: Any) -> None:
    if not torch.compiler.is_compiling():
        uses_dispatcher = hasattr(module.processor, "_attention_backend")
        enter(module, nullcontext() if uses_dispatcher else _DirectCalls())


def _leave(module: nn.Module, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        leave(module)
