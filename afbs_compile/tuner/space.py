"""What the tuner searches: the thresholds of every head of a site, and the latent s of the paper's Eq. 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from afbs_compile.kernels.reference import KEEP_ALL, LAMBDA_OFF, THETA_OFF
from afbs_compile.recipe import HeadRecipe, Precision, SiteRecipe

Parameterization = Literal["corrected", "paper"]
PARAMETERIZATIONS: tuple[str, ...] = get_args(Parameterization)

# Bounds of Eq. 2. The paper prints none; these satisfy its worked example (section III-C4: s = 0.758 gives
# tau = 0.924, theta = 0.091, lambda = -10.2) and its "delta s = 0.0625 is delta tau = 0.012" (section III-G).
TAU_RANGE = (0.78, 0.97)
THETA_RANGE = (-0.15, 0.85)
LAMBDA_RANGE = (-26.0, -5.2)


@dataclass(frozen=True)
class Thresholds:
    """Per-head constants of one site, each ``[H]`` fp32 on the CPU. ``tau >= 1`` is a DENSE head."""

    tau: Tensor
    theta: Tensor
    lam: Tensor

    @staticmethod
    def dense(heads: int) -> Thresholds:
        """Every head DENSE: what every search starts from and falls back to."""
        return Thresholds(
            torch.full((heads,), KEEP_ALL), torch.full((heads,), THETA_OFF), torch.full((heads,), LAMBDA_OFF)
        )

    @staticmethod
    def of(heads: Sequence[HeadRecipe]) -> Thresholds:
        """A recipe's constants as the tuner holds them."""
        columns = zip(*((head.tau, head.theta, head.lam) for head in heads), strict=True)
        return Thresholds(*(torch.tensor(column, dtype=torch.float32) for column in columns))

    @property
    def is_dense(self) -> Tensor:
        """``[H]`` bool."""
        return self.tau >= KEEP_ALL

    def map(self, function: Callable[[Tensor], Tensor]) -> Thresholds:
        """The function applied to each of the three."""
        return Thresholds(function(self.tau), function(self.theta), function(self.lam))

    def where(self, take: Tensor, other: Thresholds) -> Thresholds:
        """These thresholds for the heads in ``take`` (``[H]`` bool), the other's for the rest."""
        return Thresholds(
            torch.where(take, self.tau, other.tau),
            torch.where(take, self.theta, other.theta),
            torch.where(take, self.lam, other.lam),
        )


@dataclass(frozen=True)
class SitePrecision:
    """What the heads of one site compute in.

    Attributes:
        names: per head, as in :class:`HeadRecipe`; reasons: per head, why it is not in FP8, or ``None``.
        constants: for the heads in FP8, as in :class:`SiteRecipe`.
    """

    names: tuple[Precision, ...]
    constants: tuple[float, ...]
    reasons: tuple[str | None, ...]

    @staticmethod
    def of(site: SiteRecipe) -> SitePrecision:
        """A recipe's precision as the tuner holds it."""
        names = tuple(head.precision for head in site.heads)
        return SitePrecision(names, site.fp8_constants, tuple(head.precision_reason for head in site.heads))

    @property
    def arguments(self) -> dict[str, Any]:
        """The operator's arguments: none where every head computes in its own precision."""
        if "fp8" not in self.names:
            return {}
        return {"precision": list(self.names), "fp8_constants": list(self.constants)}


def latent_to_thresholds(s: Tensor, parameterization: Parameterization = "corrected") -> Thresholds:
    """Map the latent ``s`` in [0, 1] to thresholds (Eq. 2).

    Args:
        s: ``[H]``; 0 is conservative, 1 is aggressive.
        parameterization: ``"paper"`` lets tau grow with s as Eq. 2 is printed, which makes s = 1 DENSER in tau;
            ``"corrected"`` lets tau fall, so that all three thresholds get more aggressive together.
    """
    s = s.float().cpu()
    rising = s if parameterization == "paper" else 1 - s
    # tau(s) = tau_min + s (tau_max - tau_min), theta(s) = theta_max - s (theta_max - theta_min), lambda as tau
    return Thresholds(
        tau=TAU_RANGE[0] + rising * (TAU_RANGE[1] - TAU_RANGE[0]),
        theta=THETA_RANGE[1] - s * (THETA_RANGE[1] - THETA_RANGE[0]),
        lam=LAMBDA_RANGE[0] + s * (LAMBDA_RANGE[1] - LAMBDA_RANGE[0]),
    )
