"""Print the FX graph of a model as text, attention calls marked.

Without a recipe the graph before the rewrite, with one after it; --diff shows the attention calls alone, before and
after, with module path, shapes and constants.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from afbs_compile.cli import arguments as options
from afbs_compile.cli.models import load_model
from afbs_compile.cli.progress import step
from afbs_compile.cli.recipes import example_input, load_recipe
from afbs_compile.cli.sources import Reading
from afbs_compile.errors import OptionError
from afbs_compile.options import OPTIONS
from afbs_compile.report.applied import ANY_LENGTH, apply
from afbs_compile.report.sites import MARK, GraphText, diff_lines, graph_text

NAME = "graph"
COLOUR = {"-": "\x1b[31m", "+": "\x1b[32m", "=": "\x1b[33m"}
BOLD, RESET = "\x1b[1m", "\x1b[0m"


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    options.add_model(parser)
    parser.add_argument("--recipe", metavar="R", help="a file of afbs-compile calibrate")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--before", dest="what", action="store_const", const="before", help="the graph as captured")
    what.add_argument("--after", dest="what", action="store_const", const="after", help="the rewritten graph")
    what.add_argument(
        "--diff", dest="what", action="store_const", const="diff", help="attention calls before and after"
    )
    options.add_data(parser, default="random")
    options.add_length(parser, "default: as calibrated")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Capture, rewrite, print."""
    what = arguments.what or ("before" if arguments.recipe is None else "after")
    if what != "before" and arguments.recipe is None:
        raise OptionError(f"--{what}: accepted only with --recipe, which says what is rewritten")
    recipe = None if arguments.recipe is None else load_recipe(arguments.recipe)
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    sample = example_input(
        model, recipe, source=arguments.data, length=arguments.seq_len, reading=Reading.of(arguments)
    )
    shortest = OPTIONS["min_length"].default if recipe is None else ANY_LENGTH
    with step("capturing the graph"):
        applied = apply(model.module, recipe, [sample], name=f"recipe {arguments.recipe}", min_length=shortest)
        graphs = [graph_text(graph) for graph in applied]
    if arguments.json:
        print(json.dumps({"graphs": [_record(graph, what) for graph in graphs]}, indent=1))
        return 0
    for number, graph in enumerate(graphs):
        if len(graphs) > 1:
            print(f"# graph {number}")
        for line in _lines(graph, what):
            print(_coloured(line) if sys.stdout.isatty() else line)
    return 0


def _record(graph: GraphText, what: str) -> dict[str, object]:
    sites = [asdict(site) for site in graph.sites]
    return {"sites": sites} if what == "diff" else {what: getattr(graph, what), "sites": sites}


def _lines(graph: GraphText, what: str) -> list[str]:
    if what == "diff":
        return [line for site in graph.sites for line in diff_lines(site)]
    text: str = getattr(graph, what)
    return text.splitlines()


def _coloured(line: str) -> str:
    if MARK in line:
        return f"{BOLD}{line}{RESET}"
    colour = COLOUR.get(line.strip()[:1]) if line.startswith("  ") and line[3:4] == " " else None
    return line if colour is None else f"{colour}{line}{RESET}"
