"""Show what a recipe decided, per attention call and head.

A table in the terminal; with --html one page that needs nothing else, with heat maps, curves and, given --model and
--data, pictures of the block masks on the first sample.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from afbs_compile.cli import arguments as options
from afbs_compile.cli.models import load_model
from afbs_compile.cli.progress import step
from afbs_compile.cli.recipes import example_input, load_recipe
from afbs_compile.cli.sources import Reading
from afbs_compile.errors import OptionError
from afbs_compile.files import write_whole
from afbs_compile.recipe import Recipe
from afbs_compile.report.applied import apply
from afbs_compile.report.explain import explain
from afbs_compile.report.html import page
from afbs_compile.report.inspection import print_inspection, summary
from afbs_compile.report.masks import Masks, block_masks

NAME = "inspect"


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("recipe", metavar="recipe.json", help="a file of afbs-compile calibrate")
    parser.add_argument("--html", metavar="report.html", help="write the page here instead of printing the table")
    parser.add_argument(
        "--model", metavar="MODEL", help="draw block masks of this model, the recipe's own; with --data"
    )
    options.add_placement(parser)
    options.add_data(parser)
    options.add_length(parser, "default: as calibrated")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, JSON, or write the page."""
    recipe = load_recipe(arguments.recipe, "recipe.json")
    if (arguments.model is None) != (arguments.data is None):
        raise OptionError("--model and --data: accepted only together: block masks need both")
    if arguments.model is not None and arguments.html is None:
        raise OptionError("--model and --data: accepted only with --html: a terminal shows no pictures")
    if arguments.html is not None:
        target = options.output_file(arguments.html, [".html", ".htm"], "--html")
        text = page(recipe, arguments.recipe, _masks(arguments, recipe))
        with options.writing(target):
            write_whole(target, text)
    if arguments.json:
        content = {**summary(recipe), "sites": explain(recipe).to_records(), "heads": recipe.to_records()}
        print(json.dumps(content, indent=1))
    elif arguments.html is not None:
        print(f"wrote {arguments.html}")
    else:
        print_inspection(recipe, Console())
    return 0


def _masks(arguments: argparse.Namespace, recipe: Recipe) -> Masks | None:
    if arguments.model is None:
        return None
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    sample = example_input(
        model, recipe, source=arguments.data, length=arguments.seq_len, reading=Reading.of(arguments)
    )
    with step("drawing block masks"):
        graphs = apply(model.module, recipe, [sample], name=f"recipe {arguments.recipe}")
        return block_masks(graphs, arguments.data)
