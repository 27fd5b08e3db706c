"""Over which denoising steps do thresholds hold that were calibrated on one of them?

    python benchmarks/diffusion_steps.py --out benchmarks/results

Two models of diffusers denoise latents of a drawn video: the example's transformer, whose written-down weights compare
patches as boldly as a step has noise, and a Wan with random weights whose keys are made as its queries are, on latents
with the noise of each step. Every call of every step is calibrated by itself, and what came out is measured at every
step: the error of each head where step ``c`` was calibrated and step ``s`` is computed. Neither model is trained.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, save, settings

import afbs_compile.integrations.diffusers as afbs

# isort: split
from diffusers import WanTransformer3DModel

from afbs_compile.integrations.diffusers.models import CHECKED_STEPS
from afbs_compile.kernels.operands import Operands
from afbs_compile.revalidate import raised
from afbs_compile.tuner.graph import site_recipe
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.measure import Meter
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.site import search_curves
from afbs_compile.tuner.speed import Stopwatch

sys.path.insert(0, str(ROOT / "examples"))

import video

Steps = list[dict[str, Operands]]
"""The calls of each step, by name."""


def operands_of(model: Any, run: Callable[[], object]) -> Steps:
    """Run a model densely and keep what its calls attend over."""
    afbs.use(model, min_length=256)
    served = afbs.served(model)
    assert served is not None
    steps: Steps = [{}]

    def keep(name: str, operands: Operands) -> None:
        if name in steps[-1]:
            steps.append({})
        steps[-1][name] = operands

    served.attend = keep  # type: ignore[method-assign, assignment]
    run()
    return steps


def example_steps(frames: int, size: int, count: int) -> Steps:
    """The example's transformer, denoising."""
    start = video.noisy(video.scene(frames, size, 0), video.START, 0)
    model = video.VideoDenoiser().eval()
    return operands_of(model, lambda: video.denoise(model, start, count))


def wan_steps(frames: int, size: int, count: int) -> Steps:
    """A Wan with random weights that attends to what is alike, on latents with each step's noise."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        text_dim=32,
        freq_dim=32,
        ffn_dim=256,
        num_layers=2,
    ).eval()
    for block in model.blocks:
        block.attn1.to_k.load_state_dict(block.attn1.to_q.state_dict())
        block.attn1.norm_q.weight.data.view(4, 32).mul_(torch.tensor([3.0, 4.0, 6.0, 8.0])[:, None])
    clean, text = video.scene(frames, size // 2, 0), torch.randn(1, 16, 32)

    def run() -> None:
        for share in video.shares(count):
            model(video.noisy(clean, share, 0), torch.tensor([1000 * share]), text)

    return operands_of(model, run)


def matrix(steps: Steps, tolerance: float) -> dict[str, Any]:
    """For each call what thresholds of each step do at each: errors and sparsities ``[calibrated][measured][head]``."""
    found: dict[str, Any] = {}
    for name in steps[0]:
        error, sparsity, calibrated = [], [], []
        for step in steps:
            call = search_curves(SiteInputs([step[name]]), TuneSettings(tolerance), Stopwatch()).call
            measured = [Meter([other[name]])(call) for other in steps]
            error.append([each.error.amax(0).tolist() for each in measured])
            sparsity.append([each.sparsity.tolist() for each in measured])
            calibrated.append([not dense for dense in call.dense_heads])
            print(name, len(error) - 1, [f"{max(row):.3f}" for row in error[-1]], flush=True)
        found[name] = {"error": error, "sparsity": sparsity, "sparse": calibrated}
    return found


def checked(steps: Steps, tolerance: float) -> dict[str, Any]:
    """What serving ends with: calibrated on the first step, raised at some of the others, measured at all of them."""
    found: dict[str, Any] = {}
    for name, first in steps[0].items():
        result = search_curves(SiteInputs([first]), TuneSettings(tolerance), Stopwatch())
        row = site_recipe(name, first, result)
        for number, step in enumerate(steps, 1):
            if number in CHECKED_STEPS:
                row = raised(row, row.calibrated.rounded(), [step[name]], tolerance, Stopwatch()).row
        measured = [Meter([step[name]])(row.calibrated) for step in steps]
        found[name] = {
            "error": [each.error.amax(0).tolist() for each in measured],
            "sparsity": [each.sparsity.tolist() for each in measured],
            "sparse": [not dense for dense in row.calibrated.dense_heads],
        }
    return found


def holding(errors: list[list[float]], sparse: list[list[bool]], tolerance: float) -> float | None:
    """The share of the sparse heads whose error holds."""
    held = [
        e <= tolerance for heads, on in zip(errors, sparse, strict=True) for e, o in zip(heads, on, strict=True) if o
    ]
    return round(statistics.mean(held), 3) if held else None


def summary(calls: dict[str, Any], served: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Over the heads of all calls: a row for each calibrated step and one for what serving ends with, by step."""
    count = len(next(iter(calls.values()))["error"])
    rows = [[(x["error"][c], x["sparsity"][c], x["sparse"][c]) for x in calls.values()] for c in range(count)]
    rows.append([(x["error"], x["sparsity"], x["sparse"]) for x in served.values()])
    sparse = [[on for _, _, on in row] for row in rows]
    errors = [[[error[s] for error, _, _ in row] for s in range(count)] for row in rows]
    return {
        "heads_that_hold": [[holding(e, on, tolerance) for e in row] for row, on in zip(errors, sparse, strict=True)],
        "worst_error": [[round(max(map(max, e)), 4) for e in row] for row in errors],
        "sparsity": [
            [round(statistics.mean(x for _, sparsity, _ in row for x in sparsity[s]), 3) for s in range(count)]
            for row in rows
        ],
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=0.055)
    parser.add_argument("--name", default="diffusion_steps_cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"settings": settings(arguments), "noise": video.shares(arguments.steps), "models": {}}
    for name, steps_of in (("example", example_steps), ("wan", wan_steps)):
        steps = steps_of(arguments.frames, arguments.size, arguments.steps)
        calls, served = matrix(steps, arguments.tolerance), checked(steps, arguments.tolerance)
        found = summary(calls, served, arguments.tolerance)
        result["models"][name] = {**found, "calls": calls, "served": served}
        for key, rows in found.items():
            print(f"{name}, {key}: a row for each calibrated step, then what serving ends with; a column for each step")
            for row in rows:
                print("  ".join("   - " if x is None else f"{x:5.2f}" for x in row))
    save(arguments.name, arguments.out, result)


if __name__ == "__main__":
    main()
