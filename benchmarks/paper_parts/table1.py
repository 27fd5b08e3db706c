"""Table I: every method at its authors' settings and at matched sparsity, on every text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from common import empty_figure
from timing import times

from afbs_compile.kernels.dense import dense_attention
from afbs_compile.tuner import measure
from paper_parts.bench import EXACT, Matcher, at
from paper_parts.methods import METHODS, Method
from paper_parts.setting import Setting

NAME = "table1"
SPARSITIES = (0.6, 0.7, 0.8, 0.9)
TIMED_AT = 0.7


def run(setting: Setting) -> None:
    """Measure, print, write ``paper_table1``."""
    chosen = [m for m in METHODS[1:] if not setting.arguments.methods or m.name in setting.arguments.methods]
    tested = {text: setting.tested(text, setting.length) for text in setting.texts}
    dense = {text: at(METHODS[0], setting, runs, 0.0).perplexity for text, runs in tested.items()}
    print("dense perplexity:", {text: round(value, 3) for text, value in dense.items()})
    rows: list[dict[str, Any]] = []
    for method in chosen:
        knobs: dict[float, float] = {}
        for text, runs in tested.items():
            matcher = Matcher(method, setting, runs, knobs)
            points = [(name, matcher.at(t)) for name, t in method.recommended]
            matched = {sparsity: matcher.matched(sparsity) for sparsity in SPARSITIES}
            knobs = {sparsity: point.t for sparsity, point in matched.items()}
            points += [(f"{sparsity:.0%}", point) for sparsity, point in matched.items()]
            for name, point in points:
                rows.append(
                    {
                        "method": method.name,
                        "simulated": not method.runs,
                        "text": text,
                        "at": name,
                        "t": point.t,
                        "sparsity": point.sparsity,
                        "perplexity": point.perplexity,
                        "rise": point.perplexity / dense[text] - 1,
                    }
                )
        _show(method, rows)
    speeds = timed([m for m in chosen if m.runs], setting, rows)
    missed = sorted({row["method"] for row in rows if row["at"] in _names() and not _is_matched(row)})
    print("sparsity not matched:", ", ".join(missed) or "none")
    setting.save(NAME, dense=dense, rows=rows, times_of_dense_attention=speeds, not_matched=missed)
    plot(rows, setting.picture(NAME))


def _names() -> list[str]:
    return [f"{sparsity:.0%}" for sparsity in SPARSITIES]


def _wanted(row: dict[str, Any]) -> float:
    return float(row["at"].rstrip("%")) / 100


def _is_matched(row: dict[str, Any]) -> bool:
    return row["at"] in _names() and abs(row["sparsity"] - _wanted(row)) <= EXACT


def _show(method: Method, rows: Sequence[dict[str, Any]]) -> None:
    mine = [row for row in rows if row["method"] == method.name]
    cells = []
    for name in dict.fromkeys(row["at"] for row in mine):
        some = [row for row in mine if row["at"] == name]
        cells.append(f"{name}: {mean(r['sparsity'] for r in some):.1%} {mean(r['rise'] for r in some):+.2%}")
    print(f"{method.name:>22}  " + "  ".join(cells), flush=True)


def timed(methods: Sequence[Method], setting: Setting, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Times of dense attention that a call of the model's middle layer takes at 70 %, predictor included."""
    wanted, operands = setting.middle_call()
    calls = {}
    for method in methods:
        t = next(r["t"] for r in rows if r["method"] == method.name and r["at"] == f"{TIMED_AT:.0%}")
        assert method.calls is not None, "it runs as a kernel"
        calls[method.name] = partial(measure.run, operands, method.calls(setting)(wanted, operands, t))
    found = times({"dense": partial(dense_attention, operands), **calls}, rounds=5)
    speeds = {name: round(found["dense"].median / each.median, 3) for name, each in found.items()}
    print("times of dense attention at 70 %:", speeds)
    return speeds


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity over sparsity, mean of the texts."""
    figure = empty_figure((7.5, 5))
    if figure is None:
        return
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for index, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [row for row in rows if row["method"] == name and _is_matched(row)]
        points = [
            (100 * mean(r["sparsity"] for r in some), 100 * mean(r["rise"] for r in some))
            for some in ([r for r in mine if r["at"] == at_] for at_ in _names())
            if some
        ]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), styles[index // 10], label=name, color=f"C{index % 10}", linewidth=1.4)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("perplexity above dense, % (logarithmic beyond 1)")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")
