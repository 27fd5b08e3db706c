"""Time a model dense and sparse in the same run, in turns.

Dense is torch.compile(model), sparse torch.compile(model, backend="afbs") with the recipe; what is timed is one whole
forward pass of the model, predictor included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from afbs_compile.backend import afbs
from afbs_compile.cli import arguments as options
from afbs_compile.cli.models import LoadedModel, load_model
from afbs_compile.cli.progress import each, step
from afbs_compile.cli.recipes import load_recipe, usual_length
from afbs_compile.cli.sources import Reading, Sample, load_samples
from afbs_compile.errors import OptionError
from afbs_compile.kernels.attend import machine
from afbs_compile.match import match
from afbs_compile.options import OPTIONS, Option
from afbs_compile.passes.capture import SampleRun
from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.report.applied import ANY_LENGTH, apply
from afbs_compile.report.explain import explain
from afbs_compile.retime import all_timed_again, with_rows

NAME = "bench"
RUNS = 7


@dataclass(frozen=True)
class Row:
    """One length.

    Attributes:
        tokens: ``None`` where the inputs have a shape of their own.
        sparse_sites, sites: calls that run sparse at this length, and all of them.
        dense_ms, sparse_ms: median; dense_spread, sparse_spread: fastest and slowest run.
        ratio: of the medians, above 1 where sparse is faster.
    """

    tokens: int | None
    sparse_sites: int
    sites: int
    dense_ms: float
    dense_spread: tuple[float, float]
    sparse_ms: float
    sparse_spread: tuple[float, float]
    ratio: float


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    options.add_model(parser)
    parser.add_argument("--recipe", metavar="R", required=True, help="a file of afbs-compile calibrate")
    options.add_options(parser, _running())
    parser.add_argument(
        "--seq-len", metavar="N", type=options.whole(1), nargs="+", help="lengths to time (default: as calibrated)"
    )
    options.add_data(parser, default="random")
    parser.add_argument(
        "--update", action="store_true", help="also time each call alone again and write what came out into the recipe"
    )
    parser.add_argument(
        "--runs", metavar="R", type=options.whole(1), default=RUNS, help=f"timed runs of each (default: {RUNS})"
    )
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compile, time, print."""
    recipe = load_recipe(arguments.recipe)
    settings = options.given(arguments, _running(), recipe=recipe, min_length=ANY_LENGTH)
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    samples = _samples(arguments, model, recipe)
    if arguments.update:
        recipe = _updated(arguments, model, recipe)
        settings = options.given(arguments, _running(), recipe=recipe, min_length=ANY_LENGTH)
    rows = []
    for tokens, sample in samples:
        apply(model.module, recipe, [sample], name=f"recipe {arguments.recipe}")  # refuse before compiling
        rows.append(_row(tokens, sample, model, settings, arguments.runs))
    if arguments.json:
        content = {"device": str(model.device), "torch": torch.__version__, "threads": torch.get_num_threads()}
        print(json.dumps({**content, "runs": arguments.runs, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        _print(rows, arguments.runs)
    return 0


def _updated(arguments: argparse.Namespace, model: LoadedModel, recipe: Recipe) -> Recipe:
    """The recipe with every call timed again at the length it was calibrated at, which is written over the old one."""
    length = usual_length(model, recipe, arguments.data)
    sample = load_samples(arguments.data, model, length=length, count=1, reading=Reading.of(arguments))
    rows: list[SiteRecipe] = []
    with step("timing each call"):
        for graph in apply(model.module, recipe, sample, name=f"recipe {arguments.recipe}"):
            if graph.plan.differences:
                raise OptionError(f"--update: the model differs from the calibrated one: {graph.plan.differences[0]}")
            found = graph.found
            known = match(found, recipe).sites if found.sites else {}
            timed = {name: row for name, row in known.items() if row.dense_ms is not None}
            if timed:
                rows += all_timed_again(timed, SampleRun(found.gm, found.sites, graph.inputs[0]))
    updated = with_rows(recipe, rows)
    with options.writing(Path(arguments.recipe)):
        updated.save(arguments.recipe)
    return updated


def _running() -> list[Option]:
    """The options of what runs that have a flag; lengths are the command's own, so ``min_length`` is not among them."""
    return [option for option in OPTIONS.values() if option.runs and not option.calibrates and option.flag]


def _samples(arguments: argparse.Namespace, model: LoadedModel, recipe: Recipe) -> list[tuple[int | None, Sample]]:
    """One input per length, all of them checked before the first is timed."""
    lengths: list[int | None] = list(arguments.seq_len or [usual_length(model, recipe, arguments.data)])
    for length in lengths:
        model.check_length(length)
    return [
        (n, load_samples(arguments.data, model, length=n, count=1, reading=Reading.of(arguments))[0]) for n in lengths
    ]


def _row(tokens: int | None, sample: Sample, model: LoadedModel, settings: dict[str, Any], runs: int) -> Row:
    """Time one length; ``min_length`` is off in the settings: the recipe says from which length sparse pays."""
    torch._dynamo.reset()  # each length is compiled for itself, as a fresh process would
    dense = torch.compile(model.module, dynamic=False)
    sparse: Any = torch.compile(model.module, backend=afbs, options=cast(Any, settings), dynamic=False)
    calls = [lambda: dense(**sample), lambda: sparse(**sample)]
    with torch.no_grad():
        with step(f"compiling for {tokens} tokens"):
            for call in calls:
                machine.wait(call())
        sites = explain(sparse).rows
        dense_ms, sparse_ms = _times(calls, runs)
    medians = statistics.median(dense_ms), statistics.median(sparse_ms)
    return Row(
        tokens=tokens,
        sparse_sites=sum(site.outcome == "sparse" for site in sites),
        sites=len(sites),
        dense_ms=medians[0],
        dense_spread=(min(dense_ms), max(dense_ms)),
        sparse_ms=medians[1],
        sparse_spread=(min(sparse_ms), max(sparse_ms)),
        ratio=medians[0] / medians[1],
    )


def _times(calls: Sequence[Callable[[], Any]], runs: int) -> list[list[float]]:
    """Milliseconds of every run; the calls take turns, so that a slow moment of the machine hits all."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in each(range(runs), "timing"):
        for call, spent in zip(calls, times, strict=True):
            began = time.perf_counter()
            machine.wait(call())
            spent.append((time.perf_counter() - began) * 1e3)
    return times


def _print(rows: Sequence[Row], runs: int) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for header in ("tokens", "sparse calls", "dense ms", "sparse ms", "dense / sparse"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            "" if row.tokens is None else f"{row.tokens:,}",
            f"{row.sparse_sites} of {row.sites}",
            _spread(row.dense_ms, row.dense_spread),
            _spread(row.sparse_ms, row.sparse_spread),
            f"{row.ratio:.2f}x",
        )
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console.width = 160
    console.print(table)
    console.print(f"Whole forward passes: medians of {runs} alternating runs, fastest and slowest in brackets.")


def _spread(median: float, spread: tuple[float, float]) -> str:
    return f"{median:.1f} ({spread[0]:.1f} to {spread[1]:.1f})"
