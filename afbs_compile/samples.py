"""Bind the samples a user gives to the placeholders of a captured graph."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from afbs_compile.errors import OptionError
from afbs_compile.fingerprint import belongs_to_module, placeholders

_drained: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
"""What generators gave, for as long as these live."""

_drained_others: dict[int, tuple[Iterable[Any], list[Any]]] = {}
"""What iterators gave that cannot be referred to weakly, by ``id``; kept with it, so that the id stays its own."""


def materialised(samples: Iterable[Any]) -> list[Any]:
    """All samples; an iterator is drained once and remembered, for Dynamo may compile the model again."""
    if isinstance(samples, Sequence):
        return list(samples)
    if inspect.isgenerator(samples):
        if samples not in _drained:
            _drained[samples] = list(samples)
        return _drained[samples]
    if id(samples) not in _drained_others:
        _drained_others[id(samples)] = (samples, list(samples))
    return _drained_others[id(samples)][1]


def forget_samples() -> None:
    """Let go of what iterators gave, but for generators that still live: nothing else has their samples."""
    _drained_others.clear()


def tensors_of(samples: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of the samples as they were given, mappings in the order of their keys."""
    for sample in samples:
        values: Iterable[Any] = sample if isinstance(sample, tuple | list) else [sample]
        if isinstance(sample, Mapping):
            values = [sample[key] for key in sorted(sample)]
        yield from (value for value in values if isinstance(value, Tensor))


def bind(gm: fx.GraphModule, example_inputs: Sequence[Any], samples: Sequence[Any]) -> list[list[Any]]:
    """Placeholder values for each sample.

    A mapping binds by argument name; where the first call passed one tensor, any sample with one tensor binds to it.
    Parameters, buffers and sizes keep the values of the first call. A tensor that is longer than the graph's in one
    dimension is split into disjoint windows of the graph's length, a sample each; what is left over is not used.

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
    """Position -> (argument name, example) of the tensors that the caller passed, in graph order."""
    found = {}
    for position, (node, value) in enumerate(placeholders(gm, example_inputs)):
        if isinstance(value, Tensor) and not belongs_to_module(node, value):
            found[position] = (re.sub(r"^L_+(kwargs_+)?|_+$", "", str(node.target)), value)
    return found


def _by_argument(sample: Any, names: Sequence[str], index: int) -> dict[str, Tensor]:
    """A graph orders its inputs by first use, so only one tensor, or tensors with names, can be told apart."""
    if isinstance(sample, Mapping) and all(name in sample for name in names):
        return {name: sample[name] for name in names}
    single = [sample]
    if isinstance(sample, Mapping):
        single = list(sample.values())
    elif isinstance(sample, tuple | list):
        single = list(sample)
    if len(single) == len(names) == 1 and isinstance(single[0], Tensor):
        return {names[0]: single[0]}
    came = f"the arguments {', '.join(sample)}" if isinstance(sample, Mapping) else f"{len(single)} values"
    raise OptionError(
        f"samples[{index}]: got {came}; accepted: a mapping with the tensors {', '.join(names)}, as the first call "
        "passed them, or a single tensor where that has one; afbs_compile.calibrate takes any input of the model"
    )


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
