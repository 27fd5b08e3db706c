"""What happens where things go wrong: recipes made wrong, caches in every state, processes killed at any moment.

    python benchmarks/faults.py [--out benchmarks/results/faults_cpu.txt]

Counts what was lost and which results were wrong, of a small model on the CPU, in a few minutes; ends with 1 if there
was any. What is promised stands in docs/reliability.md.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # threads do not outlive a fork

import argparse
import logging
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faults_cache
import faults_kills
import faults_memory
import faults_recipes
import torch
from common import environment
from faults_model import OPTIONS, cache_in, compiled, ended_well, graph, in_child, inputs, model, without_clock
from torch import Tensor

import afbs_compile

SEED_RECIPE = Path(__file__).parent.parent / "tests" / "data" / "recipe_schema3.json"
"""Mutations begin with one of today's and with one of version 0.1."""

WORKERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2000, help="of recipes")
    parser.add_argument("--kills", type=int, default=100, help="of processes")
    parser.add_argument("--out", type=Path, help="write what is printed there, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.ERROR)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    about = environment()
    say(f"commit {about['commit']}, {about['date']}, {about['device']}, {about['versions']}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        failures = _all(Path(name), options, say)
    say(f"{failures} failures in {time.monotonic() - began:.0f} s")
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(failures > 0)


def _all(folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run every campaign; how many failures there were."""
    with without_clock(), cache_in(folder / "undisturbed"):
        expected = compiled()
        recipe = afbs_compile.calibrate(model(), [inputs()], **OPTIONS)
    texts = [recipe.to_json(), SEED_RECIPE.read_text(encoding="utf-8")]
    outcomes = faults_recipes.campaign(texts, graph(), folder, options.mutations)
    refused, loaded = outcomes.pop("refused", 0), outcomes.pop("loaded", 0)
    say(f"recipes: {options.mutations} mutations: {refused} refused in one sentence, {loaded} loaded and usable")
    for what in ("exception", "nonsense", "unbounded sentence", "slow"):
        say(f"  {what}: {outcomes.get(what, 0)}")
    wrong = faults_cache.campaign(folder / "situations", expected)
    say(f"caches: {len(faults_cache.SITUATIONS)} situations, each compiled in: {len(wrong)} wrong")
    together = _together(folder, expected)
    say(f"at once: {WORKERS} processes, {WORKERS} threads, a fork, a spawned process: {len(together)} wrong")
    memory = faults_memory.campaign(folder)
    say(f"memory: calibration in too little of it, {len(faults_memory.ROOM)} limits: {len(memory)} wrong")
    interrupted = faults_kills.interrupts(folder, expected, options.kills // 5)
    say(f"interrupts: {options.kills // 5} by SIGINT while compiling: {len(interrupted)} wrong")
    tenth = options.kills // 10
    kills = faults_kills.campaign(
        folder, recipe, expected, compilations=4 * tenth, writes=options.kills - 5 * tenth, exports=tenth
    )
    counts = ", ".join(f"{count} {what}" for what, count in kills.done.items())
    say(f"kills: {kills.done.total()} by SIGKILL: {counts} ({kills.finished} more came too late)")
    say(f"  lost: {len(kills.lost)}")
    say(f"  wrong results: {len(kills.wrong)}")
    failed = [*wrong, *together, *memory, *interrupted, *kills.lost, *kills.wrong]
    for line in failed:
        say(f"  {line}")
    return outcomes.total() + len(failed)


def _together(folder: Path, expected: Tensor) -> list[str]:
    """Processes and threads that do the same at once; what went wrong."""

    def work() -> None:
        if not torch.equal(compiled(), expected):
            raise AssertionError("another result")

    wrong = []
    with without_clock(), cache_in(folder / "at once") as cache:
        children = [in_child(work) for _ in range(WORKERS)]
        ended = [ended_well(child) for child in children]
        if not all(ended):
            wrong.append("processes: one failed, or has another result")
        if len(list(cache.iterdir())) != 1:
            wrong.append("processes: the cache has more than their entry")
        if not ended_well(in_child(work)):
            wrong.append("fork after all this: another result")
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            there = pool.apply(_spawned, (str(cache),))
        if not torch.allclose(there, expected, atol=1e-5):
            wrong.append("spawned process: another result")
        torch._dynamo.reset()
        sparse = torch.compile(model(), backend="afbs", options=OPTIONS)
        outputs: list[Tensor] = []
        threads = [threading.Thread(target=lambda: outputs.append(_called(sparse))) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(outputs) != WORKERS or not all(torch.equal(output, expected) for output in outputs):
            wrong.append("threads: one failed, or has another result")
    return wrong


@torch.no_grad()
def _called(function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(inputs())


def _spawned(cache: str) -> Tensor:
    """In a process of its own, with a recipe that another one cached."""
    with cache_in(Path(cache)):
        before = len(list(Path(cache).iterdir()))
        output = compiled()
        if len(list(Path(cache).iterdir())) != before:
            raise AssertionError("it did not find the recipe")
        return output


if __name__ == "__main__":
    main()
