"""Calibrate every attention call of a model on samples, and write the recipe.

Prints what was decided. The thresholds hold on the samples they were calibrated on: give text of the kind that the
model will read, in windows as long as it will read.
"""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console

from afbs_compile.calibration import calibrate
from afbs_compile.cli import arguments as options
from afbs_compile.cli.models import load_model
from afbs_compile.cli.recipes import SUFFIX
from afbs_compile.cli.sources import Reading, load_samples
from afbs_compile.options import of_calibration
from afbs_compile.report.explain import explain
from afbs_compile.report.inspection import summary

NAME = "calibrate"


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    options.add_model(parser)
    options.add_data(parser, required=True)
    options.add_length(parser, "default: 4096, or the model's positions if fewer")
    options.add_samples(parser)
    options.add_options(parser, of_calibration())
    parser.add_argument("-o", "--output", metavar="recipe.json", required=True, help="where to write the recipe")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Calibrate and save."""
    target, settings = options.output_file(arguments.output, [SUFFIX]), options.given(arguments, of_calibration())
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    samples = load_samples(
        arguments.data, model, length=arguments.seq_len, count=arguments.samples, reading=Reading.of(arguments)
    )
    recipe = calibrate(model.module, samples, **settings)
    with options.writing(target):
        recipe.save(target)
    if arguments.json:
        print(json.dumps({"recipe": str(target), **summary(recipe)}, indent=1))
    else:
        if sys.stdout.isatty():
            Console().print(explain(recipe))
        else:
            print(explain(recipe))
        print(f"wrote {target}")
    return 0
