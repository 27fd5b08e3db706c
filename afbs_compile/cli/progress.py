"""What the user sees while waiting: bars and spinners on standard error, nothing where that is not a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

T = TypeVar("T")


@contextmanager
def step(description: str) -> Iterator[None]:
    """Show a spinner with the time gone while the body runs."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        bar.add_task(description, total=None)
        yield


def each(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items while a bar counts them."""
    console = Console(stderr=True)
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        yield from bar.track(items, total=total, description=description)


def terminal() -> bool:
    """Whether someone watches standard error: where not, other libraries' bars are switched off too."""
    return Console(stderr=True).is_terminal
