"""Over which denoising steps do thresholds hold that were calibrated on one of them?

    python benchmarks/diffusion_steps.py --out benchmarks/results

Two models of diffusers denoise latents of a drawn video: the example's transformer, whose written-down weights compare
patches as boldly as a step has noise, and a Wan with random weights whose keys are made as its queries are, on latents
with the noise of each step. The calls of the first, the middle and the last step are calibrated, each step by itself,
and the error of each head is measured at every step; so is what serving a pipeline ends with, which raises thresholds
at later steps. Neither model is trained.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, save, settings

import afbs_compile.integrations.diffusers as afbs

# isort: split
from diffusers import WanTransformer3DModel

from afbs_compile.integrations.diffusers.models import CHECKED_STEPS
from afbs_compile.kernels.call import SparseCall
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


def measured(steps: Steps, calls: dict[str, SparseCall]) -> dict[str, Any]:
    """For each call what its thresholds do at each step: errors and sparsities ``[step][head]``."""
    found: dict[str, Any] = {}
    for name, call in calls.items():
        at = [Meter([step[name]])(call) for step in steps]
        found[name] = {
            "error": [each.error.amax(0).tolist() for each in at],
            "sparsity": [each.sparsity.tolist() for each in at],
            "sparse": [not dense for dense in call.dense_heads],
        }
        print(name, [f"{max(row):.3f}" for row in found[name]["error"]], flush=True)
    return found


def rows_of(steps: Steps, calibrated: list[int], tolerance: float) -> dict[str, Any]:
    """Calls calibrated on some steps, each alone, and as serving has them, measured at every step.

    Serving calibrates on the first step and raises thresholds at some of the later ones.
    """
    found: dict[str, Any] = {}
    served: dict[str, SparseCall] = {}
    for number in calibrated:
        calls = {}
        for name, operands in steps[number].items():
            result = search_curves(SiteInputs([operands]), TuneSettings(tolerance), Stopwatch())
            calls[name] = result.call
            if number == 0:
                row = site_recipe(name, operands, result)
                for later, step in enumerate(steps, 1):
                    if later in CHECKED_STEPS:
                        row = raised(row, row.calibrated.rounded(), [step[name]], tolerance, Stopwatch()).row
                served[name] = row.calibrated
        found[f"calibrated on step {number + 1}"] = measured(steps, calls)
    return {**found, "served": measured(steps, served)}


def holding(errors: list[list[float]], sparse: list[list[bool]], tolerance: float) -> float | None:
    """The share of the sparse heads whose error holds."""
    held = [
        e <= tolerance for heads, on in zip(errors, sparse, strict=True) for e, o in zip(heads, on, strict=True) if o
    ]
    return round(statistics.mean(held), 3) if held else None


def summary(calls: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """By step, over the heads of all calls."""
    sites = list(calls.values())
    sparse, count = [site["sparse"] for site in sites], len(sites[0]["error"])
    errors = [[site["error"][step] for site in sites] for step in range(count)]
    sparsity = [[x for site in sites for x in site["sparsity"][step]] for step in range(count)]
    return {
        "heads that hold": [holding(error, sparse, tolerance) for error in errors],
        "worst error": [round(max(map(max, error)), 4) for error in errors],
        "sparsity": [round(statistics.mean(x), 4) for x in sparsity],
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
    result: dict[str, Any] = {
        "diffusers": version("diffusers"),
        "settings": settings(arguments),
        "noise": video.shares(arguments.steps),
        "models": {},
    }
    for name, steps_of in (("example", example_steps), ("wan", wan_steps)):
        steps = steps_of(arguments.frames, arguments.size, arguments.steps)
        last = len(steps) - 1
        rows = rows_of(steps, [0, last // 2, last], arguments.tolerance)
        result["models"][name] = {
            row: {**summary(calls, arguments.tolerance), "calls": calls} for row, calls in rows.items()
        }
        for row, found in result["models"][name].items():
            for key in ("heads that hold", "worst error", "sparsity"):
                numbers = "  ".join("   - " if x is None else f"{x:5.2f}" for x in found[key])
                print(f"{name}, {row}, {key} at each step: {numbers}", flush=True)
    save(arguments.name, arguments.out, result)


if __name__ == "__main__":
    main()
