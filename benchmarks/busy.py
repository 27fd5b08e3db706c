"""Does a busy machine decide as an idle one: calibrations of the shipped model beside processes that compute.

    python benchmarks/busy.py                            10 calibrations beside 4 processes, 3 without, at 4,096 tokens

Each calibration runs in a process of its own, with an empty cache. A call counts as decided alike if it is sparse, or
dense, in all idle calibrations and in a busy one; a call on which the idle ones differ among themselves has no right
answer and is counted apart. The machine has to be idle otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import RESULTS, SHIPPED_MODEL, load, save, settings, text_windows


def main() -> None:
    """Calibrate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--processes", type=int, default=4, help="that compute beside a busy calibration")
    parser.add_argument("--idle", type=int, default=3, help="calibrations on the idle machine")
    parser.add_argument("--busy", type=int, default=10, help="calibrations beside them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(calibration(given.length)))
        return
    idle = [_in_a_process(given.length) for _ in range(given.idle)]
    with computing(given.processes):
        busy = [_in_a_process(given.length) for _ in range(given.busy)]
    right = {name: outcome for name, outcome in idle[0]["outcomes"].items()
             if all(each["outcomes"][name] == outcome for each in idle)}  # fmt: skip
    alike = [sum(each["outcomes"][name] == outcome for name, outcome in right.items()) for each in busy]
    result = {
        "settings": settings(given),
        "calls": len(idle[0]["outcomes"]),
        "calls_on_which_idle_ones_agree": len(right),
        "right": dict(Counter(right.values())),
        "busy_calibrations_that_decide_all_of_them_alike": sum(number == len(right) for number in alike),
        "idle": idle,
        "busy": busy,
    }
    print(json.dumps({key: value for key, value in result.items() if key not in ("idle", "busy")}, indent=1))
    save(f"busy_7m_{given.length}_cpu", given.out, result)


def calibration(length: int) -> dict[str, Any]:
    """One calibration of the shipped model: the outcome and the times of every call."""
    import torch

    import afbs_compile

    model, tokenizer = load(SHIPPED_MODEL, "cpu", torch.float32)
    samples = text_windows(tokenizer, "topics", length, 1, "cpu")
    began = time.monotonic()
    recipe = afbs_compile.calibrate(model, samples)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "outcomes": {row.name: row.outcome for row in recipe.sites},
        "sparse_over_dense": {row.name: round((row.sparse_ms or 0) / (row.dense_ms or 1), 3) for row in recipe.sites},
        "unsure": sum(row.unsure for row in recipe.sites),
        "policies": sorted({policy for row in recipe.sites for policy in row.calibrated.policy}),
    }


def _in_a_process(length: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--once", "--length", str(length)],
            env={**os.environ, "AFBS_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


@contextmanager
def computing(count: int) -> Iterator[None]:
    """Processes that compute as long as the body runs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
