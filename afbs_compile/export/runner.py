"""An exported file as a function of tensors, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from afbs_compile.errors import OptionError
from afbs_compile.export.files import Note
from afbs_compile.recipe import Recipe


class Runner:
    """A loaded file; call it with the model's tensors.

    Attributes:
        inputs: names of the tensor arguments, in order.
        recipe: what the file was made with, without the search paths.
    """

    def __init__(self, note: Note, run: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
        self.inputs = note.inputs
        self.recipe: Recipe = note.recipe
        self._run = run

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        """Run the file.

        Args:
            args, kwargs: the tensors, by position or by name.

        Returns:
            The model's tensors, flattened in its order: of a language model the logits come first.

        Raises:
            OptionError: a tensor is missing, given twice, or unknown.
        """
        return tuple(self._run(_ordered(self.inputs, args, kwargs)))


def _ordered(names: Sequence[str], args: Sequence[Tensor], kwargs: Mapping[str, Any]) -> list[Tensor]:
    given = dict(zip(names, args, strict=False))
    twice = [name for name in given if name in kwargs]
    given.update(kwargs)
    if len(args) > len(names) or twice or set(given) != set(names):
        came = ", ".join([f"{len(args)} by position", *kwargs])
        raise OptionError(f"inputs: got {came}; accepted: one tensor for each of {', '.join(names)}")
    return [given[name] for name in names]


@torch.no_grad()
def call_as_exported(call: Any, note: Note, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Call a loaded program with its arguments as they were exported, and flatten what it returns."""
    args = tensors[: note.positional]
    kwargs = dict(zip(note.inputs[note.positional :], tensors[note.positional :], strict=True))
    return [leaf for leaf in pytree.tree_leaves(call(*args, **kwargs)) if isinstance(leaf, Tensor)]
