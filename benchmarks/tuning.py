"""Searches for the thresholds compared: cost, sparsity, errors, perplexity. The paper's Table III and Fig. 5.

    python benchmarks/tuning.py                                              the shipped model at 4,096 tokens
    python benchmarks/tuning.py --model M --calibrate A.txt --test B.txt --lengths 4096 8192 16384 --dtype bfloat16
    python benchmarks/tuning.py --model M --calibrate A.txt --llama          cost alone, in the shape of Llama-2-7B

Every search sees the same operands of every site, all heads at once, and the same tolerance on every input. Costs are
attention work in dense calls over one input, per site: a sparse call counts its live share, and the dense calls that
errors are measured against count as well.

``--llama``: per layer, Q, K and V of 32 heads of dimension 128 at 32,768 tokens are made from what the model captures
(of heads h, dimension d, on windows of 32,768 tokens): head i is captured head ``i mod h``, each row mapped by a random
matrix ``[d, 128]`` with orthonormal rows (the same one for Q and K, so that scores are kept; another one for V) that
differs for each i, and scaled so that the softmax sees the same logits. Several inputs are several windows.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, SHIPPED_MODEL, load, save, settings, text_windows
from search_peers import PEERS, Search
from torch import Tensor

from afbs_compile.calibration import record_programs
from afbs_compile.found import FoundGraph
from afbs_compile.passes.capture import Operands, SampleRun, capture
from afbs_compile.passes.rewrite import SiteConstants, rewrite
from afbs_compile.tuner.inputs import Inputs
from afbs_compile.tuner.measure import Meter
from afbs_compile.tuner.site import TuneSettings, search_curves, tune_site
from afbs_compile.tuner.space import Thresholds
from afbs_compile.tuner.speed import Stopwatch

ONE_PASS = "one pass (default)"
LLAMA_HEADS, LLAMA_DIM, LLAMA_LENGTH = 32, 128, 32768


@dataclass
class Outcome:
    """What one search did over all sites.

    Attributes:
        seconds: wall-clock time of the search; evaluations, calls: per site, the latter None for passes.
        sparsity: per head; unseen: ``[sites, windows, H]`` errors on unseen text.
        constants: of each site; paths: :attr:`Search.path` of each; perplexity: relative change on unseen text.
    """

    seconds: float = 0.0
    evaluations: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    sparsity: list[Tensor] = field(default_factory=list)
    unseen: list[Tensor] = field(default_factory=list)
    constants: list[SiteConstants] = field(default_factory=list)
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
    parser.add_argument("--llama", action="store_true", help="the cost of the default search in Llama-2-7B's shape")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 32], help="layers for --llama")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="tuning", help="name of the result files")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(arguments.model, device, getattr(torch, arguments.dtype))
    if arguments.llama:
        windows = text_windows(tokenizer, arguments.calibrate, LLAMA_LENGTH, arguments.inputs, device)
        result = {"rows": llama(model, windows, arguments.layers, arguments.tolerance)}
        save(arguments.name, arguments.out, {"settings": settings(arguments), **result})
        return
    rows, paths = [], {}
    for length in arguments.lengths:
        if arguments.test is None:
            both = text_windows(tokenizer, arguments.calibrate, length, arguments.inputs + arguments.unseen, device)
            windows, unseen = both[: arguments.inputs], both[arguments.inputs :]
        else:
            windows = text_windows(tokenizer, arguments.calibrate, length, arguments.inputs, device)
            unseen = text_windows(tokenizer, arguments.test, length, arguments.unseen, device)
        found = compare(model, windows, unseen, arguments.methods, arguments.tolerance)
        rows += table(found, length)
        paths[length] = {name: mean_path(outcome.paths) for name, outcome in found.items()}
    save(arguments.name, arguments.out, {"settings": settings(arguments), "rows": rows, "paths": paths})
    write_csv(arguments.out / f"{arguments.name}.csv", rows)
    plot(arguments.out / f"{arguments.name}.png", rows, paths)


def compare(
    model: Any, windows: Sequence[Tensor], unseen: Sequence[Tensor], methods: Sequence[str], tolerance: float
) -> dict[str, Outcome]:
    """Run the searches site by site, then the rewritten model on the unseen windows."""
    runs = [*recorded(model, windows), *recorded(model, unseen)]
    outcomes = {name: Outcome() for name in methods}
    stopwatch = Stopwatch()
    with closing(capture(runs)) as walk:
        for number, (_, operands) in enumerate(walk):
            given, tests = operands[: len(windows)], operands[len(windows) :]
            for name, outcome in outcomes.items():
                if number == 0:  # what is compiled once a process is not the search
                    _search(name, given, tolerance, Outcome(), stopwatch)
                _search(name, given, tolerance, outcome, stopwatch)
                constants = outcome.constants[-1]
                meter = Meter(tests, block_q=constants.block_q, block_k=constants.block_k, windows=1)
                chosen = Thresholds(*(torch.tensor(x) for x in (constants.tau, constants.theta, constants.lam)))
                outcome.unseen.append(meter(chosen).error)
    tests = runs[len(windows) :]
    dense = loss(model, [run.gm for run in tests], tests, unseen)
    for outcome in outcomes.values():
        sparse = loss(model, rewritten(tests, outcome.constants), tests, unseen)
        outcome.perplexity = math.exp(sparse - dense) - 1
    return outcomes


def recorded(model: Any, windows: Sequence[Tensor]) -> list[SampleRun]:
    """Each window as the graph with the model's attention calls sees it."""
    runs = []
    for ids in windows:  # one at a time: Dynamo may capture again in between
        for program in record_programs(model.model, [ids]):
            found = FoundGraph.of(program.gm, program.samples[0], min_length=1)
            if found.sites:
                runs.append(SampleRun(found.gm, found.sites, program.samples[0]))
    return runs


