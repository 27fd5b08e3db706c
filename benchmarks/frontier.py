"""Sparsity, time and perplexity: one threshold for all heads, a tolerance per head, a budget, and an oracle.

    python benchmarks/frontier.py                                                the shipped model at 2,048 tokens
    python benchmarks/frontier.py --model M --texts A.txt B.txt stdlib --length 8192 --dtype bfloat16

Every text is tested on. One threshold for all heads, nothing calibrated, is moved along every policy, and so is the
oracle, which knows the true mass of every block of the text: by the rules "share" and "mass". What is calibrated learns
on windows of the OTHER texts and is held, at the perplexity that it measures here, against the best threshold that
nobody calibrated. On a GPU every point is given as what it makes of dense attention's time in Llama's shape (32 heads
x 128, 32,768 tokens, bf16), predictor included, so that predictors of different cost compare on one axis. Thresholds
run whether or not they are faster at this length: this is about quality. Ends with pass keys at the budget of +1 %.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from common import RESULTS, ROOT, SHIPPED_MODEL, load, sample_runs, save, settings, text_windows
from frontier_oracle import Oracle
from frontier_time import LlamaTime

from afbs_compile import Recipe, calibrate
from afbs_compile.kernels.attend.engines import engines_on, shapes_on
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.passes.capture import Attention, SampleRun, run_with
from afbs_compile.tuner import measure
from afbs_compile.tuner.end_to_end import find_logits, next_tokens, output_change

sys.path.append(str(ROOT / "examples"))
import passkey

TOLERANCES = (0.055, 0.09)
BUDGETS = (0.005, 0.01, 0.02)
RISES = (0.0025, 0.005, 0.01, 0.02, 0.05)
POINTS = 10
"""Thresholds that a curve is measured at, at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a causal language model")
    parser.add_argument(
        "--texts", nargs="+", default=["topics", "stdlib"], help="text files, 'topics', or 'stdlib' (Python's code)"
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4, help="windows of each text to calibrate on")
    parser.add_argument("--test-windows", type=int, default=4)
    parser.add_argument("--passkeys", type=int, default=20, help="prompts; 0 for none")
    parser.add_argument("--blocks", metavar="QxK", help="these shapes only, by default those of the device", nargs="+")
    parser.add_argument("--policies", nargs="+", default=[p.name for p in POLICIES.values() if p.explored])
    parser.add_argument("--no-calibration", action="store_true", help="thresholds and oracle only")
    parser.add_argument("--no-oracle", action="store_true", help="without the true mass, which takes the longest")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="frontier", help="name of the result file")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = list(shapes_on(torch.device(device)))
    if arguments.blocks:
        shapes = [BlockShape(*map(int, blocks.split("x"))) for blocks in arguments.blocks]
        for engine in engines_on(torch.device(device)):
            type(engine).shapes = tuple(shapes)
    model, tokenizer = load(arguments.model, device, getattr(torch, arguments.dtype))
    clock = LlamaTime() if device == "cuda" else None
    windows = {
        Path(text).stem: text_windows(
            tokenizer, text, arguments.length, arguments.windows + arguments.test_windows, device
        )
        for text in arguments.texts
    }
    every = (arguments.windows + arguments.test_windows) / arguments.test_windows
    tested = {round(every * i) for i in range(arguments.test_windows)}
    unseen = {name: [w for i, w in enumerate(all_) if i in tested] for name, all_ in windows.items()}
    known = {name: [w for i, w in enumerate(all_) if i not in tested] for name, all_ in windows.items()}

    rows = []
    for text, tests in unseen.items():
        bench = Bench(sample_runs(model, tests), clock)
        for shape in shapes:
            for policy in arguments.policies:
                rows += curve(f"{policy} {shape}", text, partial(bench.uniform, policy, shape))
            for rule in () if arguments.no_oracle or shape.heads > 1 else ("share", "mass"):
                rows += curve(f"oracle, {rule} {shape}", text, partial(bench.oracle, rule, shape))
        if not arguments.no_calibration:
            samples = [w for other, some in known.items() if other != text for w in some] or known[text]
            for tolerance in (*TOLERANCES, *({"perplexity": budget} for budget in BUDGETS)):
                rows.append(calibrated(model, samples, tolerance, text, bench))
    table(rows)
    keys = []
    if arguments.passkeys and not arguments.no_calibration:
        recipe = calibrate(model, [w for some in known.values() for w in some], tolerance={"perplexity": 0.01})
        keys = passkeys(model, tokenizer, recipe, next(iter(windows.values()))[0], arguments.passkeys)
    save(
        arguments.name,
        arguments.out,
        {"settings": settings(arguments), "points": rows, "at_rise": at_rises(rows), "passkeys": keys},
    )


