"""One pass over the key blocks gives what separate evaluations of every threshold give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.attend.portable import tiling
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape, block_count
from afbs_compile.kernels.call import LAMBDA_OFF, SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.measure import one_pass, pass_triton
from afbs_compile.kernels.measure.one_pass import PassPlan, PassSums
from afbs_compile.kernels.measure.visit import visit_order
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import POLICIES, UNNAMED
from afbs_compile.kernels.spec.attention import masked_attention
from afbs_compile.kernels.spec.selection import live_blocks
from tests.kernels.helpers import in_double
from tests.masks import Dilated
from tests.sweeps import slow_after

TAUS = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.9995])


SQUARE = BlockShape(64, 64)


def operands(heads: int, kv_heads: int, length: int, dim: int, mask: str = "causal") -> Operands:
    """Heads of growing sharpness over a drifting sequence, so that blocks differ in mass."""
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(kv_heads, length // 40 + 2, dim, generator=generator)
    path = torch.nn.functional.interpolate(path.transpose(1, 2), length, mode="linear").transpose(1, 2)
    k = path + 0.3 * torch.randn(kv_heads, length, dim, generator=generator)
    q = k.repeat_interleave(heads // kv_heads, 0) * torch.linspace(0.5, 3.0, heads).view(-1, 1, 1)
    v = path + torch.randn(kv_heads, length, dim, generator=generator)
    return Operands(q[None], k[None], v[None], mask_of(mask), dim**-0.5)


def measured(call: Operands, tau: Tensor, theta: Tensor, **plan) -> PassSums:
    """The pass against dense attention; meansim and 64 x 64 blocks by default."""
    plan = {"policy": UNNAMED, "shape": SQUARE, **plan}
    return one_pass.one_pass(call, dense_attention(call), tau, theta, PassPlan(**plan))


def separately(call: Operands, tau: Tensor, theta: Tensor, rows: Tensor, shape: BlockShape) -> PassSums:
    """The specification: predict and attend once per threshold, in float64."""
    visible = call.mask.visibility(call.grid(shape), call.device).visible
    exact = in_double(call)

    def attend(live: Tensor) -> Tensor:
        return masked_attention(exact, live, [LAMBDA_OFF] * call.heads, shape)[0]

    def per_block(x: Tensor) -> Tensor:
        pieces = x.abs().sum(-1).split(shape.q, -1)
        return torch.stack([piece.sum(-1) for piece in pieces], -1)[:, rows]

    dense = attend(visible.expand(1, call.heads, -1, -1))
    differences, lives = [], []
    for column in tau.T:
        live = live_blocks(call, constants(call, column, theta, shape=shape))
        differences.append(per_block(attend(live) - dense))
        lives.append(live[0].sum(-1)[:, rows])
    return PassSums(torch.stack(differences, -1), per_block(dense), torch.stack(lives, -1), visible.sum(-1)[rows])


def constants(
    call: Operands, tau: Tensor, theta: Tensor, *, policy: str = UNNAMED, shape: BlockShape = SQUARE
) -> SparseCall:
    """A call at some thresholds."""
    heads = call.heads
    lists = (tuple(tau.tolist()), tuple(theta.tolist()), (LAMBDA_OFF,) * heads)
    return SparseCall(*lists, (policy,) * heads, shape)


CASES = {
    "causal": (2, 2, 256, 32, (32, 32), "causal"),
    "odd length, GQA, uneven blocks": (4, 2, 243, 40, (64, 32), "causal"),
    "wide query blocks": (2, 1, 384, 16, (128, 64), "causal"),
    "full, odd length": (2, 1, 165, 24, (32, 32), "full"),
    "length of one block": (2, 2, 50, 16, (64, 64), "causal"),
    "small blocks": (1, 1, 100, 64, (32, 16), "full"),
}


@pytest.mark.parametrize("engine", slow_after(2, ["torch", "triton", "triton, cut blocks"]))
@pytest.mark.parametrize("theta", [-1.0, 0.3], ids=["theta off", "theta 0.3"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_equals_separate_evaluations(case, theta, engine, monkeypatch):
    heads, kv_heads, length, dim, blocks, mask = case
    shape = BlockShape(*blocks)
    if engine != "torch":
        monkeypatch.setattr(one_pass, "plain_pass", pass_triton.triton_pass)
    if engine == "triton, cut blocks":
        monkeypatch.setattr(tiling, "_shapes", lambda _: (tiling.LaunchShape(16, 16, 4, 1),))
    call = operands(heads, kv_heads, length, dim, mask)
    tau, thetas = TAUS[1::2].expand(heads, -1).contiguous(), torch.full((heads,), theta)
    count = block_count(length, shape.q)
    for rows in (None, tuple(range(1, count, 2))):
        if rows == ():
            continue
        found = measured(call, tau, thetas, rows=rows, shape=shape)
        expected = separately(call, tau, thetas, torch.arange(count) if rows is None else torch.tensor(rows), shape)
        assert found.live.tolist() == expected.live.tolist()
        assert found.visible[0].tolist() == expected.visible.tolist()
        torch.testing.assert_close(found.magnitude.double(), expected.magnitude, rtol=1e-4, atol=1e-4)
        noise = 2e-6 * expected.magnitude[..., None]
        assert ((found.difference.double() - expected.difference).abs() <= 1e-3 * expected.difference + noise).all()
    assert expected.difference.max() > 0.01 or count < 3 or theta > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_equals_the_operator(dtype):
    call = operands(4, 2, 700, 32)
    call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
    theta, dense = torch.full((4,), -1.0), dense_attention(call)[0].float()
    sums = measured(call, TAUS.expand(4, -1).contiguous(), theta)
    for column, threshold in enumerate(TAUS):
        out, counts = run(call, constants(call, threshold.expand(4), theta))
        error = (out[0].float() - dense).abs().sum((1, 2)) / dense.abs().sum((1, 2))
        found = sums.difference[..., column].sum(-1) / sums.magnitude.sum(-1)
        assert sums.live[..., column].tolist() == counts[0].tolist()
        torch.testing.assert_close(found, error, rtol=0.02, atol=1e-4 if dtype == torch.float32 else 2e-3)


def test_heads_that_share_a_selection_are_measured_with_it():
    call, theta = operands(4, 2, 300, 32), torch.full((4,), -1.0)
    tau = TAUS[1::2].expand(4, -1).contiguous()
    shape = BlockShape(64, 64, heads=2)
    found, rows = measured(call, tau, theta, shape=shape, policy="meanshare"), torch.arange(5)
    apart = measured(call, tau, theta, policy="meanshare")
    for column in range(tau.shape[1]):
        sparse = constants(call, tau[:, column], theta, policy="meanshare", shape=shape)
        live = live_blocks(call, sparse)
        assert torch.equal(found.live[..., column], live[0].sum(-1, dtype=torch.int32)[:, rows])
        out = masked_attention(in_double(call), live, [LAMBDA_OFF] * 4, shape)[0]
        difference = (out - dense_attention(in_double(call))[0]).abs().sum((1, 2))
        torch.testing.assert_close(found.difference[..., column].sum(1).double(), difference, rtol=2e-3, atol=1e-3)
    assert (found.live >= apart.live).all()
    assert (found.live > apart.live).any()


def test_groups_of_heads_change_nothing(monkeypatch):
    call = operands(6, 3, 300, 16)
    tau, theta = TAUS.expand(6, -1).contiguous(), torch.linspace(-1, 0.8, 6)
    whole = measured(call, tau, theta)
    monkeypatch.setattr(one_pass, "WORKING_BYTES", 1)
    for found, expected in zip(measured(call, tau, theta), whole, strict=True):
        assert torch.equal(found, expected)


def test_partial_blocks_that_are_kept_come_first_then_what_is_always_kept_then_by_level():
    level = torch.tensor([[[0.4, -1.0, 0.4, -1.0, 0.1, torch.inf]]])
    partial = torch.tensor([[False, False, True, True, False, False]])
    always = torch.tensor([[False, True, False, True, False, False]])
    visit = visit_order(level, partial, always)
    assert visit.order.tolist() == [[[3, 1, 4, 0, 2, 5]]]
    assert (visit.level.diff() >= 0).all()
    assert (visit.level[0, 0, :2] < 0).all()
    assert visit.first.tolist() == [1]
    assert torch.equal(visit.partial, partial)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_measures_what_the_operator_computes(policy):
    call = operands(4, 2, 500, 32)
    theta, dense = torch.full((4,), -1.0), dense_attention(call)[0]
    sums = measured(call, TAUS.expand(4, -1).contiguous(), theta, policy=policy)
    for column, threshold in enumerate(TAUS):
        out, counts = run(call, constants(call, threshold.expand(4), theta, policy=policy))
        error = (out[0] - dense).abs().sum((1, 2)) / dense.abs().sum((1, 2))
        assert sums.live[..., column].tolist() == counts[0].tolist()
        found = sums.difference[..., column].sum(-1) / sums.magnitude.sum(-1)
        torch.testing.assert_close(found, error, rtol=1e-3, atol=1e-5)


def test_a_nan_row_keeps_everything_and_measures_nan():
    call = operands(2, 2, 256, 16)
    call.q[0, 0, 100] = torch.nan
    sums = measured(call, TAUS.expand(2, -1).contiguous(), torch.full((2,), -1.0))
    assert sums.live[0, 1].tolist() == [2] * len(TAUS)
    assert sums.difference[0, 1].isnan().all()
    assert sums.difference[1].isfinite().all()
    assert sums.difference[0, 2:].isfinite().all()


def test_scores_far_apart_do_not_underflow():
    call = operands(1, 1, 256, 16)
    call = replace(call, q=call.q * 400)  # softmax weights of neighbouring blocks differ by more than fp32 holds
    tau, theta = TAUS[None], torch.tensor([-1.0])
    found, expected = measured(call, tau, theta), separately(call, tau, theta, torch.arange(4), SQUARE)
    torch.testing.assert_close(found.difference.double(), expected.difference, rtol=1e-2, atol=1e-2)


def test_a_mask_that_is_no_band_is_measured_too():
    call = replace(operands(2, 1, 243, 32), mask=Dilated(2))
    tau, theta = TAUS[1::2].expand(2, -1).contiguous(), torch.full((2,), -1.0)
    found, expected = measured(call, tau, theta), separately(call, tau, theta, torch.arange(4), SQUARE)
    assert found.live.tolist() == expected.live.tolist()
    assert found.visible[0].tolist() == expected.visible.tolist()
    torch.testing.assert_close(found.difference.double(), expected.difference, rtol=1e-3, atol=1e-3)