def rewritten(runs: Sequence[SampleRun], constants: Sequence[SiteConstants]) -> list[Any]:
    """The graph of each run with its attention calls made sparse."""
    graphs = []
    for run in runs:
        gm = copy.deepcopy(run.gm)
        sites = FoundGraph.of(gm, run.inputs, min_length=1).sites
        rewrite(gm, dict(zip(sites, constants, strict=True)))
        graphs.append(gm)
    return graphs


def _search(name: str, operands: list[Operands], tolerance: float, outcome: Outcome, stopwatch: Stopwatch) -> None:
    began = _now()
    if name == ONE_PASS:
        result = search_curves(Inputs(operands), TuneSettings(tolerance=tolerance), stopwatch)
        thresholds, sparsity, shape = result.thresholds, result.measured.sparsity, result.shape
        evaluations, calls, path = result.evaluations, math.nan, []
        path = [(math.nan, evaluations, float(sparsity.mean()), float(result.measured.worst.mean()))]
    else:
        search = Search(Meter(operands, block_q=64, block_k=64), tolerance)
        PEERS[name](search)
        thresholds, sparsity, shape = search.best, search.sparsity, (64, 64)
        evaluations, calls, path = search.meter.evaluations, search.meter.calls, search.path
    outcome.seconds += _now() - began
    outcome.evaluations.append(evaluations)
    outcome.calls.append(calls)
    outcome.sparsity.append(sparsity)
    outcome.paths.append(path)
    columns = (tuple(x.tolist()) for x in (thresholds.tau, thresholds.theta, thresholds.lam))
    outcome.constants.append(SiteConstants(*columns, *shape, min_length=0))


def _now() -> float:
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


def table(found: dict[str, Outcome], length: int) -> list[dict[str, Any]]:
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
            "share_within_tolerance": float((errors <= 0.055).float().mean()),
            "perplexity_change": outcome.perplexity,
            "block_shapes": sorted({f"{c.block_q}x{c.block_k}" for c in outcome.constants}),
        }
        print(
            f"{name:24} {row['dense_equivalents_per_site']:10.1f} {row['sparse_calls_per_site']:13.1f} "
            f"{row['seconds']:8.2f} {row['mean_sparsity']:9.1%} {row['worst_unseen_error']:13.3f} "
            f"{row['p95_unseen_error']:12.3f} {row['share_within_tolerance']:7.1%} {row['perplexity_change']:+11.2%}"
        )
        rows.append(row)
    return rows


