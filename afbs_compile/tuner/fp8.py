"""Which heads of a tuned site compute in FP8: those whose error, rounding included, stays within the tolerance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afbs_compile.kernels.attend.engines import precision_refusal
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.fp8 import BLOCK, Fp8Constants
from afbs_compile.tuner.clock import timed
from afbs_compile.tuner.curves import one_back
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.measure import Measurement, Meter
from afbs_compile.tuner.result import SiteResult
from afbs_compile.tuner.space import dense_heads
from afbs_compile.tuner.speed import sparse_call

SHAPE = BlockShape(BLOCK, BLOCK)
"""The block shape that FP8 takes."""

CAREFUL_STEPS = 4
"""Times that a head goes back where rounding brings it over the tolerance, by 1, 2, 4 and 8 of the thresholds that were
measured, before it keeps its precision."""


def fp8_refusal(sample: Operands, shape: BlockShape) -> str | None:
    """Why no head of a site can compute in FP8, or ``None`` if they can."""
    return precision_refusal(sample, SparseCall.uniform(sample.heads, 0.0, shape=shape), "fp8")


def with_fp8(inputs: SiteInputs, result: SiteResult, tolerance: float) -> SiteResult:
    """The result with the sparse heads in FP8 that stay within the tolerance there.

    Every input is measured with the operator that will run. A head that fails goes back to more careful thresholds, as
    long as FP8 is fast enough to make up for what it then computes; else it keeps its precision and thresholds.

    Args:
        inputs: of the site; result: what was found in their own precision.
        tolerance: relative L1 on every input or window.
    """
    call, sample = result.call, inputs.explored
    sparse = [not dense for dense in call.dense_heads]
    if call.is_dense:
        return replace(result, precision_reasons=(None,) * inputs.heads)
    reason = fp8_refusal(sample, call.shape)
    if reason is None:
        constants = Fp8Constants.of([(element.k, element.v) for element in inputs.elements]).packed()
        fp8 = replace(call, precision=("fp8",) * inputs.heads, fp8_constants=constants)
        own_ms, fp8_ms = timed([sparse_call(sample, call), sparse_call(sample, fp8)]).ms
        if fp8_ms >= own_ms:
            reason = f"not faster: {fp8_ms:.3g} ms in FP8, {own_ms:.3g} ms"
    if reason is not None:
        return replace(result, precision_reasons=tuple(reason if mine else None for mine in sparse))
    meter = Meter(inputs.elements, windows=inputs.windows)
    found = _fitting(meter, fp8, result, tolerance, fp8_ms / own_ms)
    inputs.spend(meter.evaluations)
    fits = found.fits.tolist()
    reasons = tuple(
        f"error {worst:.3g} in FP8" if mine and not fitting else None
        for mine, fitting, worst in zip(sparse, fits, found.first.worst.tolist(), strict=True)
    )
    deciding = result.deciding
    if deciding is not None:
        over = found.over if len(found.over) == len(deciding) else found.over.any(0, keepdim=True)
        deciding = deciding | over
    chosen = found.call.where(fits, call)
    return replace(
        result,
        call=chosen if "fp8" in chosen.precision else replace(chosen, fp8_constants=()),
        measured=Measurement(
            torch.where(found.fits, found.measured.error, result.measured.error),
            torch.where(found.fits, found.measured.sparsity, result.measured.sparsity),
        ),
        evaluations=inputs.evaluations,
        deciding=deciding,
        precision_reasons=reasons,
    )


@dataclass(frozen=True)
class _Found:
    """What FP8 measures.

    Attributes:
        fits: bool ``[H]``; call, measured: of the heads that fit.
        first: at the thresholds of the heads' own precision.
        over: bool ``[pieces]``, inputs or windows on which a head was over the tolerance.
    """

    fits: Tensor
    call: SparseCall
    measured: Measurement
    first: Measurement
    over: Tensor


def _fitting(meter: Meter, call: SparseCall, result: SiteResult, tolerance: float, time_share: float) -> _Found:
    """Measure, and step the failing heads back while their live work times ``time_share`` stays under what it was."""
    tau, open_heads = torch.tensor(call.tau), ~dense_heads(call)
    fits = torch.zeros_like(open_heads)
    best = first = meter(call)
    over = torch.zeros(len(first.error), dtype=torch.bool)
    for step in range(CAREFUL_STEPS + 1):
        measured = first if step == 0 else meter(call.with_tau(tau))
        pays = (1 - measured.sparsity) * time_share <= 1 - result.measured.sparsity
        holds = measured.worst <= tolerance  # NaN does not
        over |= (~(measured.error <= tolerance) & open_heads).any(1)
        good = open_heads & pays & holds
        best = Measurement(
            torch.where(good, measured.error, best.error), torch.where(good, measured.sparsity, best.sparsity)
        )
        fits |= good
        open_heads = open_heads & pays & ~holds
        further = tau
        for _ in range(2**step):  # rounding may take a large part of the tolerance
            further = one_back(result.curves, further)
        open_heads &= further < KEEP_ALL
        tau = torch.where(open_heads, further, tau)
        if not open_heads.any():
            break
    return _Found(fits, call.with_tau(tau), best, first, over)
