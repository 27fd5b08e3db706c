"""One model input as an exporter needs it: tensors apart from constants, sizes that may differ marked as free."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from afbs_compile.errors import OptionError

Example = Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor
"""One model input: keyword arguments, positional ones, or a single tensor."""


@dataclass(frozen=True)
class ExportInputs:
    """An example, split.

    Attributes:
        names: of all tensors, the positional ones first.
        args, kwargs: tensors, by position and by name.
        constants: keyword arguments that are no tensors; they become part of the file.
    """

    names: tuple[str, ...]
    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    constants: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> ExportInputs:
        """Split an example.

        Raises:
            OptionError: it holds no tensor, tensors inside containers, or positional values that are no tensors.
        """
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(example, Mapping):
            kwargs = dict(example)
        else:
            args = tuple(example) if isinstance(example, tuple | list) else (example,)
        for position, value in enumerate(args):
            if not isinstance(value, Tensor):
                raise OptionError(
                    f"example[{position}]: got {type(value).__name__}; accepted: tensors by position, and a mapping "
                    "for other arguments"
                )
        for name, value in kwargs.items():
            if not isinstance(value, Tensor) and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                raise OptionError(f"example[{name!r}]: got tensors inside a {type(value).__name__}; accepted: a tensor")
        args = tuple(value.contiguous() for value in args)  # compiled files expect the layout of the example
        tensors = {name: value.contiguous() for name, value in kwargs.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in kwargs.items() if name not in tensors}
        if not args and not tensors:
            raise OptionError("example: got no tensor; accepted: one input of the model, with at least one")
        return cls((*_positional_names(model, len(args)), *tensors), args, tensors, constants)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of ``names``."""
        return (*self.args, *self.kwargs.values())

    def doubled(self) -> ExportInputs:
        """The same with a batch of 1 doubled: torch.export takes a size of 1 for fixed.

        What counts as the batch is a first dimension of size 1 that all tensors of two or more dimensions share.
        """
        wide = [value for value in self.tensors if value.dim() >= 2]
        if not wide or any(value.shape[0] != 1 for value in wide):
            return self

        def double(value: Tensor) -> Tensor:
            return torch.cat([value, value]) if value.dim() >= 1 and value.shape[0] == 1 else value

        return ExportInputs(
            self.names,
            tuple(map(double, self.args)),
            {name: double(value) for name, value in self.kwargs.items()},
            self.constants,
        )

    def free_sizes(self, forward: Any) -> dict[str, Any]:
        """``dynamic_shapes`` for torch.export, in which the model decides which sizes it can leave free."""
        bound = inspect.signature(forward).bind(*self.args, **self.kwargs)
        free: dict[str, Any] = pytree.tree_map(
            lambda value: dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO), dict(bound.arguments)
        )
        return free


def _positional_names(model: nn.Module, count: int) -> list[str]:
    """Names of the first parameters of ``forward``; numbered ones where it takes any number."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [named[i] if i < len(named) else f"input_{i}" for i in range(count)]
