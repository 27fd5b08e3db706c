"""Section III-C: fidelities, evaluations, warm start, layers, smoothness of the error, the regret bound's constants."""

from __future__ import annotations

import math
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.passes.capture import capture
from afbs_compile.tuner import gp, paper
from afbs_compile.tuner.measure import Meter, low_fidelity
from afbs_compile.tuner.site import PAPER_POLICY, PAPER_SHAPE
from afbs_compile.tuner.space import at_latent
from paper_parts.setting import Setting

NAME = "section3"
GRID = torch.linspace(0, 1, 11)
LEAST = 4096
"""Tokens from which on a quarter of a sample is the low fidelity."""

EVALUATIONS = 15
"""Of stage 1, for which the paper states its bound."""


def run(setting: Setting) -> None:
    """Measure, print, write ``paper_section3``."""
    length = max(setting.length, LEAST)
    (sample,) = setting.tested(setting.texts[0], length)[:1]
    layers: list[dict[str, Any]] = []
    earlier: gp.Posterior | None = None
    for name, operands in capture([sample]):
        full = Meter(operands, windows=1)
        low = low_fidelity(full, PAPER_SHAPE.q, windows=1)
        call = SparseCall.uniform(full.heads, KEEP_ALL, policy=PAPER_POLICY, shape=PAPER_SHAPE)
        points = [at_latent(call, torch.full((full.heads,), float(s)), "corrected") for s in GRID]
        high_error, low_error = (torch.stack([meter(p).worst for p in points]) for meter in (full, low))
        space = paper.Space(call, setting.TOLERANCE, "corrected")
        counts, sparsity = {}, {}
        arms = {"cold": (None, None), "cold, as few steps": (None, paper.WARM), "warm": (earlier, None)}
        for start, (before, steps) in arms.items():
            meters = [low_fidelity(Meter(operands), PAPER_SHAPE.q, windows=1), Meter(operands)]
            found = paper.algorithm_1(*meters, space, before, steps)
            counts[start], sparsity[start] = len(found.trials), float(found.measured.sparsity.mean())
            posterior = found.posterior
        earlier = posterior
        layers.append({"site": name, **_of_curves(high_error, low_error), "evaluations": counts, "sparsity": sparsity})
        print(layers[-1], flush=True)
    found_over_all = summary(layers)
    for key, value in found_over_all.items():
        print(f"{key}: {value}")
    setting.save(NAME, lengths=[low.length, length], layers=layers, **found_over_all)


def _of_curves(high: torch.Tensor, low: torch.Tensor) -> dict[str, Any]:
    """What errors over s, ``[11, H]``, say; heads whose error does not move have no rank correlation."""
    steps = torch.diff(high, dim=0)
    moving = [h for h in range(high.shape[1]) if float(high[:, h].max()) > 1e-4 and float(low[:, h].max()) > 1e-4]
    return {
        "rank_correlation": [round(float(spearmanr(high[:, h], low[:, h]).statistic), 4) for h in moving],
        "rising_steps": float((steps >= -1e-6).float().mean()),
        "lipschitz": [round(x, 4) for x in (steps.abs().amax(0) / float(GRID[1])).tolist()],
        "error_at_s_1": [round(x, 4) for x in high[-1].tolist()],
    }


def summary(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the layers."""
    correlations = [x for layer in layers for x in layer["rank_correlation"]]
    lipschitz = [x for layer in layers for x in layer["lipschitz"]]
    half, later = len(layers) // 2, layers[1:]  # the first layer has no one before it
    return {
        "rank correlation of low and high fidelity, mean and deviation over heads": [
            round(mean(correlations), 3),
            round(stdev(correlations), 3),
        ],
        "evaluations of a layer after the first": {
            start: mean(layer["evaluations"][start] for layer in later) for start in later[0]["evaluations"]
        },
        "sparsity found after the first layer": {
            start: round(mean(layer["sparsity"][start] for layer in later), 4) for start in later[0]["sparsity"]
        },
        "sparsity of the first and second half of the layers": [
            round(mean(layer["sparsity"]["cold"] for layer in part), 4) for part in (layers[:half], layers[half:])
        ],
        "share of steps of s at which the error does not fall": round(
            mean(layer["rising_steps"] for layer in layers), 3
        ),
        "Lipschitz constant of the error in s, median and largest": [
            round(float(np.median(lipschitz)), 3),
            round(max(lipschitz), 3),
        ],
        "regret bound of Eq. 6 at 15 evaluations, in standard deviations of the error": {
            f"information gain {gain:.1f}": round(math.sqrt(gain * math.log(EVALUATIONS) / EVALUATIONS), 2)
            for gain in (math.log(EVALUATIONS) ** 2, information_gain(EVALUATIONS))
        },
    }


def information_gain(count: int) -> float:
    """Of the Gaussian process that Algorithm 1 fits, at as many evenly spaced evaluations, in nats.

    ``log det(1 + K / noise) / 2``; what the paper calls O(log^2 n).
    """
    points = torch.linspace(0, 1, count, dtype=torch.float64)
    kernel = gp.matern52(points, points)
    return float(torch.logdet(torch.eye(count, dtype=torch.float64) + kernel / gp.NOISE)) / 2
