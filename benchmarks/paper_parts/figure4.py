"""Fig. 4: block sizes at equal tolerance and at equal sparsity, with perplexity and time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from common import empty_figure
from timing import times

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.tuner import measure
from paper_parts.bench import Matcher, at
from paper_parts.by_policy import of_recipe, one_threshold
from paper_parts.methods import METHODS, Method
from paper_parts.setting import POLICY, Setting

NAME = "figure4"
SIZES = (32, 64, 128)
SPARSITY = 0.7


def run(setting: Setting) -> None:
    """Measure, print, write ``paper_figure4`` and its picture."""
    runs = setting.tested(setting.texts[0], setting.length)
    dense = at(METHODS[0], setting, runs, 0.0).perplexity
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        shape = BlockShape(size, size)
        calls = of_recipe(setting.recipe(tolerance=setting.TOLERANCE, shape=shape))
        by_threshold = one_threshold(POLICY, shape=shape)
        tolerated = at(Method("tolerance", "", "", calls=lambda _, found=calls: found), setting, runs, 0.5)
        matched = Matcher(Method("threshold", "", "", calls=lambda _, found=by_threshold: found), setting, runs)
        equal = matched.matched(SPARSITY)
        name, operands = setting.middle_call()
        found = times(
            {
                "dense": partial(dense_attention, operands),
                "sparse": partial(measure.run, operands, calls(name, operands, 0.5)),
            },
            rounds=5,
        )
        rows.append(
            {
                "block": size,
                "sparsity_at_tolerance": tolerated.sparsity,
                "rise_at_tolerance": tolerated.perplexity / dense - 1,
                "times_dense_at_tolerance": found["dense"].median / found["sparse"].median,
                "sparsity_matched": equal.sparsity,
                "rise_at_equal_sparsity": equal.perplexity / dense - 1,
            }
        )
        print(
            "blocks of {block}: {sparsity_at_tolerance:.1%} and {rise_at_tolerance:+.2%} at equal tolerance, a call "
            "{times_dense_at_tolerance:.2f}x; {rise_at_equal_sparsity:+.2%} at {sparsity_matched:.1%}".format(
                **rows[-1]
            ),
            flush=True,
        )
    setting.save(NAME, text=setting.texts[0], tolerance=setting.TOLERANCE, dense=dense, rows=rows)
    plot(rows, setting.picture(NAME))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity and sparsity over block size."""
    figure = empty_figure((7, 3.4))
    if figure is None:
        return
    left, right = figure.subplots(1, 2)
    names = [f"{row['block']} x {row['block']}" for row in rows]
    left.plot(
        names, [100 * row["rise_at_equal_sparsity"] for row in rows], marker="o", label=f"at {SPARSITY:.0%} sparsity"
    )
    left.plot(names, [100 * row["rise_at_tolerance"] for row in rows], marker="s", label="at equal tolerance")
    left.set_xlabel("block")
    left.set_ylabel("perplexity above dense, %")
    left.legend()
    right.plot(names, [100 * row["sparsity_at_tolerance"] for row in rows], marker="s", color="C1")
    right.set_xlabel("block")
    right.set_ylabel("sparsity at equal tolerance, %")
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")
