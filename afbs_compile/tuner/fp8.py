"""Which heads of a tuned site compute in FP8: those whose error, rounding included, stays within the tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afbs_compile.kernels.fp8 import BLOCK, Constants
from afbs_compile.kernels.precision import refusal
from afbs_compile.kernels.reference import KEEP_ALL, LAMBDA_OFF
from afbs_compile.passes.capture import Operands
from afbs_compile.recipe import Precision
from afbs_compile.tuner.curves import one_back
from afbs_compile.tuner.inputs import BlockShape, Inputs
from afbs_compile.tuner.measure import Measurement, Meter
from afbs_compile.tuner.result import SiteResult
from afbs_compile.tuner.space import SitePrecision, Thresholds
from afbs_compile.tuner.speed import best_ms, sparse_call

SHAPE = BlockShape(BLOCK, BLOCK)
"""The block shape that FP8 takes."""

_OWN: Precision = "own"
_FP8: Precision = "fp8"

STEPS_BACK = 4
"""Times that a head goes back where rounding brings it over the tolerance, by 1, 2, 4 and 8 of the thresholds that were
measured, before it keeps its precision."""


def fp8_refusal(sample: Operands, shape: BlockShape) -> str | None:
    """Why no head of a site can compute in FP8, or ``None`` if they can."""
    return refusal(sample.q.device, sample.q.dtype, sample.q.shape[3], [LAMBDA_OFF], *shape)


def with_fp8(inputs: Inputs, result: SiteResult, tolerance: float) -> SiteResult:
    """The result with the sparse heads in FP8 that stay within the tolerance there.

    Every input is measured with the operator that will run. A head that fails goes back to more careful thresholds, as
    long as FP8 is fast enough to make up for what it then computes; else it keeps its precision and thresholds.

    Args:
        inputs: of the site; result: what was found in their own precision.
        tolerance: relative L1 on every input or window.
    """
    sparse = ~result.thresholds.is_dense
    sample = inputs.elements[inputs.first]
    if not sparse.any():
        return replace(result, precision=_all(_OWN, (), [None] * inputs.heads))
    reason = fp8_refusal(sample, result.shape)
    if reason is not None:
        return replace(result, precision=_all(_OWN, (), _for_sparse(sparse, reason)))
    constants = Constants.of([(element.k, element.v) for element in inputs.elements]).packed()
    everywhere = _all(_FP8, constants, [None] * inputs.heads)
    call = result.thresholds, result.policy, *result.shape
    own_ms, fp8_ms = best_ms([sparse_call(sample, *call), sparse_call(sample, *call, everywhere)])
    if fp8_ms >= own_ms:
        reason = f"not faster: {fp8_ms:.3g} ms in FP8, {own_ms:.3g} ms"
        return replace(result, precision=_all(_OWN, (), _for_sparse(sparse, reason)))
    meter = Meter(inputs.elements, **result.shape._asdict(), windows=inputs.windows, policy=result.policy)
    found = _fitting(meter, everywhere, result, tolerance, fp8_ms / own_ms)
    inputs.spend(meter.evaluations)
    names = tuple(_FP8 if fits else _OWN for fits in found.fits.tolist())
    reasons = tuple(
        f"error {worst:.3g} in FP8" if mine and name == _OWN else None
        for mine, name, worst in zip(sparse.tolist(), names, found.first.worst.tolist(), strict=True)
    )
    deciding = result.deciding
    if deciding is not None:
        over = found.over if len(found.over) == len(deciding) else found.over.any(0, keepdim=True)
        deciding = deciding | over
    return replace(
        result,
        thresholds=found.thresholds.where(found.fits, result.thresholds),
        measured=Measurement(
            torch.where(found.fits, found.measured.error, result.measured.error),
            torch.where(found.fits, found.measured.sparsity, result.measured.sparsity),
        ),
        evaluations=inputs.evaluations,
        deciding=deciding,
        precision=SitePrecision(names, constants if _FP8 in names else (), reasons),
    )


def _all(name: Precision, constants: tuple[float, ...], reasons: Sequence[str | None]) -> SitePrecision:
    """Every head in one precision."""
    return SitePrecision((name,) * len(reasons), constants, tuple(reasons))


def _for_sparse(sparse: Tensor, reason: str) -> list[str | None]:
    """A reason for each sparse head; a DENSE one needs none."""
    return [reason if mine else None for mine in sparse.tolist()]


@dataclass(frozen=True)
class _Found:
    """What FP8 measures.

    Attributes:
        fits: bool ``[H]``; thresholds, measured: of the heads that fit.
        first: at the thresholds of the heads' own precision.
        over: bool ``[pieces]``, inputs or windows on which a head was over the tolerance.
    """

    fits: Tensor
    thresholds: Thresholds
    measured: Measurement
    first: Measurement
    over: Tensor


def _fitting(meter: Meter, precision: SitePrecision, result: SiteResult, tolerance: float, time_share: float) -> _Found:
    """Measure, and step the failing heads back while their live work times ``time_share`` stays under what it was."""
    thresholds, open_heads = result.thresholds, ~result.thresholds.is_dense
    tau = thresholds.tau.clone()
    fits = torch.zeros_like(open_heads)
    best = first = meter(thresholds, precision)
    over = torch.zeros(len(first.error), dtype=torch.bool)
    for step in range(STEPS_BACK + 1):
        measured = first if step == 0 else meter(replace(thresholds, tau=tau), precision)
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
    return _Found(fits, replace(thresholds, tau=tau), best, first, over)
