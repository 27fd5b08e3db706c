"""The attention kernels against every peer that is installed: speed, error and roofline of each, in one run.

    python benchmarks/kernels.py                         the whole table of this machine: GPU cases, or CPU cases
    python benchmarks/kernels.py --cases causal-32k-70 predictor
    python benchmarks/kernels.py --quick                 an eighth of the length, three rounds: does it all run?

Every ratio is to PyTorch's default scaled_dot_product_attention in the same run, the calls taking turns; "ours" is
the operator with predictor and lists, as a rewritten model calls it. A line gives the median and the extremes of its
samples, the error against float64 on sampled query blocks (over the same live blocks, so it shows the kernel and not
the sparsity), TFLOP/s over the live pairs, and their share of what a large matrix product reached in the same run.
kernel_cases.py says how operands and thresholds are made.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import kernel_sections
import torch
from common import RESULTS, save, settings
from kernel_cases import (
    CPU_CASES,
    GPU_CASES,
    Case,
    exact_rows,
    live_pairs,
    operands,
    predicted,
    relative_l1,
    sparse,
    sparsity_of,
    thresholds_for,
)
from kernel_sections import BLOCKS, Run, attention, engines, ours
from peers import SHAPE, dense_peers, dense_sdpa, sparse_peers
from timing import matrix_tflops, times

from afbs_compile.kernels.blocks import BlockShape

SECTIONS: dict[str, Callable[[Run], list[dict[str, Any]]]] = {
    "predictor": kernel_sections.predictor,
    "imbalance": kernel_sections.imbalance,
    "lambda": kernel_sections.negligible_tiles,
    "memory": kernel_sections.memory,
    "short": kernel_sections.short,
}
COMPILERS = 8


def main() -> None:
    gpu = torch.cuda.is_available()
    cases = {case.name: case for case in (GPU_CASES if gpu else CPU_CASES)}
    names = [*cases, *(SECTIONS if gpu else ("short",))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="shorter sequences, fewer rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peers", action="store_true", help="dense SDPA and ours only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default=f"kernels_{'gpu' if gpu else 'cpu'}", help="name of the result file")
    arguments = parser.parse_args()

    began = time.perf_counter()
    run = Run("cuda" if gpu else "cpu", 3 if arguments.quick else arguments.rounds, arguments.quick)
    chosen = [run.case(cases[name]) for name in arguments.cases if name in cases]
    if gpu:
        compile_ahead(chosen, not arguments.no_peers)
        print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    rates = {str(dtype): matrix_tflops(dtype) for dtype in sorted({case.dtype for case in chosen}, key=str)}
    result: dict[str, Any] = {"settings": settings(arguments), "matrix_tflops": rates, "cases": [], "sections": {}}
    with torch.no_grad():
        for case in chosen:
            result["cases"].append(measure(run, case, rates[str(case.dtype)], not arguments.no_peers))
        for name in arguments.cases:
            if name in SECTIONS:
                print(f"\n{name}", flush=True)
                result["sections"][name] = SECTIONS[name](run)
    result["seconds"] = time.perf_counter() - began
    print_verdict(result["cases"])
    save(arguments.name, arguments.out, result)


def measure(run: Run, case: Case, rate: float, with_peers: bool) -> dict[str, Any]:
    """All engines on one case, as records; prints a line each."""
    record: dict[str, Any] = {**dataclasses.asdict(case), "dtype": str(case.dtype), "rows": []}
    print(f"\n{case.name}: {case.heads}/{case.kv_heads} heads, head_dim {case.head_dim}, {case.dtype}", flush=True)
    call = operands(case, run.device)
    scratch = Rows(run, case, rate)
    dense = exact_rows(call, case, BLOCKS[0], None)
    scratch.add("SDPA (default)", dense_sdpa(call), dense, case.dense_flops)
    if with_peers:
        for name, peer in dense_peers(call, case).items():
            scratch.add(name, peer, dense, case.dense_flops)
    for shape in BLOCKS:
        tau, lists = thresholds_for(case, call, shape)
        truth = exact_rows(call, case, shape, lists)
        flops = 4 * case.head_dim * live_pairs(lists, case, shape)
        sparsity = float(sparsity_of(lists, case, shape).mean())
        shown = {"blocks": str(shape), "sparsity": sparsity}
        scratch.add("ours", ours(call, case, tau, shape), truth, flops, **shown)
        for engine in engines(call.device):
            alone = attention(engine, call, sparse(case, tau, shape), lists)
            scratch.add(f"{engine.name} kernel, no predictor", alone, truth, flops, **shown)
        if with_peers and shape == SHAPE:
            for name, peer in sparse_peers(call, case, lists).items():
                scratch.add(name, peer, truth, flops, **shown)
    record["rows"] = scratch.timed()
    return record


class Rows:
    """Collects the calls of a case with what they should give, then times them in turns."""

    def __init__(self, run: Run, case: Case, rate: float) -> None:
        self._run, self._case, self._rate = run, case, rate
        self._calls: dict[str, Callable[[], Any]] = {}
        self._rows: dict[str, dict[str, Any]] = {}

    def add(self, engine: str, call: Any, truth: Any, flops: float, **shown: Any) -> None:
        """Check a call's result; one that is missing or fails keeps its line, and the reason."""
        row = {"engine": engine, **shown}
        key = f"{engine} {shown.get('blocks', '')}".strip()
        self._rows[key] = row
        if isinstance(call, str):
            row["missing"] = call
            return
        try:
            row["relative_l1"] = relative_l1(call(), truth)
        except Exception as error:  # a peer may fail in ways of its own
            row["missing"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
            return
        row["live_flops"] = flops
        self._calls[key] = call

    def timed(self) -> list[dict[str, Any]]:
        """The finished rows, printed."""
        measured = times(self._calls, self._run.rounds_at(self._case.length))
        dense = measured["SDPA (default)"].median
        for key, row in self._rows.items():
            if key in measured:
                t = measured[key]
                tflops = row["live_flops"] / t.median / 1e9
                row.update(ms=t.median, low_ms=t.low, high_ms=t.high, ratio=dense / t.median)
                row.update(tflops=tflops, share_of_matrix_rate=tflops / self._rate)
            print(line_of(key, row), flush=True)
        return list(self._rows.values())


def line_of(key: str, row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"  {key:44} {row['missing']}"
    sparse = f"{100 * row['sparsity']:5.1f} %" if "sparsity" in row else "  dense"
    return (
        f"  {key:44} {sparse} {row['ms']:9.3f} ms [{row['low_ms']:.3f}, {row['high_ms']:.3f}] {row['ratio']:5.2f}x "
        f"{row['tflops']:6.3g} TFLOP/s {100 * row['share_of_matrix_rate']:3.0f} %  error {row['relative_l1']:.1e}"
    )


def print_verdict(cases: list[dict[str, Any]]) -> None:
    """Each case's best block shape beside what is asked of it."""
    print()
    for case in cases:
        found = [row for row in case["rows"] if row["engine"] == "ours" and "ratio" in row]
        if not found:
            print(f"{case['name']:24} not measured")
            continue
        best = max(found, key=lambda row: row["ratio"])
        asked = case["at_least"]
        verdict = "" if asked is None else f"asked {asked}x: {'met' if best['ratio'] >= asked else 'MISSED'}"
        print(f"{case['name']:24} {best['ratio']:5.2f}x at {best['blocks']:8} {verdict}")


def compile_ahead(cases: list[Case], with_peers: bool) -> None:
    """Fill Triton's and inductor's caches from several processes: one alone takes longer than the measurements."""
    jobs = [(case, shape, with_peers) for case in cases for shape in BLOCKS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(COMPILERS, max(len(jobs), 1)), mp_context=context) as pool:
        for done in [pool.submit(_compile_one, *job) for job in jobs]:
            if done.exception() is not None:
                print(f"compiling ahead failed: {done.exception()}", file=sys.stderr)


def _compile_one(case: Case, shape: BlockShape, with_peers: bool) -> None:
    """Run every call of a case once, on noise; what fails here fails again, and is reported, where it is timed."""
    there = operands(dataclasses.replace(case, noise=True), "cuda")
    tau = [0.5] * case.heads
    lists = predicted(there, case, tau, shape)
    found: list[Callable[[], Any] | str] = [ours(there, case, tau, shape)]
    found += [attention(engine, there, sparse(case, tau, shape), lists) for engine in engines(lists.whole.device)]
    if with_peers and shape == SHAPE:
        found += sparse_peers(there, case, lists).values()
    calls = [call for call in found if not isinstance(call, str)]
    with torch.no_grad():
        for call in calls:
            try:
                call()
            except Exception as error:
                print(f"{case.name} {shape}: {type(error).__name__}", file=sys.stderr)


if __name__ == "__main__":
    main()
