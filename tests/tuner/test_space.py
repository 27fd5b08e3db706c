"""Eq. 2 and its corrected reading."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.tuner.space import LAMBDA_RANGE, TAU_RANGE, THETA_RANGE, Thresholds, latent_to_thresholds


def test_corrected_tau_falls_with_s_and_the_paper_s_rises():
    s = torch.tensor([0.0, 0.5, 1.0])
    assert latent_to_thresholds(s).tau.tolist() == pytest.approx([0.97, 0.875, 0.78])
    assert latent_to_thresholds(s, "paper").tau.tolist() == pytest.approx([0.78, 0.875, 0.97])


def test_theta_falls_and_lambda_rises_with_s_in_both_readings():
    s = torch.tensor([0.0, 1.0])
    for reading in ("corrected", "paper"):
        mapped = latent_to_thresholds(s, reading)
        assert mapped.theta.tolist() == pytest.approx([THETA_RANGE[1], THETA_RANGE[0]])
        assert mapped.lam.tolist() == pytest.approx(list(LAMBDA_RANGE))


def test_the_paper_s_worked_example_is_reproduced():
    # Section III-C4: s* = 0.758 gives tau = 0.924, theta = 0.091, lambda = -10.2.
    mapped = latent_to_thresholds(torch.tensor([0.758]), "paper")
    assert mapped.tau.item() == pytest.approx(0.924, abs=5e-4)
    assert mapped.theta.item() == pytest.approx(0.091, abs=2e-3)
    assert mapped.lam.item() == pytest.approx(-10.2, abs=0.05)
    # Section III-G: delta s = 0.0625 is delta tau of about 0.012.
    assert 0.0625 * (TAU_RANGE[1] - TAU_RANGE[0]) == pytest.approx(0.012, abs=1e-3)


def test_where_takes_per_head():
    mixed = latent_to_thresholds(torch.tensor([0.5, 0.5])).where(torch.tensor([True, False]), Thresholds.dense(2))
    assert mixed.is_dense.tolist() == [False, True]
