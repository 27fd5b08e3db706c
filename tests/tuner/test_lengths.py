"""How errors move with the length, and what is done with it."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.tuner.lengths import extrapolated_tau, fit_lengths

SPARSE = torch.tensor([True, True])


def law(length: int) -> torch.Tensor:
    return torch.tensor([[0.04 * (length / 4096) ** 0.3, 0.03 * (length / 4096) ** -0.2]])


def test_the_exponent_is_the_slope_in_the_logs():
    found = fit_lengths([4096], law(4096), {1024: law(1024), 2048: law(2048)}, SPARSE, 0.055)
    assert found.exponent.tolist() == pytest.approx([0.3, -0.2], abs=1e-4)
    assert found.validated == (1024, 4096)


def test_a_prefix_that_exceeds_the_tolerance_ends_the_validated_range():
    found = fit_lengths([4096], law(4096), {1024: law(1024), 2048: law(2048) + 1}, SPARSE, 0.055)
    assert found.validated == (4096, 4096)


def test_heads_that_skip_nothing_do_not_count():
    found = fit_lengths([4096], law(4096), {2048: law(2048) + torch.tensor([0.0, 1.0])}, ~SPARSE, 0.055)
    assert found.validated == (2048, 4096)


def test_inputs_of_several_lengths_span_the_range_and_one_alone_has_no_slope():
    both = torch.cat([law(1000), law(4000)])
    assert fit_lengths([1000, 4000], both, {}, SPARSE, 0.055).validated == (1000, 4000)
    alone = fit_lengths([4000], law(4000), {}, SPARSE, 0.055)
    assert alone.exponent.tolist() == [0.0, 0.0]


def test_tau_rises_where_the_error_grows_and_never_falls():
    inside = (1024, 4096)
    assert extrapolated_tau(0.9, (1.0, 0.5), inside, 2000) == 0.9
    # (1 - tau') = 0.1 * 4 ** -0.5
    assert extrapolated_tau(0.9, (1.0, 0.5), inside, 16384) == pytest.approx(0.95)
    assert extrapolated_tau(0.9, (2.0, 0.5), inside, 16384) == pytest.approx(1 - 0.1 * 4**-0.25)
    assert extrapolated_tau(0.9, (1.0, -0.5), inside, 16384) == 0.9
    assert extrapolated_tau(0.9, (1.0, -0.5), inside, 256) == pytest.approx(0.95)
    assert extrapolated_tau(0.9, (0.0, 0.0), inside, 256) == 0.9
    assert extrapolated_tau(0.9, (0.1, 2.0), inside, 10**6) == pytest.approx(0.995)


def test_a_head_with_room_is_raised_only_for_what_exceeds_it():
    inside = (1024, 4096)
    assert extrapolated_tau(0.0, (1.0, 0.5), inside, 16384, room=2.5) == 0.0, "the error doubles"
    assert extrapolated_tau(0.9, (1.0, 0.5), inside, 16384, room=1.5) == pytest.approx(1 - 0.1 * 1.5 / 2)
    assert extrapolated_tau(0.9, (2.0, 0.5), inside, 16384, room=1.5) == pytest.approx(1 - 0.1 * (1.5 / 2) ** 0.5)


def test_lengths_that_tell_nothing_are_validated_but_not_fitted():
    short = {512: law(512) * 1e-6, 1024: law(1024), 2048: law(2048)}
    found = fit_lengths([4096], law(4096), short, SPARSE, 0.055, lambda length: length > 512)
    assert found.exponent.tolist() == pytest.approx([0.3, -0.2], abs=1e-4)
    assert found.validated == (512, 4096)
    alone = fit_lengths([4096], law(4096), short, SPARSE, 0.055, lambda length: length > 2048)
    assert alone.exponent.tolist() == [0.0, 0.0]
