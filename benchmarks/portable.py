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
from kernel_cases import Blocks, Case, exact_rows, live_pairs, operands, relative_l1, thresholds_for
from kernel_sections import BLOCKS, off, predict
from peers import dense_sdpa
from timing import times
from torch import Tensor

from afbs_compile.kernels import block_sparse, tiling
from afbs_compile.kernels.predict import BlockLists

CASES = [
    Case("d128-causal", 16384, True, 0.7),
    Case("d128-full", 16384, False, 0.7),
    Case("d64-causal", 16384, True, 0.7, head_dim=64),
    Case("d256-causal", 16384, True, 0.7, heads=8, kv_heads=8, head_dim=256),
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


def _compile_one(case: Case, blocks: Blocks, shape: tiling.LaunchShape) -> None:
    heads = (case.heads, case.kv_heads, case.kv_heads)
    q, k, v = (torch.randn(1, h, 4096, case.head_dim, dtype=case.dtype, device="cuda") for h in heads)
    lists = predict(q, k, case, [0.5] * case.heads, blocks)
    _only(shape, portable(q, k, v, case, lists, blocks))()


def shapes_of(case: Case, blocks: Blocks) -> list[tiling.LaunchShape]:
    """What the rule admits and, after that, wider tiles."""
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    sizes = *blocks, 1 << (case.head_dim - 1).bit_length(), case.dtype.itemsize
    shapes = dict.fromkeys(tiling.candidates(*sizes, tiling.Chip(shared, hopper=True)))
    fit = [shape for shape in WIDER if blocks[0] % shape[0] == 0 and blocks[1] % shape[1] == 0]
    return list(shapes | dict.fromkeys(tiling.LaunchShape(*shape) for shape in fit))


def portable(q: Tensor, k: Tensor, v: Tensor, case: Case, lists: BlockLists, blocks: Blocks) -> Callable[[], Tensor]:
    """The portable kernel over given lists."""
    call = {"causal": case.causal, "block_q": blocks[0], "block_k": blocks[1]}
    return lambda: block_sparse.attend(q, k, v, lists, off(case)[1], **call)


def measure(case: Case) -> list[dict[str, Any]]:
    """All launch shapes of all block shapes on one case."""
    q, k, v = operands(case, "cuda")
    records = []
    for blocks in BLOCKS:
        lists = thresholds_for(case, q, k, blocks)[1]
        truth = exact_rows(q, k, v, case, blocks, lists)
        flops = 4 * case.head_dim * live_pairs(lists, case, blocks)
        calls = {"dense": dense_sdpa(q, k, v, case)}
        shapes = {}
        for shape in shapes_of(case, blocks):
            name = "{}x{} w{} s{}".format(*shape)
            calls[name] = _only(shape, portable(q, k, v, case, lists, blocks))
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
                f"{case.name:12} {blocks[0]}x{blocks[1]:<4} {name:15} {ms:8.3f} ms {ratio:5.2f}x {tflops:4.0f} TFLOP/s "
                f"error {error:.1e}",
                flush=True,
            )
            shown = {"case": case.name, "blocks": list(blocks), "shape": name}
            records.append({**shown, "ms": ms, "ratio": ratio, "tflops": tflops, "relative_l1": error})
    return records


def _only(shape: tiling.LaunchShape, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call with one launch shape."""

    def run() -> Tensor:
        choose, block_sparse.choose = block_sparse.choose, lambda *_: shape
        try:
            return call()
        finally:
            block_sparse.choose = choose

    return run


if __name__ == "__main__":
    main()
