"""Does a busy machine decide as an idle one: calibrations of a model beside processes that compute.

    python benchmarks/busy.py               the shipped model, 4,096 tokens: 3 calibrations alone, 10 beside 4 processes
    python benchmarks/busy.py --model M --length 32768 --dtype bfloat16 --name busy_40m_32k_h100   on a GPU

The others compute where the model does: on the GPU where there is one. Each calibration runs in a process of its own,
with an empty cache. A call counts as decided alike if it is sparse, or dense, in all idle calibrations and in a busy
one; a call on which the idle ones differ among themselves has no right answer and is counted apart. The machine has to
be idle otherwise.
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

OTHER_WORK = """
import torch
gpu = torch.cuda.is_available()
x = torch.ones(4096, 4096, device="cuda") if gpu else None
print("computing", flush=True)
while True:
    if gpu:
        x @ x
        torch.cuda.synchronize()
"""


def main() -> None:
    """Calibrate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help="folder of a causal language model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tolerance", type=float, help="of every head, by default the budget that the package has")
    parser.add_argument("--processes", type=int, default=4, help="that compute beside a busy calibration")
    parser.add_argument("--idle", type=int, default=3, help="calibrations on the idle machine")
    parser.add_argument("--busy", type=int, default=10, help="calibrations beside them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="busy_7m_4096_cpu", help="name of the result file")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(calibration(given)))
        return
    idle = [_in_a_process() for _ in range(given.idle)]
    with computing(given.processes):
        busy = [_in_a_process() for _ in range(given.busy)]
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
    save(given.name, given.out, result)


def calibration(given: argparse.Namespace) -> dict[str, Any]:
    """One calibration: the outcome and the times of every call."""
    import torch

    import afbs_compile

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(given.model, device, getattr(torch, given.dtype))
    samples = text_windows(tokenizer, "topics", given.length, 1, device)
    began = time.monotonic()
    recipe = afbs_compile.calibrate(model, samples, tolerance=given.tolerance)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "outcomes": {row.name: row.outcome for row in recipe.sites},
        "sparse_over_dense": {row.name: round((row.sparse_ms or 0) / (row.dense_ms or 1), 3) for row in recipe.sites},
        "unsure": sum(row.unsure for row in recipe.sites),
        "policies": sorted({policy for row in recipe.sites for policy in row.calibrated.policy}),
    }


def _in_a_process() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--once"],
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
    processes = [subprocess.Popen([sys.executable, "-c", OTHER_WORK], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None, "it is a pipe"
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
