"""The latent s of the paper's Eq. 2, and calls whose heads are all DENSE, where searches start and fall back to."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from afbs_compile.kernels.call import KEEP_ALL, LAMBDA_OFF, THETA_OFF, SparseCall

Parameterization = Literal["corrected", "paper"]
PARAMETERIZATIONS: tuple[str, ...] = get_args(Parameterization)

# Bounds of Eq. 2. The paper prints none; these satisfy its worked example (section III-C4: s = 0.758 gives
# tau = 0.924, theta = 0.091, lambda = -10.2) and its "delta s = 0.0625 is delta tau = 0.012" (section III-G).
TAU_RANGE = (0.78, 0.97)
THETA_RANGE = (-0.15, 0.85)
LAMBDA_RANGE = (-26.0, -5.2)


def dense_heads(call: SparseCall) -> Tensor:
    """bool ``[H]``, the heads that keep every block."""
    return torch.tensor(call.dense_heads)


def all_dense(call: SparseCall) -> SparseCall:
    """The call with every head DENSE."""
    heads = call.heads
    return replace(call, tau=(KEEP_ALL,) * heads, theta=(THETA_OFF,) * heads, lam=(LAMBDA_OFF,) * heads)


def at_latent(call: SparseCall, s: Tensor, parameterization: Parameterization = "corrected") -> SparseCall:
    """The call at the thresholds of the latent ``s`` in [0, 1] (Eq. 2).

    Args:
        call: whose thresholds are replaced.
        s: ``[H]``; 0 is conservative, 1 is aggressive.
        parameterization: ``"paper"`` lets tau grow with s as Eq. 2 is printed, which makes s = 1 DENSER in tau;
            ``"corrected"`` lets tau fall, so that all three thresholds get more aggressive together.
    """
    s = s.float().cpu()
    rising = s if parameterization == "paper" else 1 - s
    # tau(s) = tau_min + s (tau_max - tau_min), theta(s) = theta_max - s (theta_max - theta_min), lambda as tau
    tau = TAU_RANGE[0] + rising * (TAU_RANGE[1] - TAU_RANGE[0])
    theta = THETA_RANGE[1] - s * (THETA_RANGE[1] - THETA_RANGE[0])
    lam = LAMBDA_RANGE[0] + s * (LAMBDA_RANGE[1] - LAMBDA_RANGE[0])
    return replace(call, tau=tuple(tau.tolist()), theta=tuple(theta.tolist()), lam=tuple(lam.tolist()))
