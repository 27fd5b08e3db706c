"""Tune one site: run the chosen method on its operands and decide whether the result is worth running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from afbs_compile.kernels.op import engine_name
from afbs_compile.passes.capture import Operands
from afbs_compile.tuner import gp
from afbs_compile.tuner.bracket import Operating
from afbs_compile.tuner.explore import explore, explore_again, low_fidelity
from afbs_compile.tuner.measure import WINDOWS, Measurement, Meter
from afbs_compile.tuner.paper import algorithm_1
from afbs_compile.tuner.refine import refine_lambda, refine_tau
from afbs_compile.tuner.space import Parameterization, Thresholds
from afbs_compile.tuner.speed import WORTHWHILE, SiteSpeed, best_ms, sparse_call
from afbs_compile.tuner.validate import validate

Method = Literal["afbs", "paper"]
METHODS: tuple[str, ...] = get_args(Method)

REFINE_SAMPLES = 5
"""Samples that place the thresholds; further ones only validate them."""

DECIMALS = 6
"""Thresholds are rounded to what the recipe and the graph show before they are validated."""


@dataclass(frozen=True)
class TuneSettings:
    """How to tune: see :func:`afbs_compile.calibrate` for the fields."""

    tolerance: float = 0.055
    method: Method = "afbs"
    parameterization: Parameterization = "corrected"
    block_q: int = 64
    block_k: int = 64


@dataclass(frozen=True)
class SiteResult:
    """What was decided for one site.

    Attributes:
        thresholds: per head, DENSE where nothing feasible was found.
        measured: error on every validation input and sparsity, per head; 0 for DENSE heads.
        speed: ``None`` where every head is DENSE.
        dense_reason: why the whole site stays dense, or ``None`` if it is rewritten.
        evaluations: cost in dense equivalents.
        posterior: the search landscape of ``method="paper"``, to warm-start the next site.
    """

    thresholds: Thresholds
    measured: Measurement
    speed: SiteSpeed | None
    dense_reason: str | None
    evaluations: float
    posterior: gp.Posterior | None = None


def tune_site(
    samples: Sequence[Operands], settings: TuneSettings, *, earlier: gp.Posterior | None = None
) -> SiteResult:
    """Find, validate and time the thresholds of every head of one site.

    Args:
        samples: operands of the site, in canonical form.
        settings: method, tolerance, block shape.
        earlier: the previous site's landscape (``method="paper"`` only).
    """
    if settings.method == "paper":
        samples = samples[:WINDOWS]  # "first 5 validation inputs" (Algorithm 1, line 40)
    meter = Meter(samples, block_q=settings.block_q, block_k=settings.block_k)
    posterior = None
    if settings.method == "paper":
        low = low_fidelity(meter, windows=1)
        result = algorithm_1(low, meter, settings.tolerance, settings.parameterization, earlier)
        thresholds, measured, posterior = result.thresholds, result.measured, result.posterior
    else:
        low = low_fidelity(meter)
        thresholds, measured = _afbs(low, meter, samples, settings)
    finite = measured.error.isfinite().all(0)  # a head whose activations overflow has no error to hold
    thresholds = thresholds.where(finite, Thresholds.dense(meter.heads))
    measured = measured.only(finite)
    evaluations = meter.evaluations + low.evaluations * (low.length / meter.length) ** 2

    if thresholds.is_dense.all():
        reason = f"no threshold keeps any head's error within {settings.tolerance:g}"
        return SiteResult(thresholds, measured, None, reason, evaluations, posterior)
    speed = SiteSpeed.measure(samples[0], thresholds, block_q=settings.block_q, block_k=settings.block_k)
    not_faster = None
    if speed.min_length is None:
        not_faster = f"not faster: {speed.sparse_ms:.3g} ms sparse, {speed.dense_ms:.3g} ms dense"
    return SiteResult(thresholds, measured, speed, not_faster, evaluations, posterior)


def _afbs(
    low: Meter, meter: Meter, samples: Sequence[Operands], settings: TuneSettings
) -> tuple[Thresholds, Measurement]:
    """Explore theta, refine tau and lambda, validate: the paper's three stages, corrected."""
    tolerance = settings.tolerance
    refining = meter if len(samples) <= REFINE_SAMPLES else meter.prefix(meter.length, samples=REFINE_SAMPLES)
    one = meter.prefix(meter.length, samples=1)
    found = refine_tau(refining, explore_again(one, explore(low, tolerance), tolerance), tolerance)
    if engine_name(samples[0].q.device) == "triton":  # FlexAttention has no place to skip in
        found = _faster(found, refine_lambda(refining, found, tolerance), samples[0], settings)
    meter.evaluations += one.evaluations + (0 if refining is meter else refining.evaluations)
    rounded = found.thresholds.map(lambda t: torch.round(t, decimals=DECIMALS))
    return validate(meter, rounded, tolerance)


def _faster(plain: Operating, eager: Operating, sample: Operands, settings: TuneSettings) -> Operating:
    """The operating points with lambda only if the site runs faster with it: the test for skipping costs time too."""
    if (eager.thresholds.lam == plain.thresholds.lam).all():
        return plain
    plain_ms, eager_ms = best_ms(
        [sparse_call(sample, points.thresholds, settings.block_q, settings.block_k) for points in (plain, eager)]
    )
    return eager if eager_ms < WORTHWHILE * plain_ms else plain
