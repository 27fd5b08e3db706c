"""Eq. 2 and its corrected reading."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.tuner.space import LAMBDA_RANGE, TAU_RANGE, THETA_RANGE, all_dense, at_latent, dense_heads


def mapped_from(s: list[float], reading: str = "corrected") -> SparseCall:
    return at_latent(SparseCall.uniform(len(s), KEEP_ALL), torch.tensor(s), reading)


def test_corrected_tau_falls_with_s_and_the_paper_s_rises():
    s = [0.0, 0.5, 1.0]
    assert mapped_from(s).tau == pytest.approx([0.97, 0.875, 0.78])
    assert mapped_from(s, "paper").tau == pytest.approx([0.78, 0.875, 0.97])


def test_theta_falls_and_lambda_rises_with_s_in_both_readings():
    for reading in ("corrected", "paper"):
        mapped = mapped_from([0.0, 1.0], reading)
        assert mapped.theta == pytest.approx([THETA_RANGE[1], THETA_RANGE[0]])
        assert mapped.lam == pytest.approx(list(LAMBDA_RANGE))


def test_the_paper_s_worked_example_is_reproduced():
    # Section III-C4: s* = 0.758 gives tau = 0.924, theta = 0.091, lambda = -10.2.
    mapped = mapped_from([0.758], "paper")
    assert mapped.tau[0] == pytest.approx(0.924, abs=5e-4)
    assert mapped.theta[0] == pytest.approx(0.091, abs=2e-3)
    assert mapped.lam[0] == pytest.approx(-10.2, abs=0.05)
    # Section III-G: delta s = 0.0625 is delta tau of about 0.012.
    assert 0.0625 * (TAU_RANGE[1] - TAU_RANGE[0]) == pytest.approx(0.012, abs=1e-3)


def test_where_takes_per_head():
    sparse = mapped_from([0.5, 0.5])
    mixed = sparse.where([True, False], all_dense(sparse))
    assert dense_heads(mixed).tolist() == [False, True]
    assert mixed.of_head(0) == sparse.of_head(0)
