"""Prefill of a Llama on one device and in shards on several, dense and sparse: what do both gain together?

    torchrun --nproc-per-node 2 benchmarks/parallel.py                        two GPUs, 40m- and 8b-shaped
    torchrun --nproc-per-node 2 benchmarks/parallel.py --models tiny --lengths 1024 --min-length 256    CPUs, gloo

Weights are random, attention is structured: benchmarks/structured_llama.py says how. The four ways take turns: the
model in one piece on the first device, while the others wait, and in shards on all of them by tensor parallelism;
"dense" is SDPA as transformers calls it without a mask, "sparse" attn_implementation="afbs", calibrated on the first
call's inputs, which are not those that are timed. Seconds of a way are those of the slowest process, from when all are
ready until its device is done; a line says the median and the range.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, save, settings
from structured_llama import SHAPES, Shape, structured_llama, token_ids
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import afbs_compile
import afbs_compile.integrations.transformers as afbs

IMPLEMENTATIONS = {"dense": "sdpa", "sparse": "afbs"}


class Ranks:
    """The processes of this run.

    They agree on the host, whatever their devices do: one that waits must not keep its device busy.
    """

    def __init__(self) -> None:
        gpu = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl")
        else:
            dist.init_process_group("gloo")
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(self.device.type, (self.count,))

    def largest(self, value: float) -> float:
        """The largest of all processes' values; all have come this far."""
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def timed(self, call: Callable[[], Any] | None) -> float:
        """Seconds that the slowest process takes; ``None``: this one waits."""
        self.largest(0.0)
        began = time.perf_counter()
        if call is not None:
            call()
            self.synchronize()
        return self.largest(0.0 if call is None else time.perf_counter() - began)

    def synchronize(self) -> None:
        """Wait until this process's device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value."""
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)  # on the host, where a group has both backends
        return values


class Ways:
    """The models of one shape, by the number of devices that compute them, and how they are called."""

    def __init__(self, ranks: Ranks, shape: Shape, dtype: torch.dtype) -> None:
        self._ranks = ranks
        self._models: dict[int, Any] = {}
        if ranks.rank == 0:
            self._models[1] = structured_llama(shape, ranks.device, dtype)
        if ranks.count > 1:
            self._models[ranks.count] = structured_llama(shape, ranks.device, dtype, ranks.mesh)
        self.counts = sorted({1, ranks.count})

    def call(self, count: int, way: str, ids: Tensor) -> Callable[[], Tensor] | None:
        """One prefill, which gives the last token's logits; ``None`` where this process has no part in it."""
        model = self._models.get(count)
        if model is None:
            return None
        model.set_attn_implementation(IMPLEMENTATIONS[way])

        def prefill() -> Tensor:
            with torch.no_grad():
                logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            return logits

        return prefill

    def calibrate(self, count: int, ids: Tensor, options: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
        """Calibrate on a first call: its seconds, and every attention call of this process as records."""
        model = self._models.get(count)
        if model is not None:
            afbs.use(model, **options)
        seconds = self._ranks.timed(self.call(count, "sparse", ids))
        return seconds, [] if model is None else afbs_compile.explain(model).to_records()


def at_length(ranks: Ranks, ways: Ways, shape: Shape, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a length gives: recipes, then the ways in turns."""
    sample, prompt = (token_ids(shape, length, seed, ranks.device) for seed in (0, 1))
    result: dict[str, Any] = {}
    for count in ways.counts:
        seconds, records = ways.calibrate(count, sample, {"min_length": arguments.min_length})
        result[f"{count}: calibration"] = {"seconds": seconds, **summary(ranks.gathered(records)[:count])}
    names = [(count, way) for count in ways.counts for way in IMPLEMENTATIONS]
    logits, gib = {}, {}
    for name in names:  # whatever compiles has compiled after this
        logits[name], gib[name] = first_call(ranks, ways.call(*name, prompt))
    times: dict[tuple[int, str], list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            times[name].append(ranks.timed(ways.call(*name, prompt)))
    for (count, way), seen in times.items():
        spread = {"median": statistics.median(seen), "least": min(seen), "most": max(seen)}
        result[f"{count}: {way}"] = {"seconds": spread, "GiB of work": gib[count, way]}
        if ranks.rank == 0:
            line = "{median:9.4f} s ({least:.4f} to {most:.4f})".format(**spread)
            print(f"{length:>7} tokens, {count} x {way:<6}: {line}, {gib[count, way]:.1f} GiB of work")
    return result | compared(ways.counts, {name: statistics.median(seen) for name, seen in times.items()}, logits)


def first_call(ranks: Ranks, prefill: Callable[[], Tensor] | None) -> tuple[Tensor | None, float]:
    """The logits, and how much memory the fullest device takes for it beside what it holds; 0 on CPUs."""
    held = 0
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    logits = None if prefill is None else prefill().float()
    peak = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else 0
    return logits, ranks.largest((peak - held) / 2**30)


def compared(
    counts: list[int], seconds: dict[tuple[int, str], float], logits: dict[tuple[int, str], Tensor | None]
) -> dict[str, Any]:
    """Ratios of the medians, and how far the outputs are from that of one device and SDPA."""
    exact, distance = logits[1, "dense"], {}
    for (count, way), found in logits.items():
        if exact is not None and found is not None:
            distance[f"{count}: {way}"] = float((found - exact).norm() / exact.norm())
    return {
        "sparse against dense": {str(count): seconds[count, "dense"] / seconds[count, "sparse"] for count in counts},
        "scaling": {way: seconds[1, way] / seconds[counts[-1], way] for way in IMPLEMENTATIONS},
        "against one device, dense": {f"{c}: {way}": seconds[1, "dense"] / s for (c, way), s in seconds.items()},
        "relative distance of logits": distance,
    }


def summary(every: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Sparse calls and mean sparsity of each process, and why the others are not."""
    rows = [row for rows in every for row in rows]
    sparse = [row for row in rows if row["outcome"] == "sparse"]
    return {
        "calls sparse": f"{len(sparse)} of {len(rows)}",
        "mean sparsity of sparse calls": statistics.mean(row["sparsity"] for row in sparse) if sparse else 0.0,
        "calls, ms of all": {
            name: sum(row[name] or 0.0 for row in rows) / max(1, len(every)) for name in ("dense_ms", "sparse_ms")
        },
        "reasons": sorted({row["reason"] for row in rows if row["reason"]}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["40m", "8b"], choices=SHAPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--min-length", type=int, default=2048, help="of calls that are calibrated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="parallel", help="name of the result file")
    arguments = parser.parse_args()
    ranks = Ranks()
    results: dict[str, Any] = {}
    for name in arguments.models:
        shape = SHAPES[name]
        began = time.perf_counter()
        ways = Ways(ranks, shape, getattr(torch, arguments.dtype))
        ranks.synchronize()
        results[name] = {"seconds to build": ranks.largest(time.perf_counter() - began)}
        for length in arguments.lengths:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["AFBS_CACHE_DIR"] = cache
                results[name][str(length)] = at_length(ranks, ways, shape, length, arguments)
            if ranks.rank == 0:
                print({key: results[name][str(length)][key] for key in ("sparse against dense", "scaling")}, flush=True)
                save(arguments.name, arguments.out, {"settings": settings(arguments), "models": results})
        del ways
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
