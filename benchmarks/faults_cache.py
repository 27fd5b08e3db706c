"""Situations that a cache may be found in, each of which ends with the right output."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import platformdirs
import pytest
import torch
from faults_model import cache_in, compiled, without_clock
from torch import Tensor

from afbs_compile import Recipe
from afbs_compile.cache import ENVIRONMENT_VARIABLE, read_cached, write_cached

Situation = Callable[[Path, pytest.MonkeyPatch], object]
"""Makes a situation of a cached entry, given its path: a file that is there, in a folder of its own."""


def _edited(change: Callable[[str], str | bytes]) -> Situation:
    def edit(path: Path, _: pytest.MonkeyPatch) -> None:
        made = change(path.read_text())
        path.write_bytes(made if isinstance(made, bytes) else made.encode())

    return edit


def _replaced(make: Callable[[Path], object]) -> Situation:
    def replaced(path: Path, _: pytest.MonkeyPatch) -> None:
        path.unlink()
        make(path)

    return replaced


def _resealed(change: Callable[[Recipe], Recipe]) -> Situation:
    """An entry whose digest is right and whose content is another one's."""
    return lambda path, _: write_cached(path, change(Recipe.load(path)))


def _of_other_weights(recipe: Recipe) -> Recipe:
    return replace(recipe, graphs=tuple(replace(graph, weights="0", tensors=()) for graph in recipe.graphs))


def _moved_to(folder: Path) -> Situation:
    return lambda _, patch: patch.setenv(ENVIRONMENT_VARIABLE, str(folder))


def _without_home(_: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HOME", raising=False)


def _without_any_home(_: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv(ENVIRONMENT_VARIABLE)
    patch.setattr(platformdirs, "user_cache_path", lambda name: Path("~/.cache") / name)


def _linked(path: Path, patch: pytest.MonkeyPatch) -> None:
    link = path.parent.with_name("link")
    link.symlink_to(path.parent)
    patch.setenv(ENVIRONMENT_VARIABLE, str(link))


def _dangling(path: Path, patch: pytest.MonkeyPatch) -> None:
    link = path.parent.with_name("link")
    link.symlink_to(path.parent.with_name("nowhere"))
    patch.setenv(ENVIRONMENT_VARIABLE, str(link))


def _of_another_user(path: Path, patch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    patch.setattr(os, "geteuid", lambda: user + 1)
    if user == 0:
        os.chown(path, 12345, -1)


def _full(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Every file that grows beyond a block fails, as on a full disk, while the recipe is written."""
    path.unlink()
    write = Path.write_text

    def limited(self: Path, *args: object, **options: object) -> int:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return write(self, *args, **options)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    patch.setattr(Path, "write_text", limited)


def _left_over(path: Path, _: pytest.MonkeyPatch) -> None:
    folder = path.parent / f".{path.stem}.abcdefgh"
    folder.mkdir()
    (folder / path.name).write_text(path.read_text()[:1000])
    path.unlink()


SITUATIONS: dict[str, Situation] = {
    "entry as it was written": lambda path, patch: None,
    "no folder": lambda path, patch: patch.setenv(ENVIRONMENT_VARIABLE, str(path.parent / "no" / "folder")),
    "no entry": _replaced(lambda path: None),
    "empty": _edited(lambda text: ""),
    "cut off": _edited(lambda text: text[: len(text) // 2]),
    "zeros, as after a power cut": _edited(lambda text: bytes(len(text))),
    "no text": _edited(lambda text: b"\xff\xfe" + text.encode()),
    "one byte changed": _edited(lambda text: text.replace("0.9", "0.1", 1)),
    "1e400": _edited(lambda text: text.replace("0.9", "1e400", 1)),
    "nested 100,000 times": _edited(lambda text: "[" * 100_000 + "]" * 100_000),
    "twice the content": _edited(lambda text: text + text),
    "without a digest": _edited(lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"})),
    "of a newer schema": _edited(lambda text: json.dumps({**json.loads(text), "schema_version": 99})),
    "of other weights, sealed": _resealed(_of_other_weights),
    "of another device, sealed": _resealed(lambda recipe: replace(recipe, device="cuda", engine="hopper")),
    "larger than any recipe": lambda path, _: os.truncate(path, 2**40),
    "a pipe": _replaced(lambda path: os.mkfifo(path)),
    "a device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a folder": _replaced(lambda path: path.mkdir()),
    "a link to nowhere": _replaced(lambda path: path.symlink_to(path.with_name("nowhere"))),
    "a link to itself": _replaced(lambda path: path.symlink_to(path)),
    "others may write it": lambda path, _: path.chmod(0o666),
    "others may write the folder": lambda path, _: path.parent.chmod(0o777),
    "of another user": _of_another_user,
    "the folder is a link": _linked,
    "the folder is a link to nowhere": _dangling,
    "the folder is a file": _moved_to(Path(__file__)),
    "the folder cannot be made": _moved_to(Path("/proc/afbs/cache")),
    "no $HOME": _without_home,
    "no home at all": _without_any_home,
    "full disk": _full,
    "what a killed process left": _left_over,
}

TAMPERED = ("one byte changed", "without a digest", "others may write it", "of another user")
"""Situations after which the entry must have been made anew."""


@contextmanager
def situation(folder: Path, name: str, text: str, key: str) -> Iterator[Path]:
    """The path of an entry in a situation.

    Args:
        folder: to make the cache in; name: of the situation; text: of the entry; key: its file's name.
    """
    with cache_in(folder / "cache") as cache, pytest.MonkeyPatch.context() as patch:
        cache.mkdir(mode=0o700, parents=True)
        path = cache / key
        path.write_text(text)
        path.chmod(0o600)
        SITUATIONS[name](path, patch)
        yield path


def campaign(folder: Path, expected: Tensor) -> list[str]:
    """Compile in every situation; what went wrong in which.

    Args:
        folder: to work in; expected: the model's sparse output.
    """
    wrong = []
    with without_clock():
        with cache_in(folder / "first"):
            compiled()
            (entry,) = (folder / "first").iterdir()
        text = entry.read_text()
        for number, name in enumerate(SITUATIONS):
            try:
                with situation(folder / str(number), name, text, entry.name) as path:
                    output = compiled()
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}"[:300])
                continue
            if not torch.equal(output, expected):
                wrong.append(f"{name}: another output")
            if name in TAMPERED and (os.stat(path).st_mode & 0o777 != 0o600 or read_cached(path) is None):
                wrong.append(f"{name}: the entry was not made anew")
    return wrong
