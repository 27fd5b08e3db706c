"""Table III and Fig. 5: what searches for thresholds cost and find, over several draws of windows."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from tuning import ONE_PASS, compare, mean_path, plot, table

from paper_parts.setting import Setting

NAME = "table3"
DRAWS = 3
"""Of windows; each search runs on each."""

WINDOWS = 2
"""Of a draw, to calibrate on; as many are unseen."""

SEARCHES = (
    ONE_PASS,
    "bisection",
    "exhaustive tau",
    "stage 1 (BO only)",
    "Algorithm 1 literal",
    "Algorithm 1 corrected",
)
"""``tuning.py`` has the grids too, which take most of an hour on a CPU."""

SHOWN = ("dense_equivalents_per_site", "seconds", "mean_sparsity", "worst_unseen_error", "perplexity_change")


def run(setting: Setting) -> None:
    """Measure, print, write ``paper_table3`` and its picture, of the first draw."""
    draws: list[list[dict[str, Any]]] = []
    paths: dict[int, dict[str, Any]] = {}
    for number in range(DRAWS):
        windows = setting.windows(setting.texts[0], setting.length, 2 * WINDOWS * DRAWS)[number::DRAWS]
        found = compare(setting.model, windows[::2], windows[1::2], SEARCHES, setting.TOLERANCE)
        draws.append(table(found, setting.length, setting.TOLERANCE))
        paths = paths or {setting.length: {name: mean_path(outcome.paths) for name, outcome in found.items()}}
    rows = []
    for same in zip(*draws, strict=True):
        row: dict[str, Any] = {"method": same[0]["method"]}
        for name in SHOWN:
            values = [one[name] for one in same]
            row[name] = {"mean": mean(values), "deviation": stdev(values), "each": values}
        rows.append(row)
        print(f"{row['method']:>22}: " + ", ".join(f"{name} {_shown(row[name])}" for name in SHOWN), flush=True)
    setting.save(NAME, draws=DRAWS, windows=WINDOWS, rows=rows, paths_of_first_draw=paths)
    plot(setting.picture(NAME), draws[0], paths)


def _shown(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3g} ± {value['deviation']:.2g}"