def mean_path(paths: Sequence[Sequence[tuple[float, float, float, float]]]) -> list[tuple[float, float, float]]:
    """(dense equivalents, mean best sparsity, mean error tried) after each evaluation, mean over the sites."""
    shortest = min(map(len, paths))
    return [
        tuple(sum(path[i][column] for path in paths) / len(paths) for column in (1, 2, 3))  # type: ignore[misc]
        for i in range(shortest)
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def plot(path: Path, rows: Sequence[dict[str, Any]], paths: dict[int, dict[str, Any]]) -> None:
    """Convergence of every search (the paper's Fig. 5), and where each ends (its Table III)."""
    import matplotlib  # the report extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(paths), figsize=(7 * len(paths), 5), squeeze=False)
    for axis, (length, methods) in zip(axes[0], paths.items(), strict=True):
        for name, points in methods.items():
            style = {"marker": "*", "markersize": 16, "color": "black"} if name == ONE_PASS else {"linewidth": 1.5}
            axis.plot([p[0] for p in points], [100 * p[1] for p in points], label=name, **style)
        axis.set(
            xscale="log", xlabel="attention work of the search, dense equivalents per site", title=f"{length} tokens"
        )
        axis.set_ylabel("best mean sparsity within the tolerance so far, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def llama(model: Any, windows: Sequence[Tensor], layers: Sequence[int], tolerance: float) -> list[dict[str, Any]]:
    """Cost of the default search on operands of Llama-2-7B's shape."""
    with closing(capture(recorded(model, windows))) as walk:
        captured = [[replace(o, q=o.q.cpu(), k=o.k.cpu(), v=o.v.cpu()) for o in operands] for _, operands in walk]
    rows = []
    for name, split in {
        "one input, 5 windows of it": lambda operands: operands[:1],
        f"{len(windows)} inputs": lambda operands: operands,
    }.items():
        stopwatch, spent = Stopwatch(), []
        sparsity, evaluations, peak = [], [], 0.0
        for number in range(-1, max(layers)):  # the first round compiles
            operands = [enlarged(o, number) for o in split(captured[number % len(captured)])]
            held = _now() and _reset_peak(windows[0].device)
            began = _now()
            result = tune_site(operands, TuneSettings(tolerance=tolerance), stopwatch=stopwatch)
            if number >= 0:
                spent.append(_now() - began)
                sparsity.append(float(result.measured.sparsity.mean()))
                evaluations.append(result.evaluations)
                peak = max(peak, _peak(windows[0].device) - held)
            else:
                stopwatch = Stopwatch()
            del operands, result
        one = 4 * LLAMA_HEADS * LLAMA_DIM * LLAMA_LENGTH * 2  # Q, K, V, O of one input in half precision
        for count in layers:
            row = {
                "inputs": name,
                "layers": count,
                "seconds": sum(spent[:count]),
                "mean_sparsity": sum(sparsity[:count]) / count,
                "dense_equivalents_per_site": sum(evaluations[:count]) / count,
                "peak_beyond_operands_in_qkvo_of_one_input": peak / one,
                "peak_in_qkvo_of_all_inputs": (peak + held) / (one * len(split(list(windows)))),
            }
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            rows.append(row)
    return rows


def enlarged(operands: Operands, seed: int) -> Operands:
    """Operands of 32 heads of dimension 128 with the structure of captured ones; the module's docstring says how."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed % 1000)

    def mapped(x: Tensor, maps: Tensor, size: float) -> Tensor:
        x = x.to(device)
        heads = torch.arange(LLAMA_HEADS) % x.shape[1]
        return (x[:, heads.to(device)].float() @ maps.to(device) * size).to(x.dtype)

    dim = operands.q.shape[-1]
    same, other = (
        torch.linalg.qr(torch.randn(LLAMA_HEADS, LLAMA_DIM, dim, generator=generator)).Q.mT for _ in range(2)
    )
    repeat = operands.q.shape[1] // operands.k.shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in (operands.k, operands.v))
    size = (operands.scale * LLAMA_DIM**0.5) ** 0.5
    return Operands(
        mapped(operands.q, same, size), mapped(k, same, size), mapped(v, other, 1.0), LLAMA_DIM**-0.5, operands.causal
    )


def _reset_peak(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated())


def _peak(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0.0


if __name__ == "__main__":
    main()
