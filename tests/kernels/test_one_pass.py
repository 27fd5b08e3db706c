"""One pass over the key blocks gives what separate evaluations of every threshold give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels import one_pass, reference, tiling
from afbs_compile.kernels.one_pass import PassSums, visit_order
from afbs_compile.kernels.op import sparse_attention_with_counts
from afbs_compile.kernels.policy import POLICIES
from tests.sweeps import slow_after

TAUS = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.9995])


def operands(heads: int, kv_heads: int, length: int, dim: int, seed: int = 0, sharpness: float = 3.0):
    """Heads of growing sharpness over a drifting sequence, so that blocks differ in mass."""
    generator = torch.Generator().manual_seed(seed)
    path = torch.randn(kv_heads, length // 40 + 2, dim, generator=generator)
    path = torch.nn.functional.interpolate(path.transpose(1, 2), length, mode="linear").transpose(1, 2)
    k = path + 0.3 * torch.randn(kv_heads, length, dim, generator=generator)
    q = k.repeat_interleave(heads // kv_heads, 0) * torch.linspace(0.5, sharpness, heads).view(-1, 1, 1)
    return q, k, path + torch.randn(kv_heads, length, dim, generator=generator)


def attended(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    batch = (x[None] for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*batch, is_causal=causal, enable_gqa=True)[0]


def separately(q: Tensor, k: Tensor, v: Tensor, tau: Tensor, theta: Tensor, rows: Tensor, **call) -> PassSums:
    """The specification: predict and attend once per threshold, in float64."""
    block_q, block_k, causal = call["block_q"], call["block_k"], call["causal"]
    counts = [reference.block_count(q.shape[1], block) for block in (block_q, block_k)]
    visible = reference.visible_blocks(*counts, block_q, block_k, causal, q.device)
    exact_operands = [x[None].double() for x in (q, k, v)]

    def attend(live: Tensor) -> Tensor:
        return reference.masked_attention(*exact_operands, live, [-1000.0] * len(q), **call)[0]

    def per_block(x: Tensor) -> Tensor:
        pieces = x.abs().sum(-1).split(block_q, -1)
        return torch.stack([piece.sum(-1) for piece in pieces], -1)[:, rows]

    dense = attend(visible.expand(1, len(q), -1, -1))
    differences, lives = [], []
    for column in tau.T:
        live = reference.predict_mask(q[None], k[None], column, theta, **call)
        differences.append(per_block(attend(live) - dense))
        lives.append(live[0].sum(-1)[:, rows])
    return PassSums(torch.stack(differences, -1), per_block(dense), torch.stack(lives, -1), visible.sum(-1)[rows])


CASES = {
    "causal": (2, 2, 256, 32, 32, 32, True),
    "odd length, GQA, uneven blocks": (4, 2, 243, 40, 64, 32, True),
    "wide query blocks": (2, 1, 384, 16, 128, 64, True),
    "full, odd length": (2, 1, 165, 24, 32, 32, False),
    "length of one block": (2, 2, 50, 16, 64, 64, True),
    "small blocks": (1, 1, 100, 64, 32, 16, False),
}


@pytest.mark.parametrize("engine", slow_after(2, ["torch", "triton", "triton, cut blocks"]))
@pytest.mark.parametrize("theta", [-1.0, 0.3], ids=["theta off", "theta 0.3"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_equals_separate_evaluations(case, theta, engine, monkeypatch):
    heads, kv_heads, length, dim, block_q, block_k, causal = case
    if engine != "torch":
        monkeypatch.setattr(one_pass, "torch_pass", one_pass._triton_pass)
    if engine == "triton, cut blocks":
        monkeypatch.setattr(tiling, "_shapes", lambda _: (tiling.LaunchShape(16, 16, 4, 1),))
    q, k, v = operands(heads, kv_heads, length, dim)
    call = {"causal": causal, "scale": dim**-0.5, "block_q": block_q, "block_k": block_k}
    tau, thetas = TAUS[1::2].expand(heads, -1).contiguous(), torch.full((heads,), theta)
    count = reference.block_count(length, block_q)
    dense = attended(q, k, v, causal)
    for rows in (None, tuple(range(1, count, 2))):
        if rows == ():
            continue
        found = one_pass.one_pass(q, k, v, dense, tau, thetas, rows=rows, **call)
        expected = separately(q, k, v, tau, thetas, torch.arange(count) if rows is None else torch.tensor(rows), **call)
        assert found.live.tolist() == expected.live.tolist()
        assert found.visible.tolist() == expected.visible.tolist()
        torch.testing.assert_close(found.magnitude.double(), expected.magnitude, rtol=1e-4, atol=1e-4)
        noise = 2e-6 * expected.magnitude[..., None]
        assert ((found.difference.double() - expected.difference).abs() <= 1e-3 * expected.difference + noise).all()
    assert expected.difference.max() > 0.01 or count < 3 or theta > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_equals_the_operator(dtype):
    q, k, v = (x.to(dtype) for x in operands(4, 2, 700, 32))
    tau = TAUS.expand(4, -1).contiguous()
    theta = torch.full((4,), -1.0)
    dense = attended(q, k, v)
    sums = one_pass.one_pass(q, k, v, dense, tau, theta, causal=True)
    for column, threshold in enumerate(TAUS.tolist()):
        constants = [threshold] * 4, [-1.0] * 4, [-1000.0] * 4
        out, counts = sparse_attention_with_counts(q[None], k[None], v[None], *constants, causal=True)
        error = (out[0].float() - dense.float()).abs().sum((1, 2)) / dense.float().abs().sum((1, 2))
        found = sums.difference[..., column].sum(-1) / sums.magnitude.sum(-1)
        assert sums.live[..., column].tolist() == counts[0].tolist()
        torch.testing.assert_close(found, error, rtol=0.02, atol=1e-4 if dtype == torch.float32 else 2e-3)


def test_groups_of_heads_change_nothing(monkeypatch):
    q, k, v = operands(6, 3, 300, 16)
    dense = attended(q, k, v)
    tau, theta = TAUS.expand(6, -1).contiguous(), torch.linspace(-1, 0.8, 6)
    whole = one_pass.one_pass(q, k, v, dense, tau, theta, causal=True)
    monkeypatch.setattr(one_pass, "WORKING_BYTES", 1)
    for found, expected in zip(one_pass.one_pass(q, k, v, dense, tau, theta, causal=True), whole, strict=True):
        assert torch.equal(found, expected)


def test_the_diagonal_comes_first_then_what_is_always_kept_then_by_level():
    level = torch.tensor([[[0.4, -1.0, 0.4, -1.0, 0.1, torch.inf]]])
    diagonal = torch.tensor([[False, False, False, True, False, False]])
    visit = visit_order(level, diagonal)
    assert visit.order.tolist() == [[[3, 1, 4, 0, 2, 5]]]
    assert (visit.level.diff() >= 0).all()
    assert (visit.level[0, 0, :2] < 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_measures_what_the_operator_computes(policy):
    q, k, v = operands(4, 2, 500, 32)
    tau, theta = TAUS.expand(4, -1).contiguous(), torch.full((4,), -1.0)
    dense = attended(q, k, v)
    sums = one_pass.one_pass(q, k, v, dense, tau, theta, policy=policy, causal=True)
    for column, threshold in enumerate(TAUS.tolist()):
        constants = [threshold] * 4, [-1.0] * 4, [-1000.0] * 4
        out, counts = sparse_attention_with_counts(
            q[None], k[None], v[None], *constants, causal=True, policy=[policy] * 4
        )
        error = (out[0] - dense).abs().sum((1, 2)) / dense.abs().sum((1, 2))
        assert sums.live[..., column].tolist() == counts[0].tolist()
        found = sums.difference[..., column].sum(-1) / sums.magnitude.sum(-1)
        torch.testing.assert_close(found, error, rtol=1e-3, atol=1e-5)


def test_a_nan_row_keeps_everything_and_measures_nan():
    q, k, v = operands(2, 2, 256, 16)
    q[0, 100] = torch.nan
    dense = attended(q, k, v)
    sums = one_pass.one_pass(q, k, v, dense, TAUS.expand(2, -1).contiguous(), torch.full((2,), -1.0), causal=True)
    assert sums.live[0, 1].tolist() == [2] * len(TAUS)
    assert sums.difference[0, 1].isnan().all()
    assert sums.difference[1].isfinite().all()
    assert sums.difference[0, 2:].isfinite().all()


def test_scores_far_apart_do_not_underflow():
    q, k, v = operands(1, 1, 256, 16)
    q = q * 400  # softmax weights of neighbouring blocks differ by more than fp32 holds
    tau, theta = TAUS[None], torch.tensor([-1.0])
    call = {"causal": True, "scale": 0.25, "block_q": 64, "block_k": 64}
    found = one_pass.one_pass(q, k, v, attended(q, k, v), tau, theta, **call)
    expected = separately(q, k, v, tau, theta, torch.arange(4), **call)
    torch.testing.assert_close(found.difference.double(), expected.difference, rtol=1e-2, atol=1e-2)
