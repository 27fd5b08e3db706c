"""Curves: what is read off them, on curves whose crossing is known."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.tuner.curves import Crossing, Curves, boldest_safe, crossing, tau_exponent
from afbs_compile.tuner.explore import UNIT, sampled_blocks

TOLERANCE = 0.05


def made(slope: list[float], power: list[float]) -> Curves:
    """``error = slope * (1 - tau) ** power``."""
    x = torch.logspace(0, -3, 30).expand(len(slope), -1)
    error = torch.tensor(slope)[:, None] * x ** torch.tensor(power)[:, None]
    measured = torch.ones(len(slope), dtype=torch.bool)
    return Curves("refine", 4096, SparseCall.uniform(len(slope), KEEP_ALL), 1 - x, error, x * 0.9, measured)


def crossed(curves: Curves) -> Crossing:
    return crossing(curves.tau, curves.error, curves.sparsity, TOLERANCE)


def test_the_crossing_is_interpolated_in_the_logs():
    found = crossed(made([0.3, 2.0, 0.8], [1.0, 1.5, 0.7]))
    expected = torch.tensor([(TOLERANCE / 0.3), (TOLERANCE / 2.0) ** (1 / 1.5), (TOLERANCE / 0.8) ** (1 / 0.7)])
    torch.testing.assert_close(1 - found.tau, expected, rtol=1e-3, atol=0)


def test_a_curve_that_never_holds_is_dense_and_one_that_always_does_takes_tau_zero():
    found = crossed(made([1000.0, 0.01], [1.0, 1.0]))
    assert found.tau.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert found.sparsity.tolist() == pytest.approx([0.0, 0.9])


def test_the_exponent_of_tau_is_the_slope_in_the_logs():
    assert tau_exponent(made([0.3, 2.0], [1.0, 1.5]), TOLERANCE).tolist() == pytest.approx([1.0, 1.5], rel=1e-3)


def test_of_a_head_that_never_reaches_the_tolerance_it_is_the_slope_about_its_largest_error():
    assert tau_exponent(made([0.01, 0.001], [1.5, 0.7]), TOLERANCE).tolist() == pytest.approx([1.5, 0.7], rel=1e-3)


def test_every_threshold_that_keeps_more_must_hold_too():
    error = torch.tensor([[0.01, 0.06, 0.04, 0.02], [0.9, 0.04, torch.nan, 0.02], [0.9, 0.9, 0.9, 0.9]])
    assert boldest_safe(error, TOLERANCE).tolist() == [2, 3, 4]


def test_a_path_holds_no_number_that_json_lacks():
    path = made([torch.inf], [1.0]).path(0)
    assert path.error == (-1.0,) * 30
    assert len(path.tau) == len(path.theta) == len(path.lam) == len(path.sparsity) == 30


@pytest.mark.parametrize("length", [100, 1000, 4096, 5000, 65536])
def test_all_shapes_sample_the_same_rows_spread_over_the_length(length):
    rows = {}
    for block in (64, 128):
        blocks = sampled_blocks(length, block)
        assert list(blocks) == sorted(set(blocks))
        rows[block] = {r for b in blocks for r in range(b * block, min((b + 1) * block, length))}
    assert rows[64] == rows[128]
    first = sorted({r // UNIT for r in rows[64]})
    assert max(b - a for a, b in zip([-1, *first], [*first, -(-length // UNIT)], strict=True)) <= max(
        2 * length / 1024, 2
    )