class Bench:
    """Measures thresholds on the windows of one text.

    Args:
        runs: of the windows; clock: of Llama's shape, on a GPU.
    """

    def __init__(self, runs: Sequence[SampleRun], clock: LlamaTime | None) -> None:
        self.runs, self._clock = runs, clock
        self._dense = [find_logits(run_with(run, lambda *_: None)) for run in runs]

    def measured(self, attention: Attention) -> dict[str, float]:
        """What the attention does to the output."""
        changes = []
        for run, dense in zip(self.runs, self._dense, strict=True):
            changes.append(output_change(dense, find_logits(run_with(run, attention)), next_tokens(run, dense)))
        rise = float(np.expm1(mean(change.loss for change in changes)))
        return {"perplexity_rise": rise, "kl": mean(change.kl for change in changes)}

    def uniform(self, policy: str, shape: BlockShape, threshold: float) -> dict[str, Any]:
        """One threshold for all heads."""
        tau = 1 - threshold if POLICIES[policy].rule == "mass" else 1 / (1 + threshold)
        sparsities: list[float] = []

        def attention(_: str, operands: Any) -> Any:
            call = SparseCall.uniform(operands.heads, tau, policy=policy, shape=shape, kept=measure.kept_for(operands))
            out, counts = measure.run(operands, call)
            sparsities.append(float(measure.sparsity_of(operands, shape, counts).mean()))
            return out

        row = {**self.measured(attention), "sparsity": mean(sparsities)}
        return row | self.time(row["sparsity"], policy, shape)

    def oracle(self, rule: Any, shape: BlockShape, threshold: float) -> dict[str, Any]:
        """The true mass of every block."""
        oracle = Oracle(rule, shape, threshold)
        return {**self.measured(oracle), "sparsity": oracle.sparsity}

    def time(self, sparsity: float, policy: str, shape: BlockShape) -> dict[str, float]:
        """Of Llama's shape, on a GPU."""
        return {} if self._clock is None else self._clock.of(sparsity, policy, shape)


