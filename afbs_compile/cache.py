"""The folder of recipes that lets a second process, or a new length, start without calibrating."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import platformdirs

from afbs_compile.errors import AfbsWarning, RecipeError
from afbs_compile.recipe import Recipe

ENVIRONMENT_VARIABLE = "AFBS_CACHE_DIR"


def cache_folder() -> Path:
    """``$AFBS_CACHE_DIR`` if set, else the user's cache folder for afbs-compile."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if named else platformdirs.user_cache_path("afbs-compile")


def cache_path(conditions: dict[str, Any]) -> Path:
    """File of the recipe made under these conditions: a plain dictionary of everything that must be equal."""
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{key[:32]}.json"


def read_cached(path: Path) -> Recipe | None:
    """The cached recipe, or ``None``; a damaged file is reported and counts as absent."""
    if not path.exists():
        return None
    try:
        return Recipe.load(path)
    except RecipeError as error:
        warnings.warn(f"{error} Calibrating again.", AfbsWarning, stacklevel=2)
        return None


def write_cached(path: Path, recipe: Recipe) -> None:
    """Store the recipe; a folder that cannot be written is reported, and the model compiles all the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe.save(path)
    except OSError as error:
        warnings.warn(
            f"the recipe was not cached in {path.parent} ({error.strerror}): the next process and each new length "
            f"calibrate again; set {ENVIRONMENT_VARIABLE} to a writable folder.",
            AfbsWarning,
            stacklevel=2,
        )
