"""Text from a file, a folder of files, or the ``datasets`` library, which also reads files of records."""

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

RECORDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Files that hold records and not text, and the builder of ``datasets`` that reads them."""

USUAL_COLUMNS = ("text", "content")

SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
"""What ``save_to_disk`` leaves in a folder."""


def read_text(source: str, *, pieces: int, length: int, column: str | None = None) -> str:
    """The text of a source, thinned where it is far longer than ``pieces`` windows of ``length`` tokens need.

    Args:
        source: see the command line's help.
        pieces: windows wanted; length: tokens of each.
        column: of records, the one that holds the text; by default ``text``, ``content``, or the only one of texts.

    Raises:
        OptionError: there is no such text, or it cannot be read; one sentence.
    """
    path = Path(source)
    limit = CHARACTERS_PER_TOKEN * pieces * length
    if path.is_file():
        text = _file(path, limit, column)
    elif path.is_dir() and not any((path / name).exists() for name in SAVED):
        text = _folder(path, limit, column)
    elif match := DATASET.fullmatch(source):
        text = _dataset(source, limit, match["name"], match["config"], match["split"], match["column"] or column)
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


def _file(path: Path, limit: int, column: str | None) -> str:
    if builder := RECORDS.get(path.suffix.lower()):
        return _records(path, builder, limit, column)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"--data: {path} is not text: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise OptionError(f"--data: {path} cannot be read: {error.strerror}") from error


def _records(path: Path, builder: str, limit: int, column: str | None) -> str:
    datasets = _datasets()
    separator = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    try:
        rows = datasets.load_dataset(builder, data_files=str(path), split="train", **separator)
    except Exception as error:  # whatever a builder makes of a damaged file
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise OptionError(f"--data: {path} cannot be read as {builder} records ({reason[:200]})") from error
    return _joined(rows[_column(rows, str(path), column)], str(path), limit)


def _column(rows: Any, source: str, wanted: str | None) -> str:
    """The column that holds the text."""
    named = rows.column_names
    if wanted is not None:
        if wanted not in named:
            raise OptionError(f"--data: {source} has no column {wanted}; accepted: {', '.join(named)}")
        return wanted
    texts = [name for name in named if "string" in str(getattr(rows.features[name], "dtype", ""))]
    usual = [name for name in USUAL_COLUMNS if name in texts] or (texts if len(texts) == 1 else [])
    if not usual:
        raise OptionError(
            f"--data: which column of {source} holds the text is not known; give --text-column, one of "
            f"{', '.join(texts or named)}"
        )
    return usual[0]


def _datasets() -> Any:
    datasets = import_extra("datasets", "--data")
    if not terminal():
        datasets.disable_progress_bars()
    return datasets


def _folder(path: Path, limit: int, column: str | None) -> str:
    """All files below a folder in the order of their names, hidden ones and Python's caches apart."""
    found = sorted(p for p in path.rglob("*") if p.is_file())
    files = [p for p in found if not any(part.startswith((".", "__pycache__")) for part in p.relative_to(path).parts)]
    if not files:
        raise OptionError(f"--data: folder {path} has no file")
    return "\n\n".join(_file(file, limit, column) for file in files)


def _dataset(source: str, limit: int, name: str, config: str | None, split: str, column: str | None) -> str:
    datasets = _datasets()
    try:
        rows = _load(datasets, name, config or None, split)
    except Exception as error:  # a builder's own code, the network or the hub: all mean that there is no such text
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OptionError(f"--data: dataset {source} cannot be loaded ({reason[:200]})") from error
    return _joined(rows[_column(rows, name, column)], source, limit)


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
