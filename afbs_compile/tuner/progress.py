"""A progress bar for calibration: sites, heads, mean sparsity so far, time left. Quiet when not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from afbs_compile.tuner.result import SiteResult


class CalibrationProgress:
    """Counts finished sites; made by :func:`calibration_progress`."""

    def __init__(self, bar: Progress, sites: int) -> None:
        self._bar = bar
        self._task = bar.add_task("calibrating attention", total=sites, heads=0, sparsity=0.0)
        self._heads = 0
        self._sparsity = 0.0

    def finished(self, result: SiteResult) -> None:
        """Count one site."""
        per_head = result.measured.sparsity if result.dense_reason is None else result.measured.sparsity * 0
        self._heads += len(per_head)
        self._sparsity += float(per_head.sum())
        self._bar.update(self._task, advance=1, heads=self._heads, sparsity=self._sparsity / self._heads)


@contextmanager
def calibration_progress(sites: int) -> Iterator[CalibrationProgress]:
    """Show a bar on standard error while calibrating ``sites`` sites."""
    with _bar(TextColumn("sites, {task.fields[heads]} heads, {task.fields[sparsity]:.1%} sparse,")) as bar:
        yield CalibrationProgress(bar, sites)


@contextmanager
def budget_progress(steps: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error while a budget is spent in ``steps`` steps; call what is yielded after each."""
    with _bar(TextColumn("steps,")) as bar:
        task = bar.add_task("spending the budget", total=steps)
        yield lambda: bar.advance(task)


def _bar(middle: TextColumn) -> Progress:
    console = Console(stderr=True)
    left, right = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()), TimeElapsedColumn()
    columns = (*left, middle, right, TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left"))
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
