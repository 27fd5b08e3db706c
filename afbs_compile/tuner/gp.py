"""The Gaussian process of the paper (Eq. 3-5): one per head, one input, a fixed Matern-5/2 kernel, batched."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH_SCALE = 0.2

NOISE = 1e-6
"""Variance added to the diagonal, relative to the kernel's 1: error measurements are exact, this is for Cholesky."""


def matern52(a: Tensor, b: Tensor) -> Tensor:
    """Kernel of Eq. 4 between ``a [..., n]`` and ``b [..., m]``: ``[..., n, m]``."""
    r = (a[..., :, None] - b[..., None, :]).abs() / LENGTH_SCALE
    # k = (1 + sqrt5 r + 5/3 r^2) exp(-sqrt5 r)
    kernel: Tensor = (1 + math.sqrt(5) * r + 5 / 3 * r.square()) * torch.exp(-math.sqrt(5) * r)
    return kernel


@dataclass(frozen=True)
class Posterior:
    """What the process believes on a grid of s.

    Attributes:
        mean, deviation: ``[H, G]`` float64, in units of the error.
    """

    mean: Tensor
    deviation: Tensor


def fit(s: Tensor, error: Tensor, grid: Tensor, prior_mean: Tensor) -> Posterior:
    """Condition on observations.

    Args:
        s: ``[H, n]`` observed latents; error: ``[H, n]`` what was measured there.
        grid: ``[G]`` where to predict, sorted, uniform.
        prior_mean: ``[H, G]`` mean before any observation, on the grid; zeros for none.
    """
    s, error, grid = s.double(), error.double(), grid.double()
    nearest = torch.searchsorted(grid, s.contiguous()).clamp_max(len(grid) - 1)
    residual = error - prior_mean.gather(-1, nearest)
    # The paper's kernel has variance 1; errors are far smaller, so residuals are standardised per head.
    size = residual.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-9)
    gram = matern52(s, s) + NOISE * torch.eye(s.shape[-1], dtype=torch.float64)
    cross = matern52(s, grid.expand(s.shape[0], -1))
    factor = torch.linalg.cholesky(gram)
    # mu(s) = m(s) + k_*^T K^-1 (y - m),   sigma^2(s) = k(s, s) - k_*^T K^-1 k_*
    weights = torch.cholesky_solve((residual / size)[..., None], factor)
    mean = prior_mean + size * (cross.transpose(-1, -2) @ weights)[..., 0]
    explained = torch.linalg.solve_triangular(factor, cross, upper=False).square().sum(-2)
    return Posterior(mean, size * (1 - explained).clamp_min(0).sqrt())


def expected_improvement(posterior: Posterior, best: Tensor) -> Tensor:
    """Eq. 5 for a minimum: ``[H, G]`` from the lowest error observed, ``best [H]``."""
    sigma = posterior.deviation.clamp_min(1e-12)
    gain = best.double()[:, None] - posterior.mean
    z = gain / sigma
    # EI = (f - mu) Phi(Z) + sigma phi(Z)
    improvement: Tensor = gain * torch.special.ndtr(z) + sigma * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return improvement
