"""Random attention calls of every kind on the CPU's engines, against float64: is any of them wrong?

    python benchmarks/cases.py                    10,000 calls
    python benchmarks/cases.py --count 200 --first 50000

A call has a mask by formula, valid keys, a dense mask, a bias, a cap or sinks, in any mixture; other numbers of rows
than keys; grouped heads, odd sizes, strides of their own; thresholds and policies by head. It is wrong where its
output, or the specification's, differs from float64 over the same live blocks by more than 1e-4, or where what no row
sees changes more than the last bits when it is filled with NaN, infinity or 1e4: rows that met NaN are computed again
in another way. tests/any_mask.py draws the calls; tests/gpu/test_masks.py does this on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from common import RESULTS, ROOT, save, settings
from torch import Tensor

sys.path.insert(0, str(ROOT))

from afbs_compile.kernels.attend.engines import kernel_of
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape, live_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.select import plain
from afbs_compile.kernels.spec.attention import masked_attention
from tests.any_mask import in_float64, poisoned, random_call, random_operands, undecided

TOLERANCE = 1e-4
SHAPES = (BlockShape(64, 64), BlockShape(128, 64))
WIDTHS = (32, 64)
"""Each width and block shape is a compilation for each kind of mask."""

POISON = (float("nan"), float("inf"), 1e4)


def drawn(seed: int) -> tuple[Operands, BlockShape]:
    """A random call with one of few head sizes."""
    operands = random_operands(seed)
    generator = torch.Generator().manual_seed(seed)
    width = WIDTHS[seed % 2]

    def wide(x: Tensor) -> Tensor:
        other = torch.randn(*x.shape[:3], width, generator=generator)
        return other if x.is_contiguous() else other.transpose(1, 2).contiguous().transpose(1, 2)

    q, k, v = (wide(x) for x in (operands.q, operands.k, operands.v))
    return replace(operands, q=q, k=k, v=v), SHAPES[seed // 2 % 2]


def wrong(seed: int) -> Iterator[str]:
    """What is wrong with a call."""
    operands, shape = drawn(seed)
    call = replace(random_call(seed, operands.heads), shape=shape)
    live = live_of(plain.select(operands, call))
    decided = ~undecided(operands, live, shape)
    exact = in_float64(operands, live, shape)[decided]
    out, counts = run(operands, call)
    for name, found in (("engine", out), ("specification", masked_attention(operands, live, call.lam, shape))):
        close = torch.isclose(found[decided].double(), exact, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        if not close.all():
            yield f"{name}: {int((~close).sum())} of {close.numel()} numbers"
    other, others = run(poisoned(operands, POISON[seed % 3]), call)
    if not (torch.equal(counts, others) and torch.equal(out.isnan(), other.isnan())):
        yield "what no row sees changes counts"
    elif not torch.allclose(out, other, rtol=1e-5, atol=1e-5, equal_nan=True):
        yield "what no row sees changes the output"


def kind(seed: int) -> str:
    """What a call consists of, for the table."""
    operands, _ = drawn(seed)
    parts = [str(operands.mask).partition("(")[0]]
    parts += ["valid"] if operands.valid is not None else []
    if operands.attn_mask is not None:
        parts.append("bias" if operands.has_bias else "bool")
    parts += ["softcap"] if operands.softcap else []
    parts += ["sinks"] if operands.sinks is not None else []
    return " + ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first call")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    kinds, engines, failures = Counter[str](), Counter[str](), list[str]()
    for seed in range(arguments.first, arguments.first + arguments.count):
        operands, shape = drawn(seed)
        kinds[kind(seed)] += 1
        engines[kernel_of(operands, replace(random_call(seed, operands.heads), shape=shape)).name.split()[0]] += 1
        try:
            found = list(wrong(seed))
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        for what in found:
            failures.append(f"seed {seed}, {kind(seed)}: {what}")
            print(failures[-1], flush=True)
        if (seed + 1) % 100 == 0:
            print(f"{seed + 1 - arguments.first} calls, {len(kinds)} kinds, {len(failures)} wrong", flush=True)
    print(f"{arguments.count} calls of {len(kinds)} kinds on {dict(engines)}: {len(failures)} wrong")
    result = {"calls": arguments.count, "kinds": dict(kinds.most_common()), "engines": dict(engines), "wrong": failures}
    save("cases_cpu", arguments.out, {"settings": settings(arguments), **result})


if __name__ == "__main__":
    main()
