"""A drill: a model calibrated on one kind of text serves it, then another kind; what its monitor sees and does.

    python benchmarks/drill.py                                               the shipped model: documents, then code
    python benchmarks/drill.py --model M --before novels.txt --after stdlib --name drill_40m

Calibrated with a tolerance on every head, on windows spread over the first text, it serves other windows of it, then
the second text, with every call looked at. Alarmed heads go dense as they are named; once no new one has come for
a while the model is calibrated again, on the calls that it kept. Every window is also run densely, to tell what its
perplexity would have been. Ends with a picture: what each call cost, and the evidence.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, SHIPPED_MODEL, empty_figure, load, save, settings, text_windows
from torch import Tensor

import afbs_compile
from afbs_compile.errors import AfbsWarning
from afbs_compile.monitor.monitor import Monitor

SETTLED = 12
"""Calls without a new alarm after which the model is calibrated again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a causal language model")
    parser.add_argument("--before", default="topics", help="text file, 'topics', or 'stdlib' (Python's code)")
    parser.add_argument("--after", default="stdlib", help="likewise")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=30, help="windows to calibrate on")
    parser.add_argument("--calls", type=int, default=60, help="windows served of each text")
    parser.add_argument("--tolerance", type=float, default=0.055)
    parser.add_argument("--keep", type=int, default=8, help="calls kept to calibrate on again")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="drill_7m", help="name of the result file")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(arguments.model, device, getattr(torch, arguments.dtype))
    known = text_windows(tokenizer, arguments.before, arguments.length, arguments.samples + arguments.calls, device)
    every = len(known) / arguments.samples
    samples = {round(i * every) for i in range(arguments.samples)}
    served = [window for i, window in enumerate(known) if i not in samples]
    served += text_windows(tokenizer, arguments.after, arguments.length, arguments.calls, device)
    served = [window[0][None] for window in served]  # of one stride, or Dynamo would compile for each text

    recipe = afbs_compile.calibrate(model, [known[i] for i in samples], tolerance=arguments.tolerance)
    how = {"share": 1.0, "look_every": 1, "keep": arguments.keep}
    sparse = torch.compile(model, backend="afbs", options={"recipe": recipe, "monitor": how})
    rows, seconds = serve(model, sparse, served, arguments.calls)
    (monitor,) = afbs_compile.monitors(sparse)
    promise = recipe.graphs[0].promise
    result = {
        "settings": settings(arguments),
        "sparsity": [recipe.sparsity, None if monitor.recipe is None else monitor.recipe.sparsity],
        "promised_rate": None if promise is None else promise.head_bound,
        "recalibration_seconds": seconds,
        "phases": phases(rows, arguments.calls),
        "alarms": monitor.to_dict()["alarms"],
        "calls": rows,
    }
    for name, value in result["phases"].items():
        print(f"{name:>40}: {value}")
    save(arguments.name, arguments.out, result)
    plot(rows, arguments, arguments.out / f"{arguments.name}.png")


@torch.no_grad()
def serve(model: Any, sparse: Any, windows: list[Tensor], before: int) -> tuple[list[dict[str, Any]], float | None]:
    """Serve the windows one by one.

    Args:
        model: dense; sparse: the same compiled with a monitor; before: windows of the first kind.

    Returns:
        What each call cost, and the seconds that the calibration took, ``None`` where there was none.
    """
    rows: list[dict[str, Any]] = []
    seconds, last_alarm = None, None
    for number, window in enumerate(windows):
        loss, dense = (next_loss(m(input_ids=window, use_cache=False).logits, window) for m in (quiet(sparse), model))
        (monitor,) = afbs_compile.monitors(sparse)
        heads = monitor.to_records()
        row = {
            "text": "before" if number < before else "after",
            "rise": math.expm1(loss - dense),
            "alarms": len(monitor.alarms),
            "dense_heads": sum(head["dense"] for head in heads),
            "evidence": mean([head["evidence"] for head in heads if head["sampled"]] or [1.0]),
            "calibrated_again": seconds is not None,
        }
        rows.append(row)
        print("{text:>6} {rise:+8.2%} {alarms:3} alarms, {dense_heads:3} heads dense, E {evidence:.3g}".format(**row))
        if len(rows) > 1 and row["alarms"] > rows[-2]["alarms"]:
            last_alarm = number
        if last_alarm is not None and seconds is None and number - last_alarm >= SETTLED:
            seconds = recalibrated(monitor)
    return rows, seconds


def quiet(sparse: Any) -> Any:
    """The model without its warnings, of which every alarm is one."""

    def call(**inputs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AfbsWarning)
            return sparse(**inputs)

    return call


def recalibrated(monitor: Monitor) -> float:
    """Calibrate again; the seconds that it took."""
    began = perf_counter()
    monitor.recalibrate()
    return round(perf_counter() - began, 1)


def next_loss(logits: Tensor, window: Tensor) -> float:
    """Cross entropy of the window's own next tokens."""
    return float(F.cross_entropy(logits[0, :-1].float(), window[0, 1:]))


def phases(rows: list[dict[str, Any]], before: int) -> dict[str, Any]:
    """What each phase cost, and when the alarm came."""
    later = rows[before:]
    first = next((i for i, row in enumerate(later) if row["alarms"] > rows[before - 1]["alarms"]), None)
    parts = {
        "before": rows[:before],
        "after, until the first alarm": later if first is None else later[: first + 1],
        "after, alarmed heads dense": []
        if first is None
        else [r for r in later[first + 1 :] if not r["calibrated_again"]],
        "after, calibrated again": [row for row in later if row["calibrated_again"]],
    }
    rises = {f"perplexity {name}": mean(row["rise"] for row in part) if part else None for name, part in parts.items()}
    return {
        "alarms before": rows[before - 1]["alarms"],
        "looks to the first alarm after": None if first is None else first + 1,
        **rises,
    }


def plot(rows: list[dict[str, Any]], arguments: argparse.Namespace, path: Path) -> None:
    """What each call cost, heads made dense, and the evidence."""
    figure = empty_figure((7, 5))
    if figure is None:
        return
    upper, middle, lower = figure.subplots(3, sharex=True, height_ratios=(2, 1, 1))
    number = range(1, len(rows) + 1)
    upper.axhline(0, color="grey", linewidth=0.8)
    upper.scatter(number, [100 * row["rise"] for row in rows], s=14, color="tab:blue")
    upper.set_ylabel("perplexity against\ndense, %")
    middle.step(number, [row["dense_heads"] for row in rows], where="post", color="tab:red")
    middle.set_ylabel("heads made\ndense")
    lower.semilogy(number, [row["evidence"] for row in rows], color="tab:green")
    lower.axhline(20, color="grey", linestyle="--", linewidth=0.8)
    lower.set_ylabel("mean E-value")
    lower.set_xlabel("call, every one looked at")
    marks = [(arguments.calls + 0.5, f"{Path(arguments.after).stem} from here", "black")]
    alarm = next((i for i, row in enumerate(rows, 1) if row["alarms"]), None)
    again = next((i for i, row in enumerate(rows, 1) if row["calibrated_again"]), None)
    marks += [] if alarm is None else [(alarm, "first alarm", "tab:red")]
    marks += [] if again is None else [(again - 0.5, "calibrated again", "tab:purple")]
    for place, text, colour in marks:
        for axes in (upper, middle, lower):
            axes.axvline(place, color=colour, linewidth=0.8)
        upper.text(place, 1.02, text, transform=upper.get_xaxis_transform(), fontsize=8, color=colour, rotation=20)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
