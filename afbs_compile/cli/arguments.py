"""Arguments that several commands share, and checks that need no model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from afbs_compile.errors import OptionError
from afbs_compile.options import Option, Options, whole_number

DTYPES = ("float32", "bfloat16", "float16")
MODEL_HELP = "folder, id, package.module:factory or .pt2; see below"


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``least`` on."""

    def parse(text: str) -> int:
        try:
            number = whole_number(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; accepted: a whole number, at least {least}")
        return number

    return parse


def share(text: str) -> float:
    """A number between 0 and 1, both excluded or 1 included."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: a number between 0 and 1")
    return number


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, by position, and how to load it."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_placement(parser)


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Where and in which precision a model is loaded."""
    parser.add_argument(
        "--device", metavar="D", help="where the model runs (default: cuda where there is one, else cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights (default: the checkpoint's own on an accelerator, float32 on the CPU)",
    )


def add_data(parser: argparse.ArgumentParser, *, required: bool = False, default: str | None = None) -> None:
    """The inputs."""
    note = "" if default is None else f" (default: {default})"
    parser.add_argument("--data", metavar="SRC", required=required, default=default, help=f"inputs; see below{note}")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="folder or id of the tokenizer (default: the model's; text needs one)"
    )
    parser.add_argument(
        "--text-column", metavar="NAME", help="column of records with the text (default: text, content or the only one)"
    )


def add_length(parser: argparse.ArgumentParser, note: str) -> None:
    """One length of all samples."""
    parser.add_argument("--seq-len", metavar="N", type=whole(1), help=f"tokens of a sample ({note})")


def add_samples(parser: argparse.ArgumentParser) -> None:
    """How many samples."""
    parser.add_argument(
        "--samples", metavar="K", type=whole(1), help="number of samples (default: 5, or as many as there are)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Machine-readable output."""
    parser.add_argument("--json", action="store_true", help="print JSON on standard output instead of text")


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """A flag for each option that is read from text."""
    for option in options:
        if option.text is not None:
            written = f" Written {option.written}." if option.written else ""
            default = "" if option.default is None else f" (default: {option.default})"
            parser.add_argument(
                option.flag,
                dest=option.name,
                type=_reader(option),
                default=option.default,
                help=f"{option.meaning}{written}{default}".replace("%", "%%"),
            )


def given(arguments: argparse.Namespace, options: Iterable[Option], **other: Any) -> dict[str, Any]:
    """The values of :func:`add_options` by the options' names, checked together before anything slow begins.

    Args:
        arguments: as parsed; options: as added.
        other: values that the command has from elsewhere.

    Raises:
        OptionError: they do not go together.
    """
    named = {option.name: getattr(arguments, option.name) for option in options if option.text is not None}
    Options.parse({**named, **other})
    return {**named, **other}


def _reader(option: Option) -> Callable[[str], Any]:
    """Reads an option and checks it alone; how options go together :func:`given` checks."""

    def read(text: str) -> Any:
        assert option.text is not None
        try:
            value = option.text(text)
        except ValueError:
            value = text
        accepts, accepted = option.rules[0]
        if not accepts(value, {}):
            written = f", written {option.written}" if option.written else ""
            raise argparse.ArgumentTypeError(f"got {text!r}; accepted: {accepted}{written}")
        return value

    return read


def output_file(path: str, suffixes: Sequence[str], option: str = "-o") -> Path:
    """Where to write, checked before anything slow begins.

    Raises:
        OptionError: the extension is not accepted, the folder is missing or cannot be written, or it is a folder.
    """
    target = Path(path)
    folder = target.parent
    if target.suffix.lower() not in suffixes:
        raise OptionError(f"{option}: got {path}; accepted: a file name that ends in {' or '.join(suffixes)}")
    if target.is_dir():
        raise OptionError(f"{option}: got {path}, which is a folder; accepted: the name of a file")
    if not folder.is_dir():
        raise OptionError(f"{option}: got {path}; accepted: a file in a folder that exists, and {folder} does not")
    if not os.access(folder, os.W_OK):
        raise OptionError(f"{option}: got {path}; accepted: a file in a folder that can be written, unlike {folder}")
    return target


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write, e.g. a full disk, into one sentence."""
    try:
        yield
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror or error}") from error
