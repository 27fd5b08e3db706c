"""What the user sees of a calibration: a bar on a terminal; elsewhere a line now, every 10 s, and at the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from afbs_compile.tuner.result import SiteResult

SECONDS_BETWEEN_LINES = 10.0

_log = logging.getLogger("afbs_compile")


class CalibrationProgress:
    """Counts finished sites; made by :func:`calibration_progress`."""

    def __init__(self, steps: _Steps) -> None:
        self._steps = steps
        self._heads = 0
        self._sparsity = 0.0

    def finished(self, result: SiteResult) -> None:
        """Count one site."""
        per_head = result.measured.sparsity if result.dense_reason is None else result.measured.sparsity * 0
        self._heads += len(per_head)
        self._sparsity += float(per_head.sum())
        self._steps.advance(f"{self._heads} heads, {self._sparsity / self._heads:.1%} sparse,")


@contextmanager
def calibration_progress(sites: int) -> Iterator[CalibrationProgress]:
    """Show progress on standard error while calibrating ``sites`` sites."""
    with _steps("calibrating attention", sites, "sites") as steps:
        yield CalibrationProgress(steps)


@contextmanager
def budget_progress(steps: int) -> Iterator[Callable[[], None]]:
    """Show progress on standard error while a budget is spent in ``steps`` steps; call what is yielded after each."""
    with _steps("spending the budget of attention", steps, "steps") as counted:
        yield counted.advance


def log_where_nobody_listens() -> None:
    """Let the lines of this package's logger reach standard error in a program that has configured no logging."""
    if not _log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("afbs: %(message)s"))
        _log.addHandler(handler)
        if _log.level == logging.NOTSET:
            _log.setLevel(logging.INFO)


class _Steps:
    """Steps of a known number, shown by a bar or, outside a terminal, told in lines."""

    def __init__(self, bar: Progress, what: str, total: int, unit: str) -> None:
        self._bar, self._what, self._total, self._unit = bar, what, total, unit
        self._task = bar.add_task(what, total=total, said=f"{unit},")
        self._done, self._said = 0, ""
        self._began = time.monotonic()

    def advance(self, said: str = "") -> None:
        """Count one; ``said`` is what is known so far."""
        self._done, self._said = self._done + 1, said
        self._bar.update(self._task, advance=1, said=f"{self._unit}, {said}" if said else f"{self._unit},")

    def line(self) -> str:
        """How far it is."""
        seconds = time.monotonic() - self._began
        said = f"{self._said} " if self._said else ""
        return f"{self._what}: {self._done} of {self._total} {self._unit}, {said}{seconds:.0f} s"


@contextmanager
def _steps(what: str, total: int, unit: str) -> Iterator[_Steps]:
    console = Console(stderr=True)
    left, right = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()), TimeElapsedColumn()
    columns = (*left, TextColumn("{task.fields[said]}"), right, TextColumn("gone,"), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("left"), console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        steps = _Steps(bar, what, total, unit)
        if console.is_terminal:
            yield steps
            return
        with _told(steps.line):
            yield steps


@contextmanager
def _told(line: Callable[[], str]) -> Iterator[None]:
    """Log a line now, at regular times, and at the end."""
    log_where_nobody_listens()
    over = threading.Event()

    def tell() -> None:
        while not over.wait(SECONDS_BETWEEN_LINES):
            _log.info(line())

    teller = threading.Thread(target=tell, name="afbs-progress", daemon=True)
    _log.info(line())
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
        _log.info(line())
