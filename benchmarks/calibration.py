"""Sparsity, error and cost of a calibration, and how far its thresholds hold on text of another kind.

    python benchmarks/calibration.py                                     the shipped model, on any machine
    python benchmarks/calibration.py --model M --calibrate A.txt --test B.txt --length 16384 --windows 3

Every number is per head: mean sparsity, worst error over the calibration's own validation inputs, and the share of
(head, window) pairs of the test text whose error stays within the tolerance and within 0.07. ``promise`` holds the
bounds of the recipe and the rates seen on the test text; the bounds are for inputs drawn like the calibration's.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SHIPPED_MODEL, load, sample_runs, save, settings, text_windows
from torch import Tensor

from afbs_compile import Recipe, calibrate
from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.capture import capture
from afbs_compile.tuner.measure import Meter, attend_sparsely

LOOSE = 0.07


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a causal language model")
    parser.add_argument("--calibrate", default="topics", help="text file to calibrate on")
    parser.add_argument(
        "--test", help="text file of another kind, or the same one; by default nothing unseen is measured"
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=5, help="windows to calibrate on")
    parser.add_argument("--test-windows", type=int, help="windows to test on, as many by default")
    parser.add_argument("--tolerance", type=float, default=0.055)
    parser.add_argument("--method", default="afbs", choices=("afbs", "paper"))
    parser.add_argument("--parameterization", default="corrected", choices=("corrected", "paper"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="calibration", help="name of the result file")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(arguments.model, device, getattr(torch, arguments.dtype))
    count = arguments.test_windows or arguments.windows
    samples = text_windows(tokenizer, arguments.calibrate, arguments.length, arguments.windows, device)
    if arguments.test == arguments.calibrate:  # one draw of windows, of which some calibrate
        drawn = text_windows(tokenizer, arguments.test, arguments.length, arguments.windows + count, device)
        random.Random(0).shuffle(drawn)
        samples, windows = drawn[: arguments.windows], drawn[arguments.windows :]
    elif arguments.test is not None:
        windows = text_windows(tokenizer, arguments.test, arguments.length, count, device)
    recipe = calibrate(
        model.model,
        samples,
        tolerance=arguments.tolerance,
        min_length=min(1024, arguments.length),
        method=arguments.method,
        parameterization=arguments.parameterization,
    )
    # The recipe's sparsity is of what runs; sites that were not faster here count all the same in this benchmark.
    sparsity = [[head.sparsity for head in site.heads] for site in recipe.sites]
    worst = [[head.error for head in site.heads] for site in recipe.sites]
    result = {
        "settings": settings(arguments),
        "mean_sparsity": float(torch.tensor(sparsity).mean()),
        "sites_not_faster": [site.name for site in recipe.sites if site.outcome != "sparse"],
        "worst_validation_error": float(torch.tensor(worst).max()),
        "heads": sum(len(site.heads) for site in recipe.sites),
        "dense_heads": sum(head.outcome == "dense" for site in recipe.sites for head in site.heads),
        "calibration_seconds": sum(graph.seconds for graph in recipe.graphs),
        "evaluations_per_site": sum(graph.evaluations for graph in recipe.graphs) / len(recipe.sites),
        "sparsity_per_head": sparsity,
        "error_per_head": worst,
    }
    if arguments.test is not None:
        errors = errors_on(recipe, model.model, windows)
        result["other_text"] = spread(errors, arguments.tolerance)
        result["promise"] = kept(recipe, errors, arguments.tolerance)
    print({key: value for key, value in result.items() if not key.endswith("per_head")})
    save(arguments.name, arguments.out, result)


def spread(errors: Tensor, tolerance: float) -> dict[str, float]:
    """How the errors of all (site, window, head) triples lie about the tolerance."""
    return {
        "pairs": errors.numel(),
        "share_within_tolerance": float((errors <= tolerance).float().mean()),
        "share_within_0.07": float((errors <= LOOSE).float().mean()),
        "worst": float(errors.max()),
    }


def kept(recipe: Recipe, errors: Tensor, tolerance: float) -> dict[str, float]:
    """The recipe's bounds beside the rates at which the windows of the test text exceeded the tolerance."""
    promise = recipe.graphs[0].promise
    beyond = (errors > tolerance).float()
    return {
        "inputs": promise.inputs,
        "confidence": promise.confidence,
        "head_bound": promise.head_bound,
        "head_rate_mean": float(beyond.mean()),
        "head_rate_worst": float(beyond.mean(1).max()),
        "heads_inside_bound": float((beyond.mean(1) <= promise.head_bound).float().mean()),
        "model_bound": promise.model_bound,
        "model_rate": float(beyond.amax((0, 2)).mean()),
    }


def errors_on(recipe: Recipe, model: Any, windows: Sequence[Tensor]) -> Tensor:
    """Error of every (site, window, head) at the recipe's thresholds, on what the sites before make as they run.

    Returns:
        ``[sites, windows, H]``.
    """
    calls = {site.name: site.calibrated for site in recipe.sites if site.heads}
    rewritten = {site.name for site in recipe.sites if site.outcome == "sparse"}

    def as_it_runs(name: str, operands: Operands) -> Tensor | None:
        return attend_sparsely(operands, calls[name]) if name in rewritten else None

    errors = []
    for name, operands in capture(sample_runs(model, windows), as_it_runs):
        errors.append(Meter(operands, windows=1)(calls[name]).error)
    return torch.stack(errors)


if __name__ == "__main__":
    main()
