"""Tune one site: run the chosen method on its operands and decide whether the result is worth running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch

from afbs_compile.kernels.op import engine_name
from afbs_compile.kernels.reference import KEEP_ALL, LAMBDA_OFF
from afbs_compile.passes.capture import Operands
from afbs_compile.recipe import Policy, Precision
from afbs_compile.tuner import gp
from afbs_compile.tuner.budget import Budget
from afbs_compile.tuner.curves import one_back, tau_exponent
from afbs_compile.tuner.explore import Explored, explore
from afbs_compile.tuner.fp8 import SHAPE, fp8_refusal, with_fp8
from afbs_compile.tuner.inputs import BlockShape, Inputs
from afbs_compile.tuner.lengths import fit_lengths
from afbs_compile.tuner.measure import (
    WINDOWS,
    Measurement,
    Meter,
    kept_share,
    low_fidelity,
    nothing_to_skip,
    relative_l1,
    sparse_attention,
    with_kept_blocks,
)
from afbs_compile.tuner.paper import algorithm_1
from afbs_compile.tuner.result import SiteResult
from afbs_compile.tuner.space import Parameterization, Thresholds
from afbs_compile.tuner.speed import SiteSpeed, Stopwatch, clocked
from afbs_compile.tuner.validate import Validated, validate

Method = Literal["afbs", "paper"]
METHODS: tuple[str, ...] = get_args(Method)

BLOCK_SHAPES = {
    "triton": (BlockShape(128, 128), BlockShape(128, 64), BlockShape(64, 64)),
    # FlexAttention is handed 64 x 64 tiles on the CPU, whatever the blocks: larger ones compute more, no faster.
    "flex": (BlockShape(64, 64),),
}
"""Block shapes that ``method="afbs"`` compares, by engine."""

PAPER_POLICY: tuple[Policy, ...] = ("meansim",)
"""Algorithm 1 searches SpargeAttn's thresholds."""

PAPER_SHAPE = BlockShape(64, 64)
"""The paper's block size, B = 64 (its experimental setup)."""

MOSTLY = 0.5
"""Where every tau keeps more than this share of the blocks, a length's error does not tell how errors move."""

STEPS_BACK = 4
"""Thresholds that a head goes back where the kernel does not confirm the pass, before it is DENSE."""


@dataclass(frozen=True)
class TuneSettings:
    """How to tune: see :func:`afbs_compile.calibrate` for the fields.

    Attributes:
        budget: of the output, instead of the tolerance.
        shapes: block shapes to compare, those of :data:`BLOCK_SHAPES` by default; ``method="paper"`` takes the first.
    """

    tolerance: float = 0.055
    method: Method = "afbs"
    parameterization: Parameterization = "corrected"
    budget: Budget | None = None
    precision: Precision = "own"
    shapes: tuple[BlockShape, ...] | None = None

    def shapes_on(self, device: torch.device) -> tuple[BlockShape, ...]:
        """Block shapes to compare on a device."""
        return self.shapes or BLOCK_SHAPES[engine_name(device)]


def tune_site(
    samples: Sequence[Operands],
    settings: TuneSettings,
    *,
    earlier: gp.Posterior | None = None,
    stopwatch: Stopwatch | None = None,
) -> SiteResult:
    """Find, validate and time the thresholds of every head of one site.

    Args:
        samples: operands of the site, in canonical form.
        settings: method, tolerance, block shapes.
        earlier: the previous site's landscape (``method="paper"`` only).
        stopwatch: what timing earlier sites has shown.
    """
    stopwatch = stopwatch or Stopwatch()
    nothing = f"no threshold keeps any head's error within {settings.tolerance:g}"
    if settings.method == "paper":
        return with_speed(_paper(samples, settings, earlier), samples[0], stopwatch, nothing)
    inputs = Inputs(with_kept_blocks(samples))
    nothing = nothing_to_skip(inputs.elements, settings.shapes_on(samples[0].q.device)) or nothing
    fp8 = settings.precision == "fp8"
    if fp8 and fp8_refusal(inputs.elements[inputs.first], SHAPE) is None:
        settings = replace(settings, shapes=(SHAPE,))
    result = search_curves(inputs, settings, stopwatch)
    if fp8:
        result = with_fp8(inputs, result, settings.tolerance)
    dense_ms = inputs.dense_ms if samples[0].q.is_cuda else None
    return with_speed(result, inputs.elements[inputs.first], stopwatch, nothing, dense_ms)


def with_speed(
    result: SiteResult, sample: Operands, stopwatch: Stopwatch, nothing: str, dense_ms: float | None = None
) -> SiteResult:
    """The result with its speed, dense where it does not pay.

    Args:
        result: of the site; sample: operands to time it on.
        stopwatch: what timing earlier sites has shown.
        nothing: the reason to give where every head is DENSE.
        dense_ms: milliseconds of the dense call, where they are known.
    """
    if result.thresholds.is_dense.all():
        return replace(result, dense_reason=nothing)
    sparsity = float(result.measured.sparsity.mean())
    speed = SiteSpeed.measure(
        sample,
        result.thresholds,
        result.policy,
        sparsity,
        stopwatch,
        precision=result.precision,
        dense_ms=dense_ms,
        sparse_ms=result.confirmed_ms if result.precision is None else None,
        **result.shape._asdict(),
    )
    not_faster = None
    if speed.min_length is None:
        not_faster = f"not faster: {speed.sparse_ms:.3g} ms sparse, {speed.dense_ms:.3g} ms dense"
    return replace(result, speed=speed, dense_reason=not_faster)


