"""Every kind of mask in the portable kernel and in the pass on Triton, by the interpreter, against float64."""

from __future__ import annotations

import math
import os

import pytest
import torch

from afbs_compile.kernels.attend.portable import launch
from afbs_compile.kernels.blocks import live_of
from afbs_compile.kernels.call import Kept
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.measure import one_pass, pass_triton
from afbs_compile.kernels.measure.one_pass import PassPlan
from afbs_compile.kernels.operands import empty_output
from afbs_compile.kernels.select import plain
from afbs_compile.kernels.sight import resolved
from tests.any_mask import in_float64, poisoned, random_call, random_operands, undecided
from tests.sweeps import slow_after

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="interpreted kernels only")

SEEDS = slow_after(3, range(8))


def attended(operands, call):
    operands = resolved(operands.padded)
    lists = plain.select(operands, call)
    out = empty_output(operands.q, operands.v)
    launch.attend(operands, call, lists, out)
    return out, live_of(lists)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_over_the_live_blocks(seed: int) -> None:
    operands = random_operands(seed, largest=150)
    call = random_call(seed, operands.heads)
    out, live = attended(operands, call)
    decided = ~undecided(operands, live, call.shape)
    exact = in_float64(operands, live, call.shape)
    torch.testing.assert_close(out[..., : exact.shape[3]].double()[decided], exact[decided], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_no_row_sees_has_no_effect_on_a_bit(seed: int) -> None:
    operands = random_operands(seed, largest=150)
    call = random_call(seed, operands.heads)
    out, _ = attended(operands, call)
    for value in (math.nan, math.inf, 1e4):
        torch.testing.assert_close(attended(poisoned(operands, value), call)[0], out, rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_pass_on_triton_is_the_plain_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = random_operands(seed, largest=150).element(0).padded
    call = random_call(seed, operands.heads)
    tau = torch.tensor([0.0, 0.5, 0.9, 1.0]).expand(operands.heads, -1).contiguous()
    plan = PassPlan(call.policy[0], call.shape, Kept(5, 10))
    given = operands, dense_attention(operands), tau, torch.full((operands.heads,), -1.0), plan
    expected = one_pass.one_pass(*given)
    monkeypatch.setattr(one_pass, "plain_pass", pass_triton.triton_pass)
    found = one_pass.one_pass(*given)
    torch.testing.assert_close(found.magnitude, expected.magnitude, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.difference, expected.difference, rtol=1e-3, atol=1e-2)
