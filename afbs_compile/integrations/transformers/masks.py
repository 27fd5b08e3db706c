"""What rows see, as transformers says it: a formula and valid keys where they are all, the dense mask otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.passes.rules import FEWEST_ROWS

MaskFunction = Callable[..., Any]


class Seen:
    """The mask of a long call. Whoever wants a tensor gets the dense one: it behaves like it, and is it once asked.

    Args:
        arguments: those of transformers' mask interface.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._dense: Tensor | None = None
        self._built = False

    def dense(self) -> Tensor | None:
        """The mask as SDPA takes it, bool ``[B, 1, q_len, k_len]``; ``None`` where ``is_causal`` says it all."""
        if not self._built:
            self._dense, self._built = masking_utils.sdpa_mask(**self._arguments), True
        return self._dense

    def form(self, q_len: int, k_len: int) -> tuple[Mask, int, Tensor | None] | None:
        """The mask by formula: the formula, how many of the keys it is over, and which of them are valid.

        ``None`` where there is no such form, or the keys are not those that the mask was asked for.
        """
        if (q_len, k_len) != (self._arguments["q_length"], self._arguments["kv_length"]):
            return None
        start, keys_start = int(self._arguments.get("q_offset", 0)), int(self._arguments.get("kv_offset", 0))
        text = _formula(self._arguments["mask_function"], keys_start)
        if text is None:
            return None
        keys = k_len
        if text != "full":
            keys = start - keys_start + q_len  # further ones are the unused end of a static cache
            if not q_len <= keys <= k_len or (text.startswith("around") and keys != k_len):
                return None
        padding = self._arguments.get("attention_mask")
        valid = None if padding is None else _valid(padding, keys_start, keys)
        if valid is not None and valid.shape[1] != keys:
            return None
        return mask_of(text), keys, valid

    @property
    def shape(self) -> torch.Size:
        """``[B, 1, q_len, k_len]``."""
        return torch.Size([self._arguments["batch_size"], 1, self._arguments["q_length"], self._arguments["kv_length"]])

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    def contiguous(self) -> Seen:
        """The mask itself: generation asks every mask for this."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A function of PyTorch gets the dense mask."""
        args, kwargs = torch.utils._pytree.tree_map(_as_dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        return self._tensor()[index]

    def _tensor(self) -> Tensor:
        """The dense mask for code that takes it apart, which a mask left out would surprise."""
        asked = {**self._arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        dense = masking_utils.sdpa_mask(**asked)
        assert dense is not None  # nothing is skipped
        return dense


def _as_dense(value: Any) -> Any:
    return value._tensor() if isinstance(value, Seen) else value


def mask_interface(**arguments: Any) -> Seen | Tensor | None:
    """transformers' mask interface: a :class:`Seen` for long calls, for short ones what SDPA gets."""
    if isinstance(made := arguments.get("attention_mask"), Seen):  # generate asks before the model does
        return made
    short = arguments["q_length"] < FEWEST_ROWS
    if short or torch.compiler.is_compiling() or not isinstance(arguments["q_length"], int):
        return masking_utils.sdpa_mask(**arguments)
    return Seen(arguments)


def _valid(padding: Tensor, first: int, keys: int) -> Tensor | None:
    """Keys that are no padding, bool ``[B, keys]``; ``None`` where all are. A cache's later keys are none."""
    padded = F.pad(padding, (0, max(0, first + keys - padding.shape[1])))
    valid = padded[:, first : first + keys].bool()
    return None if bool(valid.all()) else valid


def _formula(function: MaskFunction, keys_start: int) -> str | None:
    """The text of a mask that one of transformers' mask functions is; ``None`` where it is none of ours."""
    causal = False
    others = []
    for part in _parts(function):
        name = _name(part)
        held = inspect.getclosurevars(part).nonlocals if name else {}
        if name == "causal_mask_function":
            causal = True
        elif name == "sliding_window_overlay":
            others.append(f"window({held['sliding_window']})")
        elif name == "sliding_window_bidirectional_overlay":
            others.append(f"around({held['sliding_window']},{held['sliding_window']})")
        elif name == "chunked_overlay" and keys_start == 0 and not bool(held["left_padding"].any()):
            others.append(f"chunk({held['chunk_size']})")
        elif name != "bidirectional_mask_function":
            return None
    if len(others) > 1 or (others and causal == others[0].startswith("around")):
        return None
    return others[0] if others else "causal_end" if causal else "full"


def _parts(function: MaskFunction) -> list[MaskFunction]:
    """The functions that all have to say yes."""
    if _name(function) != "and_masks":
        return [function]
    return [part for each in inspect.getclosurevars(function).nonlocals["mask_functions"] for part in _parts(each)]


def _name(function: MaskFunction) -> str | None:
    """Which of transformers' own functions it is, or was made by."""
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    return function.__qualname__.partition(".")[0]
