"""Weights that accelerate keeps on the host or on disk: their values, and where the model computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn


def values_of(model: nn.Module, inside: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and values of parameters and buffers; of those that are elsewhere for now, what accelerate keeps of them.

    Args:
        model: whose; inside: what names have to begin with.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.startswith(inside):
            yield name, _kept(model, name, tensor) if tensor.is_meta else tensor


def _kept(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    path, _, own = name.rpartition(".")
    for hook in _hooks(model.get_submodule(path)):
        if hook.weights_map is not None:
            with suppress(KeyError):  # a buffer that is not offloaded
                tensor = hook.weights_map[own]
    return tensor


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, whatever keeps its weights."""
    for module in model.modules():
        for hook in _hooks(module):
            if hook.offload and hook.execution_device is not None:
                device: int | str | torch.device = hook.execution_device
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    tensor = next((each for each in (*model.parameters(), *model.buffers()) if not each.is_meta), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks that move a module's weights."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if hasattr(each, "weights_map") and hasattr(each, "execution_device"):
            yield each
