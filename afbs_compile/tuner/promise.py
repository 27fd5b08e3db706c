"""What validation inputs allow one to say about inputs that were not seen: distribution-free bounds.

The unit is an input, and inputs must be exchangeable: drawn alike, in any order (windows of one text are not, against
windows of another). Only inputs that had no say in theta, policy and block shape count; they may have placed tau.

One head. Each counted input has a critical tau: the boldest one from which on, towards more blocks, its error stays
within the tolerance on the curve that was measured. The head's tau is no bolder than the critical tau of any of them,
so a new input exceeds the tolerance only if its critical tau is beyond all ``n``. For exchangeable inputs that chance p
obeys ``P(p > x) <= (1 - x) ** n``: the exact binomial (Clopper and Pearson) bound for 0 exceedances of n. Testing the
thresholds from the most careful one on in fixed order, as Learn-then-Test does, leads to the same bound.

Any head of a model. All heads together are a choice that few inputs decide: the ``d`` that kept a head from a bolder
threshold. Leaving out any other changes nothing, so the choice is a compression scheme of size d, for which the
chance of an input that some head exceeds on is bounded by Littlestone and Warmuth (1986), Floyd and Warmuth (1995).
"""

from __future__ import annotations

import math

from scipy.stats import beta

from afbs_compile.recipe import Promise

CONFIDENCE = 0.95


def exceedance_bound(exceeding: int, inputs: int, confidence: float = CONFIDENCE) -> float:
    """Clopper-Pearson upper bound on the chance that a new input exceeds, after ``exceeding`` of ``inputs`` did."""
    if exceeding >= inputs:
        return 1.0
    return float(beta.ppf(confidence, exceeding + 1, inputs - exceeding))


def compression_bound(deciding: int, inputs: int, confidence: float = CONFIDENCE) -> float:
    """Bound on the chance that a new input exceeds a choice that ``deciding`` of ``inputs`` alone lead to.

    ``x`` with ``sum over sizes d of C(n, d) (1 - x_d) ** (n - d) = 1 - confidence``, the confidence shared equally.
    """
    if deciding >= inputs:
        return 1.0
    # C(n, d) (1 - x) ** (n - d) = (1 - confidence) / (n + 1)
    share = math.log((1 - confidence) / (inputs + 1)) - math.log(math.comb(inputs, deciding))
    return -math.expm1(share / (inputs - deciding))


def promise(held_out: int, deciding: int) -> Promise:
    """The promise of a calibration.

    Args:
        held_out: inputs that had no say in theta, policy and block shape.
        deciding: those of them that kept any head of any site from a bolder threshold.
    """
    return Promise(
        confidence=CONFIDENCE,
        inputs=held_out,
        head_bound=round(exceedance_bound(0, held_out), 6),
        deciding=deciding,
        model_bound=round(compression_bound(deciding, held_out), 6),
    )
