"""Bind the samples a user gives to the placeholders of a captured graph."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from afbs_compile.errors import OptionError

_drained: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def materialised(samples: Iterable[Any]) -> list[Any]:
    """All samples; an iterator is drained once and remembered, for Dynamo may compile the model again."""
    if isinstance(samples, Sequence):
        return list(samples)
    if samples not in _drained:
        _drained[samples] = list(samples)
    return _drained[samples]


def tensors_of(samples: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of the samples as they were given, mappings in the order of their keys."""
    for sample in samples:
        values: Iterable[Any] = sample if isinstance(sample, tuple | list) else [sample]
        if isinstance(sample, Mapping):
            values = [sample[key] for key in sorted(sample)]
        yield from (value for value in values if isinstance(value, Tensor))


def bind(gm: fx.GraphModule, example_inputs: Sequence[Any], samples: Sequence[Any]) -> list[list[Any]]:
    """Placeholder values for each sample.

    A mapping binds by argument name, a tensor or tuple binds in order. Parameters, buffers and sizes keep the values
    of the first call. A tensor that is longer than the graph's in one dimension is split into disjoint windows of
    the graph's length, a sample each; what is left over at the end is not used.

    Raises:
        OptionError: a sample lacks an argument, has too many, or does not fit the graph's shapes.
    """
    arguments = _arguments(gm, example_inputs)
    if not samples:
        raise OptionError("samples: got none; accepted: an iterable of at least one model input")
    bound = []
    for index, sample in enumerate(samples):
        values = _by_argument(sample, [name for name, _ in arguments.values()], index)
        for window in _windows(values, dict(arguments.values()), index):
            row = list(example_inputs)
            for position, (name, _) in arguments.items():
                row[position] = window[name]
            bound.append(row)
    return bound


def _arguments(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, tuple[str, Tensor]]:
    """Position -> (argument name, example) of the tensors that the caller passed, in graph order.

    Dynamo names a placeholder after where the value came from: ``L_input_ids_``, ``L_args_0_``,
    ``L_kwargs_input_ids_``; what belongs to the module starts with ``L_self_``.
    """
    found = {}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        module_owned = isinstance(value, torch.nn.Parameter) or re.search(r"_(buffers|parameters)_", str(node.target))
        if isinstance(value, Tensor) and not module_owned:
            name = re.sub(r"^L_+(kwargs_+)?|_+$", "", str(node.target))
            found[position] = (name, value)
    return found


def _by_argument(sample: Any, names: Sequence[str], index: int) -> dict[str, Tensor]:
    if isinstance(sample, Mapping):
        if missing := [name for name in names if name not in sample]:
            raise OptionError(
                f"samples[{index}]: got the arguments {', '.join(sample)}; accepted: a mapping with "
                f"{', '.join(names)} (missing: {', '.join(missing)})"
            )
        return {name: sample[name] for name in names}
    values = list(sample) if isinstance(sample, tuple | list) else [sample]
    if len(values) != len(names) or not all(isinstance(value, Tensor) for value in values):
        raise OptionError(
            f"samples[{index}]: got {len(values)} values; accepted: {len(names)} tensors ({', '.join(names)})"
        )
    return dict(zip(names, values, strict=True))


def _windows(values: Mapping[str, Tensor], examples: Mapping[str, Tensor], index: int) -> list[dict[str, Tensor]]:
    """The sample cut to the graph's length: one window, or several disjoint ones."""
    counts = {name: _split(values[name], example, name, index) for name, example in examples.items()}
    several = [len(pieces) for pieces in counts.values() if len(pieces) > 1]
    number = min(several, default=1)
    return [
        {name: pieces[i] if len(pieces) > 1 else pieces[0] for name, pieces in counts.items()} for i in range(number)
    ]


def _split(value: Tensor, example: Tensor, name: str, index: int) -> list[Tensor]:
    longer = [d for d in range(value.ndim) if value.ndim == example.ndim and value.shape[d] != example.shape[d]]
    fits = value.ndim == example.ndim and value.dtype == example.dtype
    if not fits or len(longer) > 1 or any(value.shape[d] < example.shape[d] for d in longer):
        raise OptionError(
            f"samples[{index}]: {name} is {value.dtype} {list(value.shape)}; accepted: {example.dtype} "
            f"{list(example.shape)} as in the first call, or longer in one dimension"
        )
    value = value.to(example.device)
    if not longer:
        return [value]
    size = int(example.shape[longer[0]])
    return [piece for piece in value.split(size, longer[0]) if piece.shape[longer[0]] == size]
