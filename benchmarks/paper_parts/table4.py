"""Table IV: thresholds of one text on others, beside a window and random blocks."""

from __future__ import annotations

from typing import Any

from paper_parts.bench import Matcher, at
from paper_parts.methods import METHODS
from paper_parts.setting import Setting

NAME = "table4"
BASELINES = (("window", 0.8), ("random blocks", 0.7))
CALIBRATED = ("AFBS-BO as printed", "ours, tolerance", "ours, budget")


def run(setting: Setting) -> None:
    """Measure, print, write ``paper_table4``: what was calibrated as it is, the baselines as the paper has them."""
    by_name = {method.name: method for method in METHODS}
    rows: list[dict[str, Any]] = []
    for text in setting.texts:
        runs = setting.tested(text, setting.length)
        dense = at(by_name["dense"], setting, runs, 0.0).perplexity
        points = {name: Matcher(by_name[name], setting, runs).matched(sparsity) for name, sparsity in BASELINES}
        points |= {name: at(by_name[name], setting, runs, 0.5) for name in CALIBRATED}
        for name, point in points.items():
            rise = point.perplexity / dense - 1
            rows.append({"text": text, "method": name, **vars(point), "dense": dense, "rise": rise})
            print(
                f"{text:>18} {name:>20}: {point.sparsity:.1%} sparse, {point.perplexity:.3f} ({rise:+.2%})", flush=True
            )
    setting.save(NAME, calibrated_on=setting.texts[0], rows=rows)
