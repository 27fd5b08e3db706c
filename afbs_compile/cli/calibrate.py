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
from afbs_compile.cli.sources import load_samples
from afbs_compile.kernels.precision import PRECISIONS
from afbs_compile.report.explain import explain
from afbs_compile.report.inspection import summary
from afbs_compile.tuner.site import METHODS

NAME = "calibrate"


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    options.add_model(parser)
    options.add_data(parser, required=True)
    options.add_length(parser, "default: 4096, or the model's positions if fewer")
    options.add_samples(parser)
    parser.add_argument(
        "--tolerance",
        metavar="T",
        type=_tolerance,
        default=0.055,
        help="largest relative L1 error of any head on any sample (default: 0.055), or a budget on the model's output: "
        "kl=0.01 (nats) or perplexity=0.01 (relative rise)",
    )
    parser.add_argument(
        "--method", metavar="M", choices=METHODS, default="afbs", help=f"{' or '.join(METHODS)} (default: afbs)"
    )
    parser.add_argument(
        "--precision",
        metavar="P",
        choices=PRECISIONS,
        default="own",
        help=f"{' or '.join(PRECISIONS)}: fp8 where it is faster and fits the tolerance (default: own, the operands')",
    )
    parser.add_argument(
        "--min-length",
        metavar="N",
        type=options.whole(1),
        default=1024,
        help="leave attention over fewer tokens alone (default: 1024)",
    )
    parser.add_argument("-o", "--output", metavar="recipe.json", required=True, help="where to write the recipe")
    options.add_json(parser)


def _tolerance(text: str) -> float | dict[str, float]:
    """``0.055``, ``kl=0.01`` or ``perplexity=0.01``; what they may be is checked by :func:`afbs_compile.calibrate`."""
    quantity, equals, number = text.rpartition("=")
    try:
        return {quantity: float(number)} if equals else float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: 0.055, kl=0.01 or perplexity=0.01") from None


def run(arguments: argparse.Namespace) -> int:
    """Calibrate and save."""
    target = options.output_file(arguments.output, [SUFFIX])
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    samples = load_samples(
        arguments.data, model, length=arguments.seq_len, count=arguments.samples, tokenizer=arguments.tokenizer
    )
    recipe = calibrate(
        model.module,
        samples,
        tolerance=arguments.tolerance,
        method=arguments.method,
        precision=arguments.precision,
        min_length=arguments.min_length,
    )
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
