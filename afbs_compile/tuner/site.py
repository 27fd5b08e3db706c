"""Tune one site: run the chosen method on its operands and decide whether the result is worth running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from afbs_compile.kernels.attend.machine import clocked, runs_triton
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.tuner import gp
from afbs_compile.tuner.curves import one_back, tau_exponent
from afbs_compile.tuner.explore import Explored, explore
from afbs_compile.tuner.fp8 import SHAPE, fp8_refusal, with_fp8
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.lengths import fit_lengths
from afbs_compile.tuner.measure import (
    WINDOWS,
    Measurement,
    Meter,
    kept_share,
    low_fidelity,
    nothing_to_skip,
    relative_l1,
)
from afbs_compile.tuner.paper import AGAIN, Space, algorithm_1
from afbs_compile.tuner.result import SiteResult
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.space import all_dense, dense_heads
from afbs_compile.tuner.speed import SiteSpeed, Stopwatch
from afbs_compile.tuner.validate import Validated, validate

PAPER_POLICY = "meansim"
"""Algorithm 1 searches SpargeAttn's thresholds."""

PAPER_SHAPE = BlockShape(64, 64)
"""The paper's block size, B = 64 (its experimental setup)."""

MOSTLY = 0.5
"""Where every tau keeps more than this share of the blocks, a length's error does not tell how errors move."""

CONFIRMATIONS = 4
"""Thresholds that a head goes back where the kernel does not confirm the pass, before it is DENSE."""


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
    inputs = SiteInputs(samples)
    nothing = nothing_to_skip(inputs.elements, inputs.kept, settings.shapes_on(samples[0].device)) or nothing
    fp8 = settings.precision == "fp8"
    if fp8 and fp8_refusal(inputs.explored, SHAPE) is None:
        settings = replace(settings, shapes=(SHAPE,))
    result = search_curves(inputs, settings, stopwatch)
    if fp8:
        result = with_fp8(inputs, result, settings.tolerance)
    dense_ms = inputs.dense_ms if runs_triton(samples[0].device) else None
    return with_speed(result, inputs.explored, stopwatch, nothing, dense_ms)


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
    mine = None
    if not result.call.is_dense:
        mine = SiteSpeed.measure(
            sample,
            result.call,
            float(result.measured.sparsity.mean()),
            stopwatch,
            dense_ms=dense_ms,
            sparse_ms=result.confirmed_ms if result.precision_reasons is None else None,
        )
    speed = stopwatch.slowest_speed(mine)
    if speed is None:
        return replace(result, dense_reason=nothing)
    call = replace(result.call, min_length=speed.min_length or 0)
    return replace(result, call=call, speed=speed, dense_reason=too_slow(speed))


def too_slow(speed: SiteSpeed) -> str | None:
    """Why a call with this speed stays dense; ``None`` where it is worthwhile."""
    if speed.min_length is not None:
        return None
    busy = ", on a busy machine" if speed.busy else ""
    return f"not faster: {speed.sparse_ms:.3g} ms sparse, {speed.dense_ms:.3g} ms dense{busy}"


def _paper(samples: Sequence[Operands], settings: TuneSettings, earlier: gp.Posterior | None) -> SiteResult:
    """Algorithm 1, and what it measures at the thresholds it ends with."""
    samples = samples[:WINDOWS]  # "first 5 validation inputs" (Algorithm 1, line 40)
    shape = PAPER_SHAPE if settings.shapes is None else settings.shapes[0]
    meter = Meter(samples)
    call = SparseCall.uniform(meter.heads, KEEP_ALL, policy=PAPER_POLICY, shape=shape)
    low = low_fidelity(meter, shape.q, windows=1)
    space = Space(call, settings.tolerance, settings.parameterization)
    result = algorithm_1(low, meter, space, earlier, AGAIN if settings.reduced else None)
    finite = result.measured.error.isfinite().all(0)  # a head whose activations overflow has no error to hold
    return SiteResult(
        result.call.where(finite.tolist(), all_dense(call)),
        result.measured.only(finite),
        None,
        None,
        meter.evaluations + low.evaluations * (low.length / meter.length) ** 2,
        posterior=result.posterior,
        trials=result.trials,
    )


