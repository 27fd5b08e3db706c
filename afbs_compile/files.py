"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary path beside the target, moved over it on success and removed on any failure or interruption.

    Raises:
        OSError: the folder is missing or not writable.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}.") as folder:
        temporary = Path(folder) / target.name
        yield temporary
        os.replace(temporary, target)


def write_whole(target: Path, text: str) -> None:
    """Write a text file so."""
    with whole_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
