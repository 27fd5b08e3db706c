"""Processes killed or interrupted at any moment: while they compile, while they write a recipe, while they export."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from faults_model import cache_in, compiled, ended_well, in_child, inputs, kill, model, without_clock
from torch import Tensor

from afbs_compile import Recipe
from afbs_compile.cache import read_cached, write_cached
from afbs_compile.errors import AfbsWarning
from afbs_compile.export import load, to_pt2

CHECK_EVERY = 10
"""Kills of a compilation after which another process compiles to its end, with whatever the killed ones left."""


@dataclass
class Kills:
    """What kills did.

    Attributes:
        done: by what was killed; finished: processes that were done before their time came, which count as no kill.
        lost: files that were there before and are not whole afterwards, each with what is wrong.
        wrong: results that differ from those of a process that nobody disturbed.
    """

    done: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def count(self, what: str, killed: bool) -> None:
        """Note that a process was killed, or ended before."""
        self.done[what] += killed
        self.finished += not killed


def campaign(folder: Path, recipe: Recipe, expected: Tensor, *, compilations: int, writes: int, exports: int) -> Kills:
    """Kill processes.

    Args:
        folder: to work in; recipe: of the model; expected: its sparse output.
        compilations, writes, exports: how many kills of each.
    """
    kills, rng = Kills(), random.Random(0)
    _kill_compilations(kills, rng, folder, expected, compilations)
    _kill_writes(kills, rng, folder, recipe, writes)
    _kill_exports(kills, rng, folder, recipe, exports)
    return kills


def _kill_compilations(kills: Kills, rng: random.Random, folder: Path, expected: Tensor, count: int) -> None:
    def work() -> None:
        if not torch.equal(compiled(), expected):
            raise AssertionError("another result")

    with without_clock():
        began = time.monotonic()
        with cache_in(folder / "alone"):
            if not ended_well(in_child(work)):
                raise SystemExit("the model does not compile even where nobody is killed")
        takes = time.monotonic() - began
        cache, number = folder / "kills 0", 0
        while kills.done["compiling"] < count:
            before = _entries(cache)
            with cache_in(cache):
                child = in_child(work)
                time.sleep(rng.uniform(0, takes))
                kills.count("compiling", kill(child))
                kills.lost += [f"{path} after a kill" for path in before if path not in _entries(cache)]
                number += 1
                if number % CHECK_EVERY == 0:
                    if not ended_well(in_child(work)):
                        kills.wrong.append(f"compilation {number}")
                    cache = folder / f"kills {number}"


def _entries(cache: Path) -> list[Path]:
    """The entries that can be read; one that cannot is an error of its own."""
    paths = list(cache.glob("*.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)
        return [path for path in paths if read_cached(path) is not None]


def _kill_writes(kills: Kills, rng: random.Random, folder: Path, recipe: Recipe, count: int) -> None:
    path = folder / "writes" / f"{'0' * 32}.json"
    two = (recipe, replace(recipe, device="another"))
    write_cached(path, recipe)

    def work() -> None:
        while True:
            for each in two:
                write_cached(path, each)

    while kills.done["writing"] < count:
        child = in_child(work)
        time.sleep(rng.uniform(0, 0.2))
        kills.count("writing", kill(child))
        with warnings.catch_warnings():
            warnings.simplefilter("error", AfbsWarning)
            try:
                if read_cached(path) not in two:
                    kills.lost.append("a recipe after a killed write")
            except AfbsWarning as damage:
                kills.lost.append(str(damage))


def _kill_exports(kills: Kills, rng: random.Random, folder: Path, recipe: Recipe, count: int) -> None:
    path = folder / "model.pt2"
    with torch.no_grad():
        began = time.monotonic()
        to_pt2(model(), recipe, inputs(), path)
        takes = time.monotonic() - began
        expected = load(path)(inputs())[0]
        while kills.done["exporting"] < count:
            child = in_child(lambda: to_pt2(model(), recipe, inputs(), path))
            time.sleep(rng.uniform(0, takes))
            kills.count("exporting", kill(child))
            if not torch.equal(load(path)(inputs())[0], expected):
                kills.wrong.append("a file after a killed export")


def interrupts(folder: Path, expected: Tensor, count: int) -> list[str]:
    """Interrupt processes by SIGINT while they compile: each compiles again, with nothing left behind.

    Args:
        folder: to work in; expected: the model's sparse output; count: interrupts.
    """

    def interrupted() -> None:
        try:
            compiled()
        except KeyboardInterrupt:
            if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
                raise AssertionError("a mode was left behind") from None

    def work() -> None:
        interrupted()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not torch.equal(compiled(), expected):
            raise AssertionError("another result")

    wrong, rng = [], random.Random(1)
    with without_clock():
        for number in range(count):
            with cache_in(folder / f"interrupts {number}"):
                child = in_child(work)
                time.sleep(rng.uniform(0.1, 2.0))
                os.kill(child, signal.SIGINT)
                if not ended_well(child):
                    wrong.append(f"interrupt {number}")
    return wrong
