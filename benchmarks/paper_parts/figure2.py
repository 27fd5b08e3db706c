"""Fig. 2: perplexity by length, for dense attention, a window of a quarter of the calibrated length, and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import empty_figure
from torch import Tensor

from paper_parts.bench import at
from paper_parts.head import Head
from paper_parts.methods import METHODS, Method
from paper_parts.setting import Setting

NAME = "figure2"
SHORTEST = 1024


def run(setting: Setting) -> None:
    """Measure, print, write ``paper_figure2`` and its picture. Thresholds are of the setting's own length."""
    by_name = {method.name: method for method in METHODS}
    lengths = [SHORTEST]
    while lengths[-1] < setting.arguments.longest:
        lengths.append(2 * lengths[-1])
    width = setting.length // 4

    def near(head: Head, _: float) -> Tensor:
        return head.distance < width

    shown = {
        "dense": (by_name["dense"], 0.0),
        f"window of {width}": (Method("window", "", "", keep=near), 0.0),
        "ours, tolerance": (by_name["ours, tolerance"], 0.5),
        "ours, budget": (by_name["ours, budget"], 0.5),
    }
    text = setting.texts[-1]
    rows: list[dict[str, Any]] = []
    for length in lengths:
        runs = setting.tested(text, length)
        for name, (method, t) in shown.items():
            point = at(method, setting, runs, t)
            rows.append({"length": length, "method": name, **vars(point)})
            print(f"{length:>6} {name:>16}: {point.perplexity:.3f} at {point.sparsity:.1%}", flush=True)
    setting.save(NAME, text=text, calibrated_at=setting.length, rows=rows)
    plot(rows, setting.picture(NAME))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against dense attention's over length: windows of different lengths are different texts."""
    figure = empty_figure((6, 3.8))
    if figure is None:
        return
    axes = figure.subplots()
    dense = {row["length"]: row["perplexity"] for row in rows if row["method"] == "dense"}
    for name in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
        mine = {row["length"]: row["perplexity"] / dense[row["length"]] for row in rows if row["method"] == name}
        axes.plot(list(mine), [100 * (ratio - 1) for ratio in mine.values()], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("perplexity above dense, %")
    axes.set_xticks(list(dense), [f"{length:,}" for length in dense])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")
