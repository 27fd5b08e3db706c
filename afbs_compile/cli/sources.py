"""SRC of the command line: texts, a dataset, a file of inputs, or random; always a list of model inputs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afbs_compile.cli.input_files import SUFFIXES, read_inputs
from afbs_compile.cli.models import LoadedModel, import_extra
from afbs_compile.cli.progress import step
from afbs_compile.cli.texts import read_text
from afbs_compile.errors import OptionError

Sample = dict[str, Any]
"""Keyword arguments of one call of the model."""

SAMPLES = 5
"""Samples by default: the paper validates on five inputs."""

LENGTH = 4096
"""Tokens of a sample by default; less where the model has fewer positions."""


class Reading(NamedTuple):
    """How text is found and made tokens.

    Attributes:
        tokenizer: folder or id, where the model's own will not do.
        text_column: of records, the one that holds the text.
    """

    tokenizer: str | None = None
    text_column: str | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Reading:
        """As the flags say."""
        return cls(arguments.tokenizer, arguments.text_column)


READING = Reading()


def takes_length(source: str, model: LoadedModel) -> bool:
    """Whether inputs of this source can be asked for at a length: texts can, and random ids."""
    if source == "random":
        return getattr(model.module, "main_input_name", None) == "input_ids"
    return Path(source).suffix.lower() not in SUFFIXES


def load_samples(
    source: str,
    model: LoadedModel,
    *,
    length: int | None = None,
    count: int | None = None,
    reading: Reading = READING,
) -> list[Sample]:
    """Model inputs from a source, on the model's device and in its dtype.

    Args:
        source: see the command line's help.
        model: what they are for.
        length: tokens of each sample of a text, or of random ids; by default :data:`LENGTH`.
        count: samples wanted; by default :data:`SAMPLES`, or as many as there are.
        reading: how text is found and made tokens.

    Raises:
        OptionError: the source is missing, unreadable, too short, or does not fit the model; one sentence.
    """
    model.check_length(length)
    with step(f"reading {source}"):
        if source == "random":
            return [_random(model, length, seed) for seed in range(count or SAMPLES)]
        if Path(source).suffix.lower() in SUFFIXES:
            if length is not None:
                raise OptionError(f"--seq-len: not accepted with {source}, whose inputs have their own lengths")
            return read_inputs(Path(source), model, count)
        return _text_windows(source, model, length, count, reading)


def _text_windows(
    source: str, model: LoadedModel, length: int | None, count: int | None, reading: Reading
) -> list[Sample]:
    length = length or min(LENGTH, model.positions or LENGTH)
    text = read_text(source, pieces=count or SAMPLES, length=length, column=reading.text_column)
    tokens = _tokens(text, model, reading.tokenizer or model.tokenizer)
    found = len(tokens) // length
    if found < (count or 1):
        wanted = f"{count} windows of {length}" if count else f"one window of {length}"
        raise OptionError(f"--data: {source} has {len(tokens)} tokens, too few for {wanted}")
    number = count or min(SAMPLES, found)
    starts = torch.linspace(0, len(tokens) - length, number).long().tolist() if number > 1 else [0]
    return [{"input_ids": tokens[None, start : start + length].contiguous().to(model.device)} for start in starts]


def _tokens(text: str, model: LoadedModel, tokenizer: str | None) -> Tensor:
    """All tokens of a text, ``[n]``, without special ones."""
    if tokenizer is None:
        raise OptionError(f"--data: text needs a tokenizer, and {model.spec} has none; give --tokenizer, or inputs.npz")
    transformers = import_extra("transformers", "--data")
    try:
        encode = transformers.AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(f"--tokenizer: none can be loaded from {tokenizer}") from error
    tokens = torch.tensor(encode(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    known = getattr(model.config, "vocab_size", None)
    if known is not None and tokens.numel() and int(tokens.max()) >= known:
        raise OptionError(f"--tokenizer: {tokenizer} makes tokens that {model.spec}, with {known}, does not know")
    return tokens


def _random(model: LoadedModel, length: int | None, seed: int) -> Sample:
    """An input of the right shape; which one it is depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    name = getattr(model.module, "main_input_name", None)
    config = model.config
    if name == "input_ids" and hasattr(config, "vocab_size"):
        size = (1, length or min(LENGTH, model.positions or LENGTH))
        return {name: torch.randint(config.vocab_size, size, generator=generator).to(model.device)}
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int) and length is None:
        image = torch.randn(1, config.num_channels, config.image_size, config.image_size, generator=generator)
        return {name: image.to(model.device, model.dtype)}
    if model.program is not None and model.program.example_inputs is not None and length is None:
        return _like_the_example(model, generator)
    raise OptionError(
        f"--data: got random, but what {model.spec} takes {'at --seq-len ' if length else ''}is not known here; "
        "accepted: a file of inputs (.npz, .pt, .safetensors)"
    )


def _like_the_example(model: LoadedModel, generator: torch.Generator) -> Sample:
    """What a program was exported with: floats drawn anew, whole numbers kept, for their range is not known."""
    assert model.program is not None
    assert model.program.example_inputs is not None
    args, kwargs = model.program.example_inputs
    if args:
        raise OptionError(
            f"--data: got random, but {model.spec} takes positional arguments; accepted: a file of inputs"
        )

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator).to(value.device, value.dtype)

    return {name: draw(value) for name, value in kwargs.items()}
