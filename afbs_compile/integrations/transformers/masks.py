"""What rows see, as transformers says it: a formula and valid keys where they are all, the dense mask otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from afbs_compile.integrations.transformers.models import supports_sdpa
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.passes.rules import FEWEST_ROWS

MaskFunction = Callable[..., Any]

Form = tuple[Mask, int, Tensor | None]
"""A formula, how many of the keys it is over, and which of them are valid, ``None`` for all."""


OF_SHAPE = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_meta")),
        *(getattr(Tensor, name) for name in ("dim", "size", "numel", "is_floating_point", "__len__")),
    }
)
"""What is asked of a mask without a look at its content."""


class Seen(Tensor):
    """The mask of a long call: a tensor without data that any function of PyTorch makes the dense one of.

    Args:
        arguments: those of transformers' mask interface.
        make: transformers' function for the dense mask.
    """

    _arguments: dict[str, Any]
    _make: Callable[..., Tensor | None]
    _built: bool
    _made: Tensor | None
    _forms: dict[tuple[int, int, bool], Form | None]

    @staticmethod
    def __new__(cls, arguments: dict[str, Any], make: Callable[..., Tensor | None]) -> Seen:
        """``[B, 1, q_len, k_len]``."""
        size = arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"]
        dtype = torch.bool if make is masking_utils.sdpa_mask else arguments.get("dtype", torch.float32)
        seen = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=arguments.get("device", "cpu"))
        seen._arguments, seen._make, seen._built, seen._made = arguments, make, False, None
        seen._forms = {}
        return seen

    def __init__(self, *_: Any) -> None: ...

    def dense(self) -> Tensor | None:
        """``[B, 1, q_len, k_len]`` as the model's own attention takes it: bool or, for eager attention, added to the
        scores; ``None`` where SDPA's ``is_causal`` says it all.
        """
        if not self._built:
            self._made, self._built = self._make(**self._arguments), True
        return self._made

    def form(self, q_len: int, k_len: int, *, causal: bool) -> Form | None:
        """The mask by formula: the formula, how many of the keys it is over, and which of them are valid.

        ``None`` where there is no such form, or the keys are not those that the mask was asked for.

        Args:
            q_len, k_len: of the call; causal: whether the module that calls counts as causal without a mask.
        """
        asked = q_len, k_len, causal
        if asked not in self._forms:  # all layers share it: padding is looked at once, which waits for the device
            self._forms[asked] = self._form(q_len, k_len, causal)
        return self._forms[asked]

    def _form(self, q_len: int, k_len: int, causal: bool) -> Form | None:
        if (q_len, k_len) != (self._arguments["q_length"], self._arguments["kv_length"]):
            return None
        start, keys_start = int(self._arguments.get("q_offset", 0)), int(self._arguments.get("kv_offset", 0))
        text = _formula(self._arguments["mask_function"], keys_start)
        if text is None or (not causal and text == "causal_end" and self.dense() is None):
            return None  # SDPA gets no mask, and looks at the module
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

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A function that reads or computes gets the dense mask."""
        if func is Tensor.contiguous:  # generation asks every mask for this
            return args[0]
        if func not in OF_SHAPE:
            args, kwargs = torch.utils._pytree.tree_map(_as_dense, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """The same for what reaches PyTorch's dispatcher alone."""
        args, kwargs = torch.utils._pytree.tree_map(_as_dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def materialised(self) -> Tensor:
        """The dense mask for code that takes it apart, which a mask left out would surprise."""
        asked = {**self._arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        dense = self._make(**asked)
        assert dense is not None  # nothing is skipped
        return dense


def _as_dense(value: Any) -> Any:
    return value.materialised() if isinstance(value, Seen) else value


def mask_interface(**arguments: Any) -> Seen | Tensor | None:
    """transformers' mask interface: a :class:`Seen` for long calls, for short ones what SDPA gets."""
    if isinstance(made := arguments.get("attention_mask"), Seen):  # generate asks before the model does
        return made
    make = masking_utils.sdpa_mask if supports_sdpa(arguments.get("config")) else masking_utils.eager_mask
    short = arguments["q_length"] < FEWEST_ROWS
    if short or torch.compiler.is_compiling() or not isinstance(arguments["q_length"], int):
        return make(**arguments)
    return Seen(arguments, make)


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