def _paper(samples: Sequence[Operands], settings: TuneSettings, earlier: gp.Posterior | None) -> SiteResult:
    """Algorithm 1, and what it measures at the thresholds it ends with."""
    samples = samples[:WINDOWS]  # "first 5 validation inputs" (Algorithm 1, line 40)
    shape = PAPER_SHAPE if settings.shapes is None else settings.shapes[0]
    meter = Meter(samples, **shape._asdict())
    low = low_fidelity(meter, windows=1)
    result = algorithm_1(low, meter, settings.tolerance, settings.parameterization, earlier)
    finite = result.measured.error.isfinite().all(0)  # a head whose activations overflow has no error to hold
    return SiteResult(
        result.thresholds.where(finite, Thresholds.dense(meter.heads)),
        result.measured.only(finite),
        shape,
        PAPER_POLICY * meter.heads,
        None,
        None,
        meter.evaluations + low.evaluations * (low.length / meter.length) ** 2,
        posterior=result.posterior,
        trials=result.trials,
    )


def search_curves(inputs: Inputs, settings: TuneSettings, stopwatch: Stopwatch) -> SiteResult:
    """Explore policy, theta and the block shape, refine tau, validate: the paper's three stages, on curves.

    The result has no speed yet.
    """
    tolerance = settings.tolerance
    explored = explore(inputs, tolerance, settings.shapes_on(inputs.elements[0].q.device), stopwatch)
    shape = fastest_shape(inputs, explored, stopwatch)
    choice = explored[shape]
    found = validate(inputs, choice.tau, choice.theta, choice.policy, shape, tolerance)
    found, thresholds, confirmed_ms = _confirmed(inputs, found, choice, shape, tolerance)
    sparse = ~thresholds.is_dense
    curves = (*(curve for each in explored.values() for curve in each.curves), *found.curves)
    refined = [curve for curve in found.curves if curve.stage == "refine"]
    exponent = tau_exponent(refined[0], tolerance) if refined else torch.zeros(inputs.heads)
    one_input = len(inputs.elements) == 1  # a short one has fewer windows than others
    whole = [int(element.q.shape[2]) for element in inputs.elements] * (len(found.error) if one_input else 1)
    element = inputs.elements[0]

    def telling(length: int) -> bool:
        return kept_share(length, *shape, element.causal, element.kept) <= MOSTLY

    lengths = fit_lengths(whole, found.error, found.prefixes, sparse, tolerance, telling) if refined else None
    held_out = torch.ones(len(inputs.elements), dtype=torch.bool)
    held_out[inputs.first] = False
    return SiteResult(
        thresholds,
        Measurement(found.error, found.sparsity).only(sparse),
        shape,
        choice.policy,
        None,
        None,
        inputs.evaluations,
        kept=element.kept,
        curves=curves,
        lengths=lengths,
        tau_exponent=torch.where(sparse, exponent, 0.0),
        deciding=found.deciding,
        held_out=held_out,
        confirmed_ms=confirmed_ms,
    )


def fastest_shape(inputs: Inputs, explored: dict[BlockShape, Explored], stopwatch: Stopwatch) -> BlockShape:
    """The block shape whose predictor and live work take least time at the crossing."""
    element = inputs.elements[inputs.first]
    milliseconds: dict[BlockShape, float] = {}
    for shape, choice in explored.items():
        thresholds = Thresholds(choice.tau, choice.theta, torch.full_like(choice.tau, LAMBDA_OFF))
        if thresholds.is_dense.all() or len(explored) == 1:
            continue
        live = float((1 - choice.sparsity).mean())
        attention = live * stopwatch.attention_ms(element, thresholds, choice.policy, *shape)
        predictor = stopwatch.predictor_ms(element, choice.tau, choice.theta, choice.policy, *shape)
        milliseconds[shape] = attention + predictor
    if len(milliseconds) > 1:
        stopwatch.learn_shapes(element, milliseconds)
    return min(milliseconds, key=milliseconds.__getitem__, default=next(iter(explored)))


def _confirmed(
    inputs: Inputs, found: Validated, choice: Explored, shape: BlockShape, tolerance: float
) -> tuple[Validated, Thresholds, float | None]:
    """Run the kernel that will run on the explored input: where it differs from the pass, it is right.

    Returns:
        What holds, its thresholds, and the milliseconds of the call that confirmed them.
    """
    index, windows = inputs.first, inputs.windows
    element, dense = inputs.elements[index], inputs.dense(index)
    tau, theta, error = found.tau.clone(), choice.theta, found.error.clone()
    milliseconds = None
    for _ in range(STEPS_BACK):
        thresholds = Thresholds(tau, theta, torch.full_like(tau, LAMBDA_OFF))
        if thresholds.is_dense.all():
            break
        call = partial(sparse_attention, element, thresholds, choice.policy, *shape)
        (out, counts), clock = clocked(call, element.q.device)
        seen = relative_l1(out, dense, windows, shape.block_q).cpu()
        inputs.spend(counts.float().mean() / counts.shape[-1] * (2 if element.causal else 1))
        error[index : index + len(seen)] = seen  # several rows only for the windows of the only input
        failing = ~(seen.amax(0) <= tolerance) & ~thresholds.is_dense
        if not failing.any():
            milliseconds = clock()
            break
        tau = torch.where(failing, one_back(found.curves, tau), tau)
    else:
        tau = torch.where(failing, KEEP_ALL, tau)
    thresholds = Thresholds(tau, theta, torch.full_like(tau, LAMBDA_OFF))
    thresholds = thresholds.where(tau < KEEP_ALL, Thresholds.dense(inputs.heads))
    return replace(found, tau=tau, error=error), thresholds, milliseconds