def curve(name: str, text: str, at: Callable[[float], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Points from below the least of :data:`RISES` to above the largest, by factors of two and then in between."""
    found: dict[float, dict[str, Any]] = {}
    threshold = 0.02
    for _ in range(POINTS):
        found[threshold] = at(threshold)
        known = sorted(found)
        rises = [found[x]["perplexity_rise"] for x in known]
        if rises[0] > RISES[0]:
            threshold = known[0] / 2.5
        elif rises[-1] < RISES[-1] and known[-1] < 0.5:
            threshold = known[-1] * 2.5
        else:  # halve the widest gap about +1 %
            gaps = [i for i in range(1, len(known)) if rises[i] > 0.004 and rises[i - 1] < 0.02]
            if not gaps:
                break
            widest = max(gaps, key=lambda i: known[i] / known[i - 1])
            threshold = (known[widest] * known[widest - 1]) ** 0.5
    for threshold in sorted(found):
        row = {"curve": name, "text": text, "setting": threshold, **found[threshold]}
        show(row)
        yield row


def calibrated(model: Any, samples: Sequence[Any], tolerance: Any, text: str, bench: Bench) -> dict[str, Any]:
    """A recipe of other texts, measured on this one."""
    recipe = calibrate(model, samples, tolerance=tolerance)
    calls = {site.name: site.calibrated for site in recipe.sites if site.heads}
    sparsities: list[float] = []

    def attention(site: str, operands: Any) -> Any:
        if site not in calls:  # refused
            return None
        out, counts = measure.run(operands, calls[site])
        sparsities.append(float(measure.sparsity_of(operands, calls[site].shape, counts).mean()))
        return out

    name = "budget" if isinstance(tolerance, Mapping) else "tolerance"
    row = {"curve": name, "text": text, "setting": recipe.goal, **bench.measured(attention)}
    row["sparsity"] = mean(sparsities)
    row["calibration_seconds"] = sum(graph.seconds for graph in recipe.graphs)
    kinds = {(call.policy[0], call.shape) for call in calls.values()}
    row["kinds"] = sorted(f"{policy} {shape}" for policy, shape in kinds)
    if recipe.budget is not None:
        row["passes"] = recipe.budget.forward_passes
        row |= {"promised": recipe.budget.checked_upper, "threshold": recipe.budget.threshold}
        row |= {"measured": recipe.budget.measured, "checked": recipe.budget.checked}
    if len(kinds) == 1:
        row |= bench.time(row["sparsity"], *next(iter(kinds)))
    show(row)
    return row


def show(row: Mapping[str, Any]) -> None:
    setting = row["setting"] if isinstance(row["setting"], str) else f"{row['setting']:.4g}"
    speed = f"  {row['llama_x']:5.2f}x" if "llama_x" in row else ""
    numbers = f"sparsity {row['sparsity']:6.1%}  perplexity {row['perplexity_rise']:+.2%}  KL {row['kl']:.5f}{speed}"
    print(f"{row['text']:>16} {row['curve']:>24} {setting:<12} {numbers}", flush=True)


def between(points: Sequence[Mapping[str, Any]], rise: float, what: str) -> float | None:
    """A curve's number at a perplexity rise, linear between its points; ``None`` outside them."""
    ordered = sorted((p for p in points if what in p), key=lambda p: p["setting"])
    for low, high in itertools.pairwise(ordered):
        a, b = low["perplexity_rise"], high["perplexity_rise"]
        if a <= rise <= b and b > a:
            return float(low[what] + (rise - a) / (b - a) * (high[what] - low[what]))
    return None


def at_rises(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sparsity and time of every uncalibrated curve at every rise; what is calibrated against the best of them."""
    found: list[dict[str, Any]] = []
    for text in dict.fromkeys(row["text"] for row in rows):
        mine = [row for row in rows if row["text"] == text]
        curves = {name: [r for r in mine if r["curve"] == name] for name in dict.fromkeys(r["curve"] for r in mine)}
        plain = {name: points for name, points in curves.items() if name not in ("budget", "tolerance")}
        for name, points in plain.items():
            row: dict[str, Any] = {"text": text, "curve": name}
            for rise in RISES:
                row[f"{rise:.2%}"] = between(points, rise, "sparsity")
            row["llama_x at 1.00%"] = between(points, 0.01, "llama_x")
            found.append(row)
        for point in (*curves.get("tolerance", ()), *curves.get("budget", ())):
            others = [between(p, point["perplexity_rise"], "sparsity") for n, p in plain.items() if "oracle" not in n]
            best = max((other for other in others if other is not None), default=None)
            gain = None if best is None else point["sparsity"] - best
            found.append({"text": text, "curve": point["curve"], "setting": point["setting"], "above_best": gain})
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print :func:`at_rises`."""
    print("\nsparsity at a rise of", *(f"{rise:>7.2%}" for rise in RISES), "  x at +1 %")
    for row in at_rises(rows):
        if "setting" in row:
            gain = "-" if row["above_best"] is None else f"{row['above_best']:+.1%}"
            print(f"{row['text']:>16} {row['curve']:>10} {row['setting']:<50} against the best threshold: {gain}")
        else:
            cells = ["      -" if row[f"{r:.2%}"] is None else f"{row[f'{r:.2%}']:7.1%}" for r in RISES]
            speed = row["llama_x at 1.00%"]
            print(f"{row['text']:>16} {row['curve']:>24}", *cells, "" if speed is None else f"  {speed:.2f}x")


def passkeys(model: Any, tokenizer: Any, recipe: Recipe, filler: Any, count: int) -> list[dict[str, float]]:
    """Recall dense and sparse."""
    calls = {site.name: site.calibrated for site in recipe.sites if site.heads}
    length = filler.shape[1]
    tests = passkey.prompts(tokenizer, filler[0].tolist(), length, count)
    tests = [(ids.to(filler.device), answer) for ids, answer in tests]
    row = {"tokens": length, "prompts": len(tests), "dense": passkey.recall(model, tests)}
    runs = sample_runs(model, [ids for ids, _ in tests])
    row["sparse"] = passkey.recall(
        Replay(runs, lambda name, ops: measure.attend_sparsely(ops, calls[name]) if name in calls else None), tests
    )
    print("pass keys at {tokens:,} tokens: dense {dense:.0%}, sparse {sparse:.0%} of {prompts}".format(**row))
    return [row]


class Replay:
    """Answers calls with recorded inputs, in the order of the recordings, with the sites computed by a function."""

    def __init__(self, runs: Sequence[SampleRun], attention: Attention) -> None:
        self._runs: Iterator[SampleRun] = iter(runs)
        self._attention = attention

    def __call__(self, ids: Any) -> argparse.Namespace:
        """The output of the next recorded call."""
        return argparse.Namespace(logits=find_logits(run_with(next(self._runs), self._attention)))


if __name__ == "__main__":
    main()
