"""Every launch shape that the portable kernel may choose, timed on this GPU: what its rule and its choice rest on.

python benchmarks/portable.py
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save, settings
from kernel_cases import Case, exact_rows, live_pairs, operands, predicted, relative_l1, sparse, thresholds_for
from kernel_sections import BLOCKS, attention
from peers import dense_sdpa
from timing import times
from torch import Tensor

from afbs_compile.kernels.attend.portable import launch, tiling
from afbs_compile.kernels.attend.portable.engine import Portable
from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.launcher import padded
from afbs_compile.kernels.operands import Operands

CASES = [
    Case("d128-causal", 16384, "causal", 0.7),
    Case("d128-full", 16384, "full", 0.7),
    Case("d64-causal", 16384, "causal", 0.7, head_dim=64),
    Case("d256-causal", 16384, "causal", 0.7, heads=8, kv_heads=8, head_dim=256),
]
WIDER = ((128, 128, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3))
"""Launch shapes that are timed beside those the rule admits: it must be seen to be right."""

COMPILERS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--fp32", action="store_true", help="fp32 operands, a quarter of the length and heads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="portable_gpu", help="name of the result file")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.name in arguments.cases]
    if arguments.fp32:
        cases = [replace(c, length=4096, heads=8, kv_heads=8, dtype=torch.float32) for c in cases]
    compile_ahead(cases)
    with torch.no_grad():
        records = [record for case in cases for record in measure(case)]
    save(arguments.name, arguments.out, {"settings": settings(arguments), "shapes": records})


def compile_ahead(cases: list[Case]) -> None:
    """Fill Triton's cache from several processes."""
    jobs = [(case, blocks, shape) for case in cases for blocks in BLOCKS for shape in shapes_of(case, blocks)]
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, done in [(job, pool.submit(_compile_one, *job)) for job in jobs]:
            if done.exception() is not None:
                print(f"{job}: {done.exception()}", flush=True)


def _compile_one(case: Case, blocks: BlockShape, shape: tiling.LaunchShape) -> None:
    call = operands(replace(case, length=4096, noise=True), "cuda")
    lists = predicted(call, case, [0.5] * case.heads, blocks)
    _only(shape, portable(call, case, lists, blocks))()


def shapes_of(case: Case, blocks: BlockShape) -> list[tiling.LaunchShape]:
    """What the rule admits and, after that, wider tiles."""
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    sizes = blocks, padded(case.head_dim), case.dtype.itemsize
    shapes = dict.fromkeys(tiling.candidates(*sizes, tiling.Chip(shared, hopper=True)))
    fit = [shape for shape in WIDER if blocks.q % shape[0] == 0 and blocks.k % shape[1] == 0]
    return list(shapes | dict.fromkeys(tiling.LaunchShape(*shape) for shape in fit))


def portable(call: Operands, case: Case, lists: BlockLists, blocks: BlockShape) -> Callable[[], Tensor]:
    """The portable kernel over given lists.

    Raises:
        ValueError: it does not take them.
    """
    found = attention(Portable(), call, sparse(case, [0.5] * case.heads, blocks), lists)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def measure(case: Case) -> list[dict[str, Any]]:
    """All launch shapes of all block shapes on one case."""
    call = operands(case, "cuda")
    records = []
    for blocks in BLOCKS:
        lists = thresholds_for(case, call, blocks)[1]
        truth = exact_rows(call, case, blocks, lists)
        flops = 4 * case.head_dim * live_pairs(lists, case, blocks)
        calls = {"dense": dense_sdpa(call)}
        shapes = {}
        for shape in shapes_of(case, blocks):
            name = "{}x{} w{} s{}".format(*shape)
            calls[name] = _only(shape, portable(call, case, lists, blocks))
            try:
                shapes[name] = relative_l1(calls[name](), truth)
            except Exception as error:
                print(f"{case.name} {blocks} {name}: {type(error).__name__}: {str(error)[:80]}", flush=True)
                del calls[name]
        measured = times(calls, rounds=3)
        for name, error in shapes.items():
            ms = measured[name].median
            ratio, tflops = measured["dense"].median / ms, flops / ms / 1e9
            print(
                f"{case.name:12} {blocks!s:8} {name:15} {ms:8.3f} ms {ratio:5.2f}x {tflops:4.0f} TFLOP/s "
                f"error {error:.1e}",
                flush=True,
            )
            shown = {"case": case.name, "blocks": list(blocks), "shape": name}
            records.append({**shown, "ms": ms, "ratio": ratio, "tflops": tflops, "relative_l1": error})
    return records


def _only(shape: tiling.LaunchShape, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call with one launch shape."""

    def run() -> Tensor:
        choose, launch.choose = launch.choose, lambda *_: shape
        try:
            return call()
        finally:
            launch.choose = choose

    return run


if __name__ == "__main__":
    main()
