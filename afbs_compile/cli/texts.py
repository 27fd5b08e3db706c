"""Text from a file, a folder of files, or the ``datasets`` library."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from afbs_compile.cli.models import import_extra
from afbs_compile.cli.progress import terminal
from afbs_compile.errors import OptionError

CHARACTERS_PER_TOKEN = 64
"""A text longer than this for each token wanted is thinned first: tokenising gigabytes for five windows is waste."""

# NAME[:CONFIG]:SPLIT[COLUMN]; a split may be sliced, e.g. train[:10%], so only a plain word in brackets is a column.
DATASET = re.compile(
    r"(?P<name>[^:\[\]]+)(:(?P<config>[^:\[\]]*))?:(?P<split>\w[^:]*?(\[[^\]]*:[^\]]*\])?)(\[(?P<column>\w+)\])?"
)

SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
"""What ``save_to_disk`` leaves in a folder."""


def read_text(source: str, *, pieces: int, length: int) -> str:
    """The text of a source, thinned where it is far longer than ``pieces`` windows of ``length`` tokens need.

    Raises:
        OptionError: there is no such text, or it cannot be read; one sentence.
    """
    path = Path(source)
    limit = CHARACTERS_PER_TOKEN * pieces * length
    if path.is_file():
        text = _file(path)
    elif path.is_dir() and not any((path / name).exists() for name in SAVED):
        text = _folder(path)
    elif match := DATASET.fullmatch(source):
        text = _dataset(source, limit, **match.groupdict())
    elif path.is_dir():
        raise OptionError(
            f"--data: {source} is a saved dataset; accepted: {source}:SPLIT[COLUMN], e.g. {source}:train[text]"
        )
    else:
        raise OptionError(f"--data: there is no file or folder {source}, and a dataset is written NAME:SPLIT[COLUMN]")
    if not text.strip():
        raise OptionError(f"--data: {source} has no text")
    return _thinned(text, limit, pieces)


def _thinned(text: str, limit: int, pieces: int) -> str:
    """``pieces`` stretches spread over a text that is longer than the limit."""
    if len(text) <= limit:
        return text
    size = limit // pieces
    starts = [(len(text) - size) * i // max(1, pieces - 1) for i in range(pieces)]
    return "\n".join(text[start : start + size] for start in starts)


def _file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"--data: {path} is not text: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise OptionError(f"--data: {path} cannot be read: {error.strerror}") from error


def _folder(path: Path) -> str:
    """All files below a folder in the order of their names, hidden ones and Python's caches apart."""
    found = sorted(p for p in path.rglob("*") if p.is_file())
    files = [p for p in found if not any(part.startswith((".", "__pycache__")) for part in p.relative_to(path).parts)]
    if not files:
        raise OptionError(f"--data: folder {path} has no file")
    return "\n\n".join(_file(file) for file in files)


def _dataset(source: str, limit: int, name: str, config: str | None, split: str, column: str | None) -> str:
    datasets = import_extra("datasets", "--data")
    if not terminal():
        datasets.disable_progress_bars()
    try:
        rows = _load(datasets, name, config or None, split)
    except Exception as error:  # a builder's own code, the network or the hub: all mean that there is no such text
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OptionError(f"--data: dataset {source} cannot be loaded ({reason[:200]})") from error
    column = column or "text"
    if column not in rows.column_names:
        raise OptionError(f"--data: {name} has no column {column}; accepted: {', '.join(rows.column_names)}")
    return _joined(rows[column], source, limit)


def _load(datasets: Any, name: str, config: str | None, split: str) -> Any:
    """A split of a saved dataset, of a file (``json:FILE:train``, also csv, text, parquet), or of the hub."""
    if any((Path(name) / marker).exists() for marker in SAVED):
        saved = datasets.load_from_disk(name)
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    if config is not None and Path(config).exists():
        return datasets.load_dataset(name, data_files=config, split=split)
    return datasets.load_dataset(name, config, split=split)


def _joined(rows: Iterable[Any], source: str, limit: int) -> str:
    """Rows one after the other, until they are more than enough."""
    texts: list[str] = []
    size = 0
    for row in rows:
        if not isinstance(row, str):
            raise OptionError(f"--data: {source} holds a {type(row).__name__}; accepted: a column of texts")
        texts.append(row)
        size += len(row)
        if size > limit:
            break
    return "\n".join(texts)
