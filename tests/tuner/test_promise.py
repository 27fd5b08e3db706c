"""Bounds: against the binomial they come from, and against what simulated inputs do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from afbs_compile.tuner.promise import compression_bound, exceedance_bound, promise


@pytest.mark.parametrize(("exceeding", "inputs"), [(0, 1), (0, 29), (1, 29), (3, 50), (49, 50)])
def test_the_bound_is_where_the_binomial_tail_reaches_the_doubt(exceeding, inputs):
    bound = exceedance_bound(exceeding, inputs, 0.95)
    assert binom.cdf(exceeding, inputs, bound) == pytest.approx(0.05)


def test_zero_exceedances_have_the_closed_form():
    for inputs in (1, 5, 29, 200):
        assert exceedance_bound(0, inputs, 0.95) == pytest.approx(1 - 0.05 ** (1 / inputs))
    assert exceedance_bound(0, 29) <= 0.1


def test_no_inputs_promise_nothing():
    assert exceedance_bound(0, 0) == compression_bound(0, 0) == 1.0
    assert promise(0, 0).head_bound == promise(0, 0).model_bound == 1.0


def test_more_inputs_and_fewer_deciding_ones_tighten_the_model_s_bound():
    bounds = [compression_bound(d, 50) for d in range(51)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == 1.0
    assert compression_bound(3, 100) < compression_bound(3, 50)
    assert compression_bound(0, 50) >= exceedance_bound(0, 50)


def test_the_promises_hold_on_simulated_inputs():
    """Critical taus of 20 correlated heads; the thresholds are the largest of n, as the tuner places them."""
    generator = np.random.default_rng(0)
    inputs, heads, draws = 40, 20, 400
    head_misses = model_misses = 0
    for _ in range(draws):

        def critical(n):
            return generator.normal(size=(n, 1)) + 0.5 * generator.normal(size=(n, heads))

        seen, new = critical(inputs), critical(2000)
        chosen = seen.max(0)
        deciding = len(set(seen.argmax(0)))
        head_misses += (new[:, 0] > chosen[0]).mean() > exceedance_bound(0, inputs)
        model_misses += (new > chosen).any(1).mean() > compression_bound(deciding, inputs)
    assert 0.02 <= head_misses / draws <= 0.09  # the bound is exact: it fails about one time in twenty
    assert model_misses / draws <= 0.05
