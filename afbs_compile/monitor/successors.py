"""Recipes that follow others: why they do, and where they are kept."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from afbs_compile.errors import AfbsWarning
from afbs_compile.files import write_whole
from afbs_compile.monitor.monitor import Alarm
from afbs_compile.options import Options
from afbs_compile.recipe import Change, Recipe
from afbs_compile.tuner.settings import TuneSettings

_log = logging.getLogger("afbs_compile")


def change_after(alarms: Sequence[Alarm]) -> Change:
    """What led to another calibration now."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    if not alarms:
        return Change(when, "asked for", ())
    return Change(when, alarms[-1].reason, tuple(f"{name} head {head}" for name, head in alarms[-1].heads))


def tuning_again(recipe: Recipe) -> TuneSettings:
    """How a model is calibrated again: as it was."""
    return replace(Options.parse(recipe.options).tuning, reduced=True)


def place_beside(path: Path) -> Path:
    """A file beside a recipe's that is not there yet: ``recipe.1.json`` for ``recipe.json``."""
    free = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
    return next(place for place in free if not place.exists())


def save_successor(recipe: Recipe, place: Path) -> None:
    """Write it; what fails is said, and the model goes on."""
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(place, recipe.to_json(), private=True)
        _log.info("saved %s", place)
    except OSError as error:
        warnings.warn(f"afbs monitor: the new recipe was not saved: {error.strerror}", AfbsWarning, stacklevel=2)
