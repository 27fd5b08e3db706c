"""What tuning one site found."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from afbs_compile.kernels.call import SparseCall
from afbs_compile.recipe import KeptTrial
from afbs_compile.tuner import gp
from afbs_compile.tuner.curves import Curves
from afbs_compile.tuner.lengths import Lengths
from afbs_compile.tuner.measure import Measurement
from afbs_compile.tuner.paper import Trial
from afbs_compile.tuner.speed import SiteSpeed


@dataclass(frozen=True)
class SiteResult:
    """What was decided for one site.

    Attributes:
        call: its constants; heads for which nothing feasible was found are DENSE.
        measured: error on every validation input and sparsity, per head; 0 for DENSE heads.
        speed: ``None`` where every head is DENSE.
        confirmed_ms: milliseconds of the call that confirmed the thresholds, in the operands' precision; it may have
            compiled. ``None`` where none did.
        precision_reasons: per head, why it is not in FP8, where that was asked for.
        dense_reason: why the whole site stays dense, or ``None`` if it is rewritten.
        evaluations: cost in dense equivalents.
        curves: all that was measured on the way; empty for ``method="paper"``, whose ``trials`` tell it.
        lengths: what was learnt about other lengths; tau_exponent: ``[H]``, as in :class:`HeadRecipe`.
        deciding: bool ``[inputs]``, inputs that kept a head from a bolder threshold; held_out: bool ``[inputs]``, those
            that had no say in theta, policy and block shape.
        kept_tried: what the blocks that are always kept were chosen from.
        posterior: the search landscape of ``method="paper"``, to warm-start the next site; trials: what it tried.
    """

    call: SparseCall
    measured: Measurement
    speed: SiteSpeed | None
    dense_reason: str | None
    evaluations: float
    curves: tuple[Curves, ...] = ()
    lengths: Lengths | None = None
    tau_exponent: Tensor | None = None
    deciding: Tensor | None = None
    held_out: Tensor | None = None
    confirmed_ms: float | None = None
    precision_reasons: tuple[str | None, ...] | None = None
    kept_tried: tuple[KeptTrial, ...] = ()
    posterior: gp.Posterior | None = None
    trials: tuple[Trial, ...] = ()
