"""The folder of recipes that lets a second process, or a new length, start without calibrating.

Whoever can write into it decides what a model computes: folder and entries are made for their owner alone, and what
others may write is not used. An entry carries a digest of its content. Whatever is wrong with it is told in a sentence,
and the model compiles all the same.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import platformdirs

from afbs_compile.errors import AfbsWarning, RecipeError
from afbs_compile.files import read_regular, write_whole
from afbs_compile.recipe import LARGEST, Recipe

ENVIRONMENT_VARIABLE = "AFBS_CACHE_DIR"

WRITABLE_BY_OTHERS = 0o022

LEFT_OVER = f".{'[0-9a-f]' * 32}.*"
"""Names of the folders that :func:`afbs_compile.files.whole_file` writes an entry in; a killed process leaves one."""

SURELY_LEFT = 24 * 3600.0
"""Seconds after which nobody is still writing."""


def cache_folder() -> Path:
    """``$AFBS_CACHE_DIR`` if set, else the user's cache folder for afbs-compile."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if named else platformdirs.user_cache_path("afbs-compile")


def cache_path(conditions: dict[str, Any], kind: str = "") -> Path:
    """File of what was made under some conditions.

    Args:
        conditions: a plain dictionary of everything that must be equal; kind: begins the name, nothing for recipes.
    """
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{kind}{key[:32]}.json"


def read_cached(path: Path) -> Recipe | None:
    """The cached recipe, or ``None``; a file that is damaged or not to be trusted is reported and counts as absent."""
    try:
        text = read_private(path, LARGEST).decode("utf-8")
        return Recipe.from_json(text, f"recipe {path}", sealed=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = f"the cached recipe {path} cannot be used: {error.strerror}."
    except UnicodeDecodeError:
        reason = f"recipe {path} is damaged: it is not text."
    except RecipeError as error:
        reason = str(error)
    warnings.warn(f"{reason} Calibrating again.", AfbsWarning, stacklevel=2)
    return None


def write_cached(path: Path, recipe: Recipe) -> None:
    """Store the recipe; a folder that cannot be written or trusted is reported, and the model compiles all the same."""
    try:
        write_private(path, recipe.to_json(sealed=True))
    except OSError as error:
        warnings.warn(
            f"the recipe was not cached in {path.parent} ({error.strerror}): the next process and each new length "
            f"calibrate again; set {ENVIRONMENT_VARIABLE} to a writable folder of your own.",
            AfbsWarning,
            stacklevel=2,
        )


def read_private(path: Path, most: int) -> bytes:
    """A file of the cache.

    Raises:
        OSError: it cannot be read, has more than so many bytes, or others may write it or its folder.
    """
    _check_trusted(os.stat(path.parent))
    return read_regular(path, most, _check_trusted)


def write_private(path: Path, text: str) -> None:
    """Write a file of the cache, whole or not at all, for its owner alone.

    Raises:
        OSError: the folder cannot be made or written, or others may write it.
    """
    folder = path.parent
    if folder.parts[:1] == ("~",):  # neither $HOME nor the system's list of users says where it is
        raise OSError(errno.ENOENT, "there is no home folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_trusted(os.stat(folder))
    write_whole(path, text, private=True)
    _remove_left_overs(folder)


def _check_trusted(status: os.stat_result) -> None:
    """Refuse a file or folder that somebody else may write.

    Raises:
        OSError: saying why.
    """
    if not hasattr(os, "geteuid"):  # Windows keeps the cache below the user's own folder, and has no such bits
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise OSError(errno.EPERM, "it belongs to another user, whose recipes are not trusted")
    if status.st_mode & WRITABLE_BY_OTHERS:
        raise OSError(errno.EPERM, "others may write it, and their recipes are not trusted")


def _remove_left_overs(folder: Path) -> None:
    for left in folder.glob(LEFT_OVER):
        if time.time() - left.stat().st_mtime > SURELY_LEFT:
            shutil.rmtree(left, ignore_errors=True)
