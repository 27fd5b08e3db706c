"""Write a file that others can run: torch.export (pt2), ONNX, or TensorRT (*.engine without a GPU, *.ep with one).

The recipe's thresholds are written into the file, and nothing is calibrated any more. With --dynamic, batch and length
are free.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from afbs_compile.cli import arguments as options
from afbs_compile.cli.models import LoadedModel, load_model
from afbs_compile.cli.progress import step
from afbs_compile.cli.recipes import example_input, load_recipe
from afbs_compile.cli.sources import Reading, Sample
from afbs_compile.errors import OptionError
from afbs_compile.export import SUFFIXES, Exported, to_onnx, to_pt2, to_tensorrt, to_tensorrt_rtx
from afbs_compile.recipe import Recipe

NAME = "export"
FORMATS = {
    "pt2": (SUFFIXES["pt2"],),
    "onnx": (SUFFIXES["onnx"],),
    "tensorrt": (SUFFIXES["tensorrt-rtx"], SUFFIXES["tensorrt"]),
}
"""The suffixes of each format; those of tensorrt say which TensorRT."""


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    options.add_model(parser)
    parser.add_argument("--recipe", metavar="R", required=True, help="a file of afbs-compile calibrate")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), required=True, help="pt2 and onnx run anywhere, tensorrt on NVIDIA GPUs"
    )
    parser.add_argument("--dynamic", action="store_true", help="leave batch and length free")
    parser.add_argument("--aoti", action="store_true", help="pt2: compile with AOTInductor for this machine")
    parser.add_argument("--opset", metavar="N", type=options.whole(1), help="onnx: operator set (default: 20)")
    parser.add_argument(
        "--plugin", action="store_true", help="*.engine: attention by plugins that call this package's kernels"
    )
    options.add_data(parser, default="random")
    options.add_length(parser, "of the example that the model is traced with; default: as calibrated")
    names = ", ".join(f"*{suffix}" for suffix in SUFFIXES.values())
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help=f"where to write: {names}")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was written."""
    if arguments.aoti and arguments.format != "pt2":
        raise OptionError("--aoti: accepted only with --format pt2")
    if arguments.opset is not None and arguments.format != "onnx":
        raise OptionError("--opset: accepted only with --format onnx")
    target = options.output_file(arguments.output, FORMATS[arguments.format])
    if arguments.plugin and target.suffix.lower() != SUFFIXES["tensorrt-rtx"]:
        raise OptionError(f"--plugin: accepted only with a FILE that ends in {SUFFIXES['tensorrt-rtx']}")
    recipe = load_recipe(arguments.recipe)
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    example = example_input(
        model, recipe, source=arguments.data, length=arguments.seq_len, reading=Reading.of(arguments)
    )
    with step(f"exporting to {arguments.format}"), options.writing(target):
        written = _export(arguments, model, recipe, example, target)
    counts: Counter[str] = Counter(row.outcome for row in written.rows)
    if arguments.json:
        print(json.dumps(_record(written, counts), indent=1))
        return 0
    print(f"wrote {written.path} ({os.path.getsize(written.path) / 2**20:.1f} MiB)")
    for name, shape in written.inputs.items():
        print(f"  input {name} [{', '.join(map(str, shape))}]")
    print("  attention calls: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    for reason, count in Counter(row.reason for row in written.rows if row.reason).items():
        print(f"    {count} x {reason}")
    return 0


def _export(
    arguments: argparse.Namespace, model: LoadedModel, recipe: Recipe, example: Sample, target: Path
) -> Exported:
    source: Any = model.program or model.module
    if arguments.format == "pt2":
        return to_pt2(source, recipe, example, target, dynamic=arguments.dynamic, aoti=arguments.aoti)
    # torch.onnx warns that torchvision's operators are not registered, which no model here has.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    if arguments.format == "onnx":
        opset = {} if arguments.opset is None else {"opset": arguments.opset}
        return to_onnx(source, recipe, example, target, dynamic=arguments.dynamic, **opset)
    if target.suffix.lower() == SUFFIXES["tensorrt"]:
        return to_tensorrt(source, recipe, example, target, dynamic=arguments.dynamic)
    return to_tensorrt_rtx(source, recipe, example, target, dynamic=arguments.dynamic, plugin=arguments.plugin)


def _record(written: Exported, counts: Counter[str]) -> dict[str, object]:
    rows = [{k: v for k, v in asdict(row).items() if k in ("name", "outcome", "reason")} for row in written.rows]
    inputs = {name: list(shape) for name, shape in written.inputs.items()}
    return {"file": str(written.path), "inputs": inputs, "outcomes": dict(counts), "sites": rows}
