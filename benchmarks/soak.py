"""Does memory stay flat: thousands of calls of a rewritten model, and many compilations.

    python benchmarks/soak.py                    2,000 calls and 100 compilations, of two attention layers at 512 tokens

Calls run with a monitor that looks at one in ten and keeps inputs, which is what keeps most. Each compilation is of
a new model after ``torch._dynamo.reset()``; as many are made without us, for PyTorch keeps things too. Every part runs
in a process of its own, whose resident memory is read every so often; growth is the slope of a line through the
second half of the readings.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import RESULTS, process_bytes, save, settings
from faults_model import LENGTH, OPTIONS, cache_in, compiled, inputs, model, without_clock
from torch.nn.attention.flex_attention import flex_attention

from afbs_compile import Recipe
from tests.toy import HEAD_DIM, HEADS, drifting

PARTS = ("calls", "compilations", "compilations without us")
EVERY = {"calls": 50, "compilations": 5, "compilations without us": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--compilations", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(readings(arguments.part, arguments)))
        return
    result: dict[str, Any] = {}
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part, "--calls", str(arguments.calls)]
        command += ["--compilations", str(arguments.compilations)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        result[part] = {**found, "kilobytes_each": slope(found) / 1024}
        print(f"{part}: {len(found['resident'])} readings, {result[part]['kilobytes_each']:+.2f} KB each")
    save("soak_cpu", arguments.out, {"settings": settings(arguments), **result})


def slope(found: dict[str, Any]) -> float:
    """Bytes for each call or compilation, over the second half."""
    resident = found["resident"][len(found["resident"]) // 2 :]
    places = np.arange(len(resident)) * found["every"]
    return float(np.polyfit(places, resident, 1)[0])


def readings(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Resident bytes as often as the part says."""
    count = arguments.calls if part == "calls" else arguments.compilations
    with TemporaryDirectory() as folder, cache_in(Path(folder)), without_clock():
        step = _calling() if part == "calls" else compiled if part == "compilations" else compiled_without_us
        found = []
        for number in range(1, count + 1):
            step()
            if number % EVERY[part] == 0:
                gc.collect()
                found.append(process_bytes("VmRSS"))
        if part != PARTS[2]:
            (cached,) = map(Recipe.load, Path(folder).glob("*.json"))
            assert cached.sparsity > 0, "what runs was not rewritten"
    return {"every": EVERY[part], "resident": found}


def _calling() -> Callable[[], object]:
    """A call of the model under a monitor."""
    watching = {"share": 0.1, "keep": 4}
    sparse = torch.compile(model(), backend="afbs", options={**OPTIONS, "monitor": watching})
    seeds = iter(range(10**9))

    def call() -> None:
        with torch.no_grad():
            sparse(drifting(LENGTH, seed=next(seeds)))

    return call


def compiled_without_us() -> None:
    """Compile what a compilation of ours makes PyTorch compile, and call it: the model, and FlexAttention once."""
    torch._dynamo.reset()
    x = inputs()
    q = x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
    with torch.no_grad():
        torch.compile(model())(x)
        torch.compile(partial(flex_attention, q))(q, q)


if __name__ == "__main__":
    main()