def search_curves(inputs: SiteInputs, settings: TuneSettings, stopwatch: Stopwatch) -> SiteResult:
    """Explore policy, theta and the block shape, refine tau, validate: the paper's three stages, on curves.

    The result has no speed yet.
    """
    tolerance, element = settings.tolerance, inputs.elements[0]
    explored = explore(inputs, tolerance, settings.shapes_on(element.device), stopwatch)
    shape = fastest_shape(inputs, explored, stopwatch)
    found = validate(inputs, explored[shape].call, tolerance)
    found, call, confirmed_ms = _confirmed(inputs, found, explored[shape].call, tolerance)
    sparse = ~dense_heads(call)
    curves = (*(curve for each in explored.values() for curve in each.curves), *found.curves)
    refined = [curve for curve in found.curves if curve.stage == "refine"]
    exponent = tau_exponent(refined[0], tolerance) if refined else torch.zeros(inputs.heads)
    one_input = len(inputs.elements) == 1  # a short one has fewer windows than others
    whole = [each.k_len for each in inputs.elements] * (len(found.error) if one_input else 1)

    def telling(length: int) -> bool:
        return kept_share(element.first_rows(length - element.offset), shape, call.kept) <= MOSTLY

    lengths = fit_lengths(whole, found.error, found.prefixes, sparse, tolerance, telling) if refined else None
    held_out = torch.ones(len(inputs.elements), dtype=torch.bool)
    held_out[inputs.first] = False
    return SiteResult(
        call,
        Measurement(found.error, found.sparsity).only(sparse),
        None,
        None,
        inputs.evaluations,
        curves=curves,
        lengths=lengths,
        tau_exponent=torch.where(sparse, exponent, 0.0),
        deciding=found.deciding,
        held_out=held_out,
        confirmed_ms=confirmed_ms,
    )


def fastest_shape(inputs: SiteInputs, explored: dict[BlockShape, Explored], stopwatch: Stopwatch) -> BlockShape:
    """The block shape whose predictor and live work take least time at the crossing."""
    element = inputs.explored
    milliseconds: dict[BlockShape, float] = {}
    for shape, choice in explored.items():
        if choice.call.is_dense or len(explored) == 1:
            continue
        attention = float((1 - choice.sparsity).mean()) * stopwatch.attention_ms(element, choice.call)
        milliseconds[shape] = attention + stopwatch.predictor_ms(element, choice.call)
    milliseconds = stopwatch.slowest_shapes(milliseconds)
    if len(milliseconds) > 1:
        stopwatch.learn_shapes(element, milliseconds)
    return min(milliseconds, key=milliseconds.__getitem__, default=next(iter(explored)))


def _confirmed(
    inputs: SiteInputs, found: Validated, choice: SparseCall, tolerance: float
) -> tuple[Validated, SparseCall, float | None]:
    """Run the kernel that will run on the explored input: where it differs from the pass, it is right.

    Returns:
        What holds, its constants, and the milliseconds of the call that confirmed them.
    """
    index, windows = inputs.first, inputs.windows
    element, dense = inputs.explored, inputs.dense(index)
    tau, error = found.tau.clone(), found.error.clone()
    milliseconds = None
    for _ in range(CONFIRMATIONS):
        call = choice.with_tau(tau)
        if call.is_dense:
            break
        (out, counts), clock = clocked(partial(run, element, call), element.device)
        seen = relative_l1(out, dense, windows, call.shape.q).cpu()
        inputs.spend_blocks(index, call.shape, counts)
        error[index : index + len(seen)] = seen  # several rows only for the windows of the only input
        failing = ~(seen.amax(0) <= tolerance) & ~dense_heads(call)
        if not failing.any():
            milliseconds = clock()
            break
        tau = torch.where(failing, one_back(found.curves, tau), tau)
    else:
        tau = torch.where(failing, KEEP_ALL, tau)
    call = choice.with_tau(tau)
    call = call.where([not dense for dense in call.dense_heads], all_dense(call))
    return replace(found, tau=tau, error=error), call, milliseconds
