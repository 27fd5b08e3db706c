"""The Gaussian process against the textbook formulas, computed the slow way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from afbs_compile.tuner import gp

GRID = torch.linspace(0, 1, 201, dtype=torch.float64)


def kernel(a: float, b: float) -> float:
    r = abs(a - b)
    return (1 + math.sqrt(5) * r / 0.2 + 5 * r**2 / (3 * 0.2**2)) * math.exp(-math.sqrt(5) * r / 0.2)


def test_kernel_is_eq_4():
    a, b = torch.tensor([0.0, 0.3, 0.55]).double(), torch.tensor([0.1, 0.9]).double()
    expected = [[kernel(x, y) for y in b.tolist()] for x in a.tolist()]
    assert gp.matern52(a, b).numpy() == pytest.approx(np.array(expected))


def test_posterior_matches_the_textbook_for_every_head():
    s = torch.tensor([[0.2, 0.5, 0.8], [0.1, 0.4, 0.6]]).double()
    error = torch.tensor([[0.01, 0.03, 0.2], [0.5, 0.05, 0.02]]).double()
    posterior = gp.fit(s, error, GRID, torch.zeros(2, 201, dtype=torch.float64))
    for head in range(2):
        points, values = s[head].numpy(), error[head].numpy()
        size = np.sqrt((values**2).mean())
        gram = np.array([[kernel(x, y) for y in points] for x in points]) + gp.NOISE * np.eye(3)
        cross = np.array([[kernel(x, y) for y in GRID.tolist()] for x in points])
        mean = cross.T @ np.linalg.solve(gram, values)
        variance = size**2 * (1 - np.einsum("ig,ij,jg->g", cross, np.linalg.inv(gram), cross))
        assert posterior.mean[head].numpy() == pytest.approx(mean, abs=1e-9)
        assert posterior.deviation[head].numpy() == pytest.approx(np.sqrt(variance.clip(0)), abs=1e-6)


def test_prior_mean_returns_far_from_the_observations():
    prior = torch.linspace(0, 1, 201).double().expand(1, -1)
    posterior = gp.fit(torch.tensor([[0.0]]), torch.tensor([[0.3]]), GRID, prior)
    assert posterior.mean[0, 0].item() == pytest.approx(0.3, abs=1e-5)
    assert posterior.mean[0, -1].item() == pytest.approx(1.0, abs=1e-2)


def test_expected_improvement_is_eq_5():
    posterior = gp.Posterior(torch.tensor([[0.1, 0.2]]).double(), torch.tensor([[0.05, 0.2]]).double())
    z = (0.12 - posterior.mean.numpy()) / posterior.deviation.numpy()
    expected = (0.12 - posterior.mean.numpy()) * norm.cdf(z) + posterior.deviation.numpy() * norm.pdf(z)
    assert gp.expected_improvement(posterior, torch.tensor([0.12])).numpy() == pytest.approx(expected)
