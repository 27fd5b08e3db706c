"""The cache: made for its owner alone, and whatever else lies there is told of and not used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from afbs_compile import Recipe
from afbs_compile.cache import ENVIRONMENT_VARIABLE, cache_folder, cache_path, read_cached, write_cached
from afbs_compile.errors import AfbsWarning
from tests.test_recipe import OLD

CONDITIONS = {"graph": "g"}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load(OLD)


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of an entry in a folder that is not there yet."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "made" / "cache"))
    return cache_path(CONDITIONS)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000])
def test_folder_and_files_are_their_owners_alone(path, recipe, umask):
    before = os.umask(umask)
    try:
        write_cached(path, recipe)
    finally:
        os.umask(before)
    assert mode(path.parent) == 0o700
    assert mode(path) == 0o600
    assert list(path.parent.iterdir()) == [path]
    assert read_cached(path) == recipe


def test_nothing_cached_is_no_reason_to_warn(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_cached(path) is None


def made(path: Path, how: Callable[[Path], object]) -> None:
    path.unlink()
    how(path)


SITUATIONS = {
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "damaged"),
    "no text": (lambda p: p.write_bytes(b"\xff\xfe\x00"), "is not text"),
    "a number changed": (lambda p: p.write_text(p.read_text().replace("0.965988", "0.765988")), "has the digest"),
    "an exponent changed": (lambda p: p.write_text(p.read_text().replace("0.539538", "1e400")), "not finite|digest"),
    "without a digest": (lambda p: Recipe.load(p).save(p), "has the digest"),
    "others may write it": (lambda p: p.chmod(0o666), "others may write it"),
    "a group may write it": (lambda p: p.chmod(0o660), "others may write it"),
    "others may write the folder": (lambda p: p.parent.chmod(0o777), "others may write it"),
    "a pipe": (lambda p: made(p, os.mkfifo), "is not a regular file"),
    "a folder": (lambda p: made(p, Path.mkdir), "is not a regular file"),
    "a device": (lambda p: made(p, lambda q: q.symlink_to("/dev/zero")), "is not a regular file"),
    "a loop": (lambda p: made(p, lambda q: q.symlink_to(q)), "symbolic links"),
    "too large": (lambda p: os.truncate(p, 2**40), "more than 256 MiB"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_is_wrong_is_told_and_not_used(path, recipe, situation):
    write_cached(path, recipe)
    damage, sentence = SITUATIONS[situation]
    damage(path)
    with pytest.warns(AfbsWarning, match=sentence) as told:
        assert read_cached(path) is None
    assert str(told[0].message).endswith("Calibrating again.")
    if situation not in ("a folder", "others may write the folder"):
        write_cached(path, recipe)
        assert read_cached(path) == recipe


def test_nothing_is_written_where_others_may_write(path, recipe):
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o777)
    with pytest.warns(AfbsWarning, match="not cached in .*others may write it, and their recipes are not trusted"):
        write_cached(path, recipe)
    assert not list(path.parent.iterdir())


def test_what_belongs_to_another_user_is_not_used(path, recipe, monkeypatch):
    write_cached(path, recipe)
    owner = path.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    if owner == 0:  # whom everybody trusts
        assert read_cached(path) == recipe
        os.chown(path, 12345, -1)
    with pytest.warns(AfbsWarning, match="belongs to another user"):
        assert read_cached(path) is None


def test_without_a_home_folder_nothing_is_cached(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: Path("~/.cache") / name)
    with pytest.warns(AfbsWarning, match="there is no home folder.*AFBS_CACHE_DIR"):
        write_cached(cache_path(CONDITIONS), recipe)
    assert not list(tmp_path.iterdir())
    assert cache_folder() == Path("~/.cache/afbs-compile")


def test_a_full_disk_is_told_and_leaves_nothing(path, recipe, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(AfbsWarning, match="not cached in .*No space left on device"):
        write_cached(path, recipe)
    assert not list(path.parent.iterdir())


def test_what_a_killed_process_left_is_removed_after_a_day(path, recipe):
    path.parent.mkdir(parents=True, mode=0o700)
    days = {"old": 2, "young": 0, "another": 2}
    left = {name: path.parent / f".{path.stem}.{name}" for name in days}
    left["another"] = path.parent / ".config.d"
    for name, folder in left.items():
        folder.mkdir()
        (folder / path.name).write_text("{")
        os.utime(folder, (0, folder.stat().st_mtime - days[name] * 86400))
    write_cached(path, recipe)
    assert [name for name, folder in left.items() if folder.exists()] == ["young", "another"]
