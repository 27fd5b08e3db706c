"""Every kind of mask, mixed: attention, selection and the pass against float64, and nothing of what is not seen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import live_of
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.measure.one_pass import PassPlan, one_pass
from afbs_compile.kernels.select import plain
from afbs_compile.kernels.sight import resolved, sight_of
from afbs_compile.kernels.spec.attention import masked_attention
from afbs_compile.kernels.spec.selection import live_blocks
from tests.any_mask import hidden, in_float64, poisoned, random_call, random_operands, undecided
from tests.sweeps import slow_after

SEEDS = slow_after(3, range(10))


def close(out: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_dense_attention_is_that_of_every_key_seen(seed: int) -> None:
    operands = random_operands(seed)
    close(dense_attention(operands), in_float64(operands))


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_over_the_live_blocks(seed: int) -> None:
    operands = random_operands(seed)
    call = random_call(seed, operands.heads)
    live = live_of(plain.select(operands, call))
    decided = ~undecided(operands, live, call.shape)
    exact = in_float64(operands, live, call.shape)[decided]
    close(masked_attention(operands, live, call.lam, call.shape)[decided], exact)
    close(run(operands, call)[0][decided], exact)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_dead_is_dense(seed: int) -> None:
    operands = random_operands(seed)
    call = SparseCall.uniform(operands.heads, KEEP_ALL, shape=random_call(seed, 1).shape)
    close(run(operands, call)[0], in_float64(operands))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_no_row_sees_has_no_effect_on_a_bit(seed: int) -> None:
    operands = random_operands(seed)
    call = random_call(seed, operands.heads)
    out, counts = run(operands, call)
    for value in (math.nan, math.inf, 1e4):
        other, others = run(poisoned(operands, value), call)
        torch.testing.assert_close(other, out, rtol=0, atol=0)
        torch.testing.assert_close(others, counts, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_what_no_row_of_a_few_sees_has_no_effect(seed: int) -> None:
    """Calls of one block, which are computed in another way than longer ones."""
    operands = random_operands(seed, largest=16, plain=True)
    call = random_call(seed, operands.heads)
    out, counts = run(operands, call)
    for value in (math.nan, math.inf, 1e4):
        other, others = run(poisoned(operands, value), call)
        torch.testing.assert_close(other, out)
        torch.testing.assert_close(others, counts, rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_key_has_no_effect_on_query_blocks_that_do_not_see_it(seed: int) -> None:
    operands = random_operands(seed)
    if operands.q_len < 2:
        pytest.skip("one row")
    call = random_call(seed, operands.heads)
    shape, away = call.shape, hidden(operands)
    key = int(torch.randint(operands.k_len, (), generator=torch.Generator().manual_seed(seed)))
    blind = away[..., key].float()
    blind = (
        torch.nn.functional.pad(blind, (0, -operands.q_len % shape.q), value=1.0).unflatten(2, (-1, shape.q)).amin(3)
    )
    groups = operands.groups
    # A key head is changed for all of its query heads.
    for value in (1e3, math.nan):
        k, v = operands.k.clone(), operands.v.clone()
        k[:, :, key], v[:, :, key] = value, value
        before = live_of(plain.select(operands, call))
        after = live_of(plain.select(replace(operands, k=k, v=v), call))
        rows = blind.bool()
        assert torch.equal(before[rows], after[rows]), (groups, str(operands.mask))
        out, other = run(operands, call)[0], run(replace(operands, k=k, v=v), call)[0]
        elements = away[..., key]
        wide = rows.repeat_interleave(shape.q, 2)[:, :, : operands.q_len]
        # Rows that meet what is not finite in their blocks are computed again, and round otherwise.
        exactly = {"rtol": 0, "atol": 0} if value == 1e3 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(out[wide], other[wide], **exactly)
        same = elements & ~wide
        assert not other[same].isnan().any(), "a row that does not see the key"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_fast_selection_is_that_of_the_specification(seed: int) -> None:
    operands = random_operands(seed)
    call = random_call(seed, operands.heads)
    lists = plain.select(operands, call)
    live, expected = live_of(lists), live_blocks(operands, call)
    assert (live != expected).float().mean() < 0.01
    sight = sight_of(resolved(operands), call.shape)
    visible = sight.visible.expand_as(live)
    assert not (live & ~visible).any()
    assert torch.equal(lists.whole, (live & sight.whole).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pass_measures_what_calls_give(seed: int) -> None:
    operands = random_operands(seed).element(0)
    call = random_call(seed, operands.heads)
    policy, tau = call.policy[0], torch.tensor([0.0, 0.5, 0.9, 1.0]).expand(operands.heads, -1).contiguous()
    theta = torch.full((operands.heads,), -1.0)
    dense = dense_attention(operands)
    sums = one_pass(operands, dense, tau, theta, PassPlan(policy, call.shape, call.kept))
    valid = resolved(operands).valid  # with what a mask of one row hides from all rows
    counted = (
        None
        if valid is None or not operands.mask.local
        else valid[:, (torch.arange(operands.q_len) + operands.offset).clamp(0, operands.k_len - 1)]
    )
    for place in range(tau.shape[1]):
        one = SparseCall.uniform(operands.heads, float(tau[0, place]), policy=policy, shape=call.shape, kept=call.kept)
        live = live_blocks(operands, one)
        assert ((live.sum(-1)[0] - sums.live[..., place]).abs() <= 1).all()
        if not torch.equal(live.sum(-1)[0].int(), sums.live[..., place]):
            continue  # within rounding of a threshold
        if undecided(operands, live, call.shape).any():
            continue
        distance = (in_float64(operands, live, call.shape) - dense.double()).abs().sum(-1)
        if counted is not None:
            distance = distance.masked_fill(~counted[:, None], 0.0)
        torch.testing.assert_close(
            sums.difference[..., place].sum(-1).double(), distance[0].sum(-1), rtol=1e-3, atol=1e-2, equal_nan=True
        )
