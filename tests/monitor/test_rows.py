"""The sampled rows against dense attention in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.dense import dense_rows
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.monitor.rows import row_errors
from afbs_compile.tuner.measure import relative_l1
from tests.any_mask import in_float64, random_operands
from tests.toy import HEAD_DIM, drifting


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_dense_attention_whatever_hides_keys(seed, monkeypatch):
    monkeypatch.setattr("afbs_compile.kernels.dense.SCORES_AT_ONCE", 1 if seed % 2 else 2**26)  # a key head at a time
    operands = random_operands(seed)
    rows = torch.randperm(operands.q_len, generator=generator(seed))[:7]
    expected = in_float64(operands)[:, :, rows]
    torch.testing.assert_close(dense_rows(operands, rows).double(), expected, rtol=1e-4, atol=1e-5)


def local(length=512, heads=2):
    q = drifting(length).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)[:, :heads]
    return Operands(q * 4, q, q, mask_of("causal"), HEAD_DIM**-0.5)


def test_all_rows_give_the_error_itself():
    operands = local()
    call = SparseCall.uniform(2, 0.7, policy="meanshare")
    out = run(operands, call)[0]
    found = row_errors(operands, out, 512, generator())
    dense = in_float64(operands).float()
    torch.testing.assert_close(found.error, relative_l1(out, dense)[0], rtol=1e-4, atol=1e-6)
    assert (found.error > 0.01).all()
    assert found.deviation.tolist() == [0.0, 0.0]


def test_a_sample_is_about_as_far_off_as_it_says():
    operands = local()
    out = run(operands, SparseCall.uniform(2, 0.7, policy="meanshare"))[0]
    truth = row_errors(operands, out, 512, generator()).error
    drawn = [row_errors(operands, out, 64, generator(seed)) for seed in range(200)]
    errors, deviations = (torch.stack(column) for column in zip(*drawn, strict=True))
    torch.testing.assert_close(errors.mean(0), truth, rtol=0.1, atol=0)
    torch.testing.assert_close(errors.std(0), deviations.mean(0), rtol=0.25, atol=0)


def test_rows_of_padding_are_not_drawn():
    operands = local()
    valid = torch.ones(1, 512, dtype=torch.bool)
    valid[:, :200] = False
    operands = replace(operands, valid=valid, v=operands.v.masked_fill(~valid[:, None, :, None], torch.nan))
    out = in_float64(replace(operands, v=operands.v.nan_to_num())).float()
    broken = out.clone()
    broken[:, :, :200] = 1e6
    found = row_errors(operands, broken, 128, generator())
    assert (found.error < 1e-4).all()


def test_fewer_rows_than_asked_for_are_enough():
    operands = local()
    valid = torch.zeros(1, 512, dtype=torch.bool)
    valid[:, -5:] = True
    operands = replace(operands, valid=valid)
    found = row_errors(operands, in_float64(operands).float() * 1.1, 64, generator())
    torch.testing.assert_close(found.error, torch.full((2,), 0.1), rtol=1e-3, atol=0)


def test_a_head_whose_values_are_not_finite_is_not_judged():
    operands = local()
    v = operands.v.clone()
    v[0, 1, 500] = torch.inf
    found = row_errors(replace(operands, v=v), torch.zeros_like(operands.q), 64, generator())
    assert found.error.isnan().tolist() == [False, True]


def test_an_output_of_nan_where_dense_attention_has_none_exceeds_everything():
    operands = local()
    out = in_float64(operands).float()
    out[:, 0] = torch.nan
    error = row_errors(operands, out, 64, generator()).error
    assert error[0].isinf()
    assert error[1] < 1e-4
