"""Random attention calls of every kind on the CPU's engines, against float64: is any of them wrong?

    python benchmarks/cases.py --workers 16       10,000 calls
    python benchmarks/cases.py --count 200 --first 50000

A call has a mask by formula, valid keys, a dense mask, a bias, a cap or sinks, in any mixture; other numbers of rows
than keys; grouped heads, odd sizes, strides of their own; thresholds and policies by head. It is wrong where its
output, or the specification's, differs from float64 over the same live blocks by more than 1e-4, or where it changes
by as much when what no row sees is filled with NaN, infinity or 1e4: by rounding it may, for rows that met NaN are
computed again in another way. tests/any_mask.py draws the calls; tests/gpu/test_masks.py does this on a GPU.

Calls that share a compilation of FlexAttention, which takes seconds, are computed by one process, the largest groups
first; an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from common import RESULTS, ROOT, save, settings
from torch import Tensor

sys.path.insert(0, str(ROOT))

from afbs_compile.kernels.attend.engines import kernel_of
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape, live_of
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.select import plain
from afbs_compile.kernels.spec.attention import masked_attention
from tests.any_mask import in_float64, poisoned, random_call, random_operands, undecided

TOLERANCE = 1e-4


class Form(NamedTuple):
    """What FlexAttention compiles in, beside the kind of mask."""

    width: int
    scale: float
    shape: BlockShape


FORMS = {1: Form(32, 32**-0.5, BlockShape(64, 64)), 2: Form(24, 1.0, BlockShape(128, 64))}
"""By the number of query heads per key head, which it compiles in too."""

SHORT = 8
"""Each so many-th call may be of one tile, in rows or in keys, which costs compilations of its own."""

POISON = (float("nan"), float("inf"), 1e4)


def drawn(seed: int) -> tuple[Operands, SparseCall]:
    """A random call in one of few forms."""
    operands = random_operands(seed, smallest=129 if seed % SHORT else 1, largest=400, groups=len(FORMS))
    generator = torch.Generator().manual_seed(seed)
    form = FORMS[operands.groups]

    def wide(x: Tensor) -> Tensor:
        other = torch.randn(*x.shape[:3], form.width, generator=generator)
        return other if x.is_contiguous() else other.transpose(1, 2).contiguous().transpose(1, 2)

    q, k, v = (wide(x) for x in (operands.q, operands.k, operands.v))
    call = replace(random_call(seed, operands.heads), shape=form.shape)
    return replace(operands, q=q, k=k, v=v, scale=form.scale), call


def wrong(operands: Operands, call: SparseCall, poison: float) -> Iterator[str]:
    """What is wrong with a call."""
    shape = call.shape
    live = live_of(plain.select(operands, call))
    decided = ~undecided(operands, live, shape)
    exact = in_float64(operands, live, shape)[decided]
    out, counts = run(operands, call)
    for name, found in (("engine", out), ("specification", masked_attention(operands, live, call.lam, shape))):
        close = torch.isclose(found[decided].double(), exact, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        if not close.all():
            yield f"{name}: {int((~close).sum())} of {close.numel()} numbers"
    other, others = run(poisoned(operands, poison), call)
    if not (torch.equal(counts, others) and torch.equal(out.isnan(), other.isnan())):
        yield "what no row sees changes counts"
    elif not torch.allclose(out, other, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        yield "what no row sees changes the output"


def kind(operands: Operands) -> str:
    """What a call consists of, for the table."""
    parts = [str(operands.mask).partition("(")[0]]
    parts += ["valid"] if operands.valid is not None else []
    if operands.attn_mask is not None:
        parts.append("bias" if operands.has_bias else "bool")
    parts += ["softcap"] if operands.softcap else []
    parts += ["sinks"] if operands.sinks is not None else []
    return " + ".join(parts)


class Outcome(NamedTuple):
    """A call that was examined: what it consists of, the engine that computed it, what is wrong with it."""

    seed: int
    kind: str
    engine: str
    wrong: list[str]


def examined(seeds: list[int]) -> list[Outcome]:
    """The outcome of each seed's call."""
    torch.set_num_threads(1)
    torch._dynamo.reset()  # guards of other groups' compilations are tried one after another
    outcomes = []
    for seed in seeds:
        operands, call = drawn(seed)
        try:
            found = list(wrong(operands, call, POISON[seed % len(POISON)]))
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        outcomes.append(Outcome(seed, kind(operands), kernel_of(operands, call).name.split()[0], found))
    return outcomes


def by_compilation(seeds: range) -> list[list[int]]:
    """The seeds whose calls share a compilation, the most numerous first."""
    groups: dict[object, list[int]] = {}
    for seed in seeds:
        operands, _ = drawn(seed)
        form = (operands.groups, operands.k.shape[1] == 1, seed % SHORT == 0)
        groups.setdefault((kind(operands), form), []).append(seed)
    return sorted(groups.values(), key=len, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first call")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time, a thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    kinds, engines, failures, done = Counter[str](), Counter[str](), list[str](), 0
    groups = by_compilation(range(arguments.first, arguments.first + arguments.count))
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool, suppress(KeyboardInterrupt):
        for outcomes in pool.imap_unordered(examined, groups):
            done += len(outcomes)
            kinds.update(outcome.kind for outcome in outcomes)
            engines.update(outcome.engine for outcome in outcomes)
            found = [f"seed {seed}, {name}: {what}" for seed, name, _, found in outcomes for what in found]
            failures += found
            print(f"{done} calls, {len(kinds)} kinds, {len(failures)} wrong", *found, sep="\n", flush=True)
    print(f"{done} calls of {len(kinds)} kinds on {dict(engines)}: {len(failures)} wrong")
    result = {"calls": done, "kinds": dict(kinds.most_common()), "engines": dict(engines), "wrong": sorted(failures)}
    save("cases_cpu", arguments.out, {"settings": settings(arguments), **result})


if __name__ == "__main__":
    main()
