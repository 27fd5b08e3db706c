"""What FP8 costs and gains: its parts apart, its errors, and the bf16 kernels in the same run.

    python benchmarks/fp8.py
    python benchmarks/fp8.py --stages 2 3 4 5    how many steps of keys and values are kept

Errors are relative L1 over the same live blocks, against float64, on sampled query blocks (kernel_cases.py): they show
the rounding and not the sparsity. "Smoothed" knows the constants that calibration would find.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save, settings
from kernel_cases import Case, exact_rows, live_pairs, operands, relative_l1, sparse, thresholds_for
from kernel_sections import attention, ours
from peers import dense_sdpa
from timing import times

from afbs_compile.kernels.attend.engines import engines_on
from afbs_compile.kernels.attend.hopper.engine import Hopper
from afbs_compile.kernels.attend.hopper_fp8 import launch
from afbs_compile.kernels.attend.hopper_fp8.rounding import quantise
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import empty_output
from afbs_compile.kernels.spec import fp8

CASES = (
    Case("full-32k", 32768, "full", 0.7, precision="fp8"),
    Case("causal-32k", 32768, "causal", 0.7, precision="fp8"),
    Case("causal-128k", 131072, "causal", 0.7, precision="fp8"),
    Case("full-32k-dense", 32768, "full", 0.0, precision="fp8"),
    Case("causal-8k", 8192, "causal", 0.7, precision="fp8"),
    Case("d64-causal-32k", 32768, "causal", 0.7, heads=16, kv_heads=16, head_dim=64, precision="fp8"),
)
BLOCKS = BlockShape(fp8.BLOCK, fp8.BLOCK)


def main() -> None:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--stages", nargs="+", type=int, default=[launch.STAGES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="fp8_h200", help="name of the result file")
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = [measure(case, arguments) for case in CASES if case.name in arguments.cases]
    save(arguments.name, arguments.out, {"settings": settings(arguments), "rows": rows})


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case; prints a line for each part."""
    call = operands(case, "cuda")
    tau, lists = thresholds_for(case, call, BLOCKS)
    truth = exact_rows(call, case, BLOCKS, lists)
    constants = fp8.Fp8Constants.of([(call.k, call.v)]).packed()
    own, mine = replace(case, precision="own"), sparse(case, tau, BLOCKS)
    select = engines_on(call.device)[0].select

    def attend(stages: int, known: tuple[float, ...]) -> Any:
        smoothed = replace(mine, fp8_constants=known)

        def run() -> torch.Tensor:
            launch.STAGES = stages
            out = empty_output(call.q, call.v)
            launch.attend(call, smoothed, lists, out)
            return out

        return run

    calls = {
        "SDPA": dense_sdpa(call),
        "operator, fp8": ours(call, case, tau, BLOCKS),
        "operator, bf16": ours(call, own, tau, BLOCKS),
        "predictor": lambda: select(call, mine),
        "rounding": lambda: quantise(call, constants),
        "hopper kernel, bf16": attention(Hopper(), call, sparse(own, tau, BLOCKS), lists),
        "rounding and kernel": attend(launch.STAGES, ()),
        "smoothed": attend(launch.STAGES, constants),
    }
    calls |= {f"{n} stages": attend(n, ()) for n in arguments.stages}
    flops = 4 * case.head_dim * live_pairs(lists, case, BLOCKS)
    measured = times(calls, arguments.rounds)
    dense = measured["SDPA"].median
    record: dict[str, Any] = {"case": case.name, "dense_ms": dense}
    print(f"\n{case.name}", flush=True)
    for name, t in measured.items():
        without = name in ("SDPA", "predictor", "rounding")
        error = None if without else relative_l1(calls[name](), truth)
        tflops = None if without else flops / t.median / 1e9
        record[name] = {"ms": t.median, "ratio": dense / t.median, "tflops": tflops, "relative_l1": error}
        tail = "" if without else f" {tflops:5.0f} TFLOP/s  error {error:.2e}"
        print(f"  {name:20} {t.median:8.3f} ms [{t.low:.3f}, {t.high:.3f}] {dense / t.median:5.2f}x{tail}", flush=True)
    return record


if __name__ == "__main__":
    main()
