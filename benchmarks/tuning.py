"""Searches for the thresholds compared: cost, sparsity, errors, perplexity. The paper's Table III and Fig. 5.

    python benchmarks/tuning.py                                              the shipped model at 4,096 tokens
    python benchmarks/tuning.py --model M --calibrate A.txt --test B.txt --lengths 4096 8192 16384 --dtype bfloat16

Every search sees the same operands of every site, all heads at once, the same tolerance on every input, and an operator
that always keeps the same blocks (those that calibration keeps; ``method="paper"`` keeps the diagonal only). Costs are
attention work in dense calls over one input, per site: a sparse call counts its live share, and the dense calls that
errors are measured against count as well.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, SHIPPED_MODEL, empty_figure, load, sample_runs, save, settings, text_windows
from searches import PEERS, Search
from torch import Tensor

from afbs_compile.found import FoundGraph
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.passes.rewrite import rewrite
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.measure import Meter, kept_for
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.site import search_curves
from afbs_compile.tuner.speed import Stopwatch

ONE_PASS = "one pass (default)"


@dataclass
class Outcome:
    """What one search did over all sites.

    Attributes:
        seconds: wall-clock time of the search; evaluations, calls: per site, the latter None for passes.
        sparsity: per head; unseen: ``[sites, windows, H]`` errors on unseen text.
        constants: each site's call; paths: :attr:`Search.path` of each; perplexity: relative change on unseen text.
    """

    seconds: float = 0.0
    evaluations: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    sparsity: list[Tensor] = field(default_factory=list)
    unseen: list[Tensor] = field(default_factory=list)
    constants: list[SparseCall] = field(default_factory=list)
    paths: list[list[tuple[float, float, float, float]]] = field(default_factory=list)
    perplexity: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a causal language model")
    parser.add_argument("--calibrate", default="topics", help="text file to calibrate on; its last windows are unseen")
    parser.add_argument("--test", help="text file of another kind; by default unseen windows of the same text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--inputs", type=int, default=3, help="windows to calibrate on")
    parser.add_argument("--unseen", type=int, default=3, help="windows to test on")
    parser.add_argument("--tolerance", type=float, default=0.055)
    parser.add_argument("--methods", nargs="+", default=[*PEERS, ONE_PASS], choices=[*PEERS, ONE_PASS])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="tuning", help="name of the result files")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(arguments.model, device, getattr(torch, arguments.dtype))
    rows, paths = [], {}
    for length in arguments.lengths:
        if arguments.test is None:
            both = text_windows(tokenizer, arguments.calibrate, length, arguments.inputs + arguments.unseen, device)
            windows, unseen = both[: arguments.inputs], both[arguments.inputs :]
        else:
            windows = text_windows(tokenizer, arguments.calibrate, length, arguments.inputs, device)
            unseen = text_windows(tokenizer, arguments.test, length, arguments.unseen, device)
        found = compare(model, windows, unseen, arguments.methods, arguments.tolerance)
        rows += table(found, length, arguments.tolerance)
        paths[length] = {name: mean_path(outcome.paths) for name, outcome in found.items()}
        save(arguments.name, arguments.out, {"settings": settings(arguments), "rows": rows, "paths": paths})
        write_csv(arguments.out / f"{arguments.name}.csv", rows)
    plot(arguments.out / f"{arguments.name}.png", rows, paths)


def compare(
    model: Any, windows: Sequence[Tensor], unseen: Sequence[Tensor], methods: Sequence[str], tolerance: float
) -> dict[str, Outcome]:
    """Run the searches site by site, then the rewritten model on the unseen windows."""
    runs = [*sample_runs(model.model, windows), *sample_runs(model.model, unseen)]
    outcomes = {name: Outcome() for name in methods}
    stopwatch = Stopwatch()
    with closing(capture(runs)) as walk:
        for number, (_, operands) in enumerate(walk):
            given, tests = operands[: len(windows)], operands[len(windows) :]
            for name, outcome in outcomes.items():
                # Compiling is not the search, and what the pass compiles depends on the policy that it chooses.
                if number == 0 or name == ONE_PASS:
                    _search(name, given, tolerance, Outcome(), Stopwatch())
                _search(name, given, tolerance, outcome, stopwatch)
                outcome.unseen.append(Meter(tests, windows=1)(outcome.constants[-1]).error)
    tests = runs[len(windows) :]
    dense = loss(model, [run.gm for run in tests], tests, unseen)
    for outcome in outcomes.values():
        sparse = loss(model, rewritten(tests, outcome.constants), tests, unseen)
        outcome.perplexity = math.exp(sparse - dense) - 1
    return outcomes


def rewritten(runs: Sequence[SampleRun], constants: Sequence[SparseCall]) -> list[Any]:
    """The graph of each run with its attention calls made sparse."""
    graphs = []
    for run in runs:
        gm = copy.deepcopy(run.gm)
        sites = FoundGraph.of(gm, run.inputs, min_length=1).sites
        rewrite(gm, dict(zip(sites, constants, strict=True)))
        graphs.append(gm)
    return graphs


def _search(name: str, operands: list[Operands], tolerance: float, outcome: Outcome, stopwatch: Stopwatch) -> None:
    began = now()
    if name == ONE_PASS:
        result = search_curves(SiteInputs(operands), TuneSettings(tolerance=tolerance), stopwatch)
        chosen, sparsity, evaluations, calls = result.call, result.measured.sparsity, result.evaluations, math.nan
        path = [(math.nan, evaluations, float(sparsity.mean()), float(result.measured.worst.mean()))]
    else:
        search = Search(Meter(operands), kept_for(operands[0]), tolerance)
        PEERS[name](search)
        chosen, sparsity = search.best, search.sparsity
        evaluations, calls, path = search.meter.evaluations, search.meter.calls, search.path
    outcome.seconds += now() - began
    outcome.evaluations.append(evaluations)
    outcome.calls.append(calls)
    outcome.sparsity.append(sparsity)
    outcome.paths.append(path)
    outcome.constants.append(chosen)


def now() -> float:
    """Seconds, after the accelerator has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def loss(
    model: Any, graphs: Sequence[Callable[..., Any]], runs: Sequence[SampleRun], windows: Sequence[Tensor]
) -> float:
    """Mean next-token loss in nats over the second half of every window."""
    losses = []
    for graph, run, ids in zip(graphs, runs, windows, strict=True):
        hidden = next(x for x in graph(*run.inputs) if isinstance(x, Tensor) and x.dim() == 3)
        half = ids.shape[1] // 2
        logits = model.lm_head(hidden[0, half:-1])
        losses.append(float(F.cross_entropy(logits.float(), ids[0, half + 1 :])))
    return sum(losses) / len(losses)


