"""Files that appear whole or not at all, and files that may be anything."""

from __future__ import annotations

import errno
import io
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary path beside the target, moved over it on success and removed on any failure or interruption.

    Raises:
        OSError: the folder is missing or not writable.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}.") as folder:
        temporary = Path(folder) / target.name
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())  # else a power cut may leave the name without the content
        os.replace(temporary, target)


@contextmanager
def written_by_foreign_code(path: Path) -> Iterator[io.FileIO]:
    """A new file for a writer in C++, which may end the process where a write fails.

    Raises:
        OSError: the first write that failed, once the writer is done.
    """
    with _Patient(path, "wb") as file:
        yield file
        if file.failure is not None:
            raise file.failure


class _Patient(io.FileIO):
    failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        count = len(left)
        try:
            while left and self.failure is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.failure = error
        return count


def write_whole(target: Path, text: str, *, private: bool = False) -> None:
    """Write a text file so.

    Args:
        target: its path; text: its content.
        private: nobody else may read it.
    """
    with whole_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
        if private:
            temporary.chmod(0o600)


def read_regular(path: Path, most: int, trusted: Callable[[os.stat_result], None] = lambda _: None) -> bytes:
    """The content of a file. A pipe or a device, which may never end, is not read.

    Args:
        path: of the file; most: bytes that are accepted.
        trusted: raises where the file must not be used.

    Raises:
        OSError: it cannot be read, is no regular file, or has more bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # to open a pipe waits for its writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        trusted(status)
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most >> 20} MiB")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)
