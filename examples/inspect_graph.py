"""Look at a rewritten graph and at what was decided, from Python.

    python examples/inspect_graph.py [--recipe model.recipe.json] [--html report.html]

Without a recipe the shipped model is calibrated on one window of text first; that takes about a minute on two CPU
cores. The same from a shell:

    afbs-compile graph MODEL --recipe model.recipe.json --diff
    afbs-compile inspect model.recipe.json --html report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from windows import SHIPPED_MODEL, help_topics, windows

import afbs_compile
from afbs_compile.report.applied import apply
from afbs_compile.report.html import page
from afbs_compile.report.sites import diff_lines, graph_text


@torch.no_grad()
def main(
    recipe: afbs_compile.Recipe | None = None,
    html: Path | None = None,
    model: str | Path = SHIPPED_MODEL,
    length: int = 1024,
) -> list[str]:
    """Print the attention calls before and after, and the heads; returns the lines about the calls."""
    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    (ids,) = windows(AutoTokenizer.from_pretrained(model), help_topics(), length, 1)
    sample = {"input_ids": ids}
    if recipe is None:
        recipe = afbs_compile.calibrate(language_model, [sample], min_length=length // 2)

    # Attention calls before (-) and after (+) the rewrite, with their constants; "=" is a call that stays dense.
    lines = []
    for graph in apply(language_model, recipe, [sample]):
        text = graph_text(graph)
        print(f"the graph has {len(text.before.splitlines())} lines before, {len(text.after.splitlines())} after")
        lines += [line for site in text.sites for line in diff_lines(site)]
    print("\n".join(lines))

    # Every head as a plain record, e.g. for pandas.DataFrame(recipe.to_records()).
    heads = sorted(recipe.to_records(), key=lambda head: -head["sparsity"])
    for head in heads[:3]:
        print("{site} head {head}: tau {tau:.3f}, sparsity {sparsity:.1%}, error {error:.3f}".format(**head))
    if html is not None:
        html.write_text(page(recipe, html.stem), encoding="utf-8")
        print(f"wrote {html}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="of the model; without it one is made")
    parser.add_argument("--html", type=Path, help="write the page here as well")
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder or id of a causal language model")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the window")
    given = parser.parse_args()
    loaded = None if given.recipe is None else afbs_compile.Recipe.load(given.recipe)
    main(loaded, given.html, given.model, given.length)