def table(found: dict[str, Outcome], length: int, tolerance: float) -> list[dict[str, Any]]:
    """One row per method, printed."""
    rows = []
    heads = (
        "dense equiv",
        "sparse calls",
        "seconds",
        "sparsity",
        "worst unseen",
        "95 % unseen",
        "within",
        "perplexity",
    )
    print(f"{length} tokens".ljust(22) + "  ".join(("", *heads)))
    for name, outcome in found.items():
        errors = torch.stack(outcome.unseen).flatten()
        row = {
            "length": length,
            "method": name,
            "dense_equivalents_per_site": sum(outcome.evaluations) / len(outcome.evaluations),
            "sparse_calls_per_site": sum(outcome.calls) / len(outcome.calls),
            "seconds": outcome.seconds,
            "mean_sparsity": float(torch.stack(outcome.sparsity).mean()),
            "worst_unseen_error": float(errors.max()),
            "p95_unseen_error": float(errors.quantile(0.95)),
            "share_within_tolerance": float((errors <= tolerance).float().mean()),
            "perplexity_change": outcome.perplexity,
            "policies": dict(Counter(name for c in outcome.constants for name in c.policy)),
            "block_shapes": sorted({str(c.shape) for c in outcome.constants}),
        }
        print(
            f"{name:24} {row['dense_equivalents_per_site']:10.1f} {row['sparse_calls_per_site']:13.1f} "
            f"{row['seconds']:8.2f} {row['mean_sparsity']:9.1%} {row['worst_unseen_error']:13.3f} "
            f"{row['p95_unseen_error']:12.3f} {row['share_within_tolerance']:7.1%} {row['perplexity_change']:+11.2%}"
        )
        rows.append(row)
    return rows


def mean_path(paths: Sequence[Sequence[tuple[float, float, float, float]]]) -> list[tuple[float, float, float]]:
    """(dense equivalents, mean best sparsity, mean error tried) after each evaluation, mean over the sites.

    A site whose search has ended stays where that was.
    """
    return [
        tuple(sum(path[min(i, len(path) - 1)][column] for path in paths) / len(paths) for column in (1, 2, 3))  # type: ignore[misc]
        for i in range(max(map(len, paths)))
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def plot(path: Path, rows: Sequence[dict[str, Any]], paths: dict[int, dict[str, Any]]) -> None:
    """Convergence of every search (the paper's Fig. 5), and where each ends (its Table III)."""
    figure = empty_figure((7 * len(paths), 5))
    if figure is None:
        return
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes = figure.subplots(1, len(paths), squeeze=False)
    for axis, (length, methods) in zip(axes[0], paths.items(), strict=True):
        for name, points in methods.items():
            style = {"marker": "*", "markersize": 16, "color": "black"} if name == ONE_PASS else {"marker": "."}
            axis.plot([p[0] for p in points], [100 * p[1] for p in points], label=name, **style)
        axis.set(
            xscale="log", xlabel="attention work of the search, dense equivalents per site", title=f"{length} tokens"
        )
        axis.set_ylabel("best mean sparsity within the tolerance so far, %")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
