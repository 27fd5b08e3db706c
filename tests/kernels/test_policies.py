"""Policies: each against its formula in float64, Triton against PyTorch, causality, NaN, and heads that differ."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.attend.portable import engine as portable
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockLists, live_of
from afbs_compile.kernels.measure import levels as measured
from afbs_compile.kernels.measure.levels import Places
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies import rules
from afbs_compile.kernels.policies.registry import POLICIES, policy_named
from afbs_compile.kernels.policies.sink_window import WINDOW
from afbs_compile.kernels.select import triton
from afbs_compile.kernels.select.strength_triton import odds_of
from afbs_compile.kernels.spec.selection import live_blocks, per_head
from tests.kernels.helpers import (
    MASKS,
    NO_SKIP,
    OFF,
    TRITON_DEVICE,
    Shape,
    diagonal_blocks,
    exact,
    inputs,
    on,
    operands_of,
    shape_id,
    sparse_call,
    visible_blocks,
)
from tests.sweeps import slow_after

EACH_MASK = pytest.mark.parametrize("mask", MASKS)
EACH_POLICY = pytest.mark.parametrize("name", POLICIES)
GROUP = 16


def levels(name: str, operands: Operands, shape: Shape, theta: list[float] | None = None) -> Tensor:
    """Levels of all query blocks."""
    visible, diagonal = (blocks(shape, operands.device)[None, None] for blocks in (visible_blocks, diagonal_blocks))
    places = Places(visible, diagonal, torch.zeros_like(visible))
    return measured.levels_of(operands, shape.block_shape, name, places, theta)


def full_heads(k: Tensor, q: Tensor) -> Tensor:
    """float64, a key head for each query head."""
    return k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)


def from_groups(logits: Tensor, seen: Tensor, per_q: int, per_k: int) -> Tensor:
    """Mean over the query groups of a block of the mass that falls into each key block, one by one."""
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    rows = [torch.stack([w.sum(-1).mean(-1) for w in part.split(per_k, -1)], -1) for part in weights.split(per_q, -2)]
    return torch.stack(rows, -2)


def groups_of(x: Tensor) -> list[Tensor]:
    """``[B, H, up to 16, D]`` each."""
    return list(x.double().split(GROUP, 2))


def formula(name: str, operands: Operands, shape: Shape) -> Tensor:
    """Probability (strength for ``sink_window``) of every block in float64, written as the documentation says it."""
    q, keys, scale = operands.q, full_heads(operands.k, operands.q), operands.scale
    block_q, block_k = shape.blocks
    per_q, per_k = block_q // GROUP, block_k // GROUP
    count_q, count_k = shape.counts
    causal, visible = shape.mask == "causal", visible_blocks(shape, q.device)
    if name in ("meansim", "meanshare"):
        means = [
            torch.stack([p.mean(2) for p in x.double().split(b, 2)], 2) for x, b in ((q, block_q), (keys, block_k))
        ]
        return (means[0] @ means[1].transpose(-1, -2) * scale).masked_fill(~visible, -math.inf).softmax(-1)
    if name == "sink_window":
        strength = torch.empty(count_q, count_k, dtype=torch.float64, device=q.device)
        for i in range(count_q):
            for j in range(count_k):
                gaps = [
                    abs(r - c)
                    for r in (i * block_q, (i + 1) * block_q - 1)
                    for c in (j * block_k, (j + 1) * block_k - 1)
                ]
                strength[i, j] = math.inf if j == 0 else WINDOW / max(1, min(gaps))
        return strength.expand(*q.shape[:2], -1, -1)
    group = torch.arange(-(-shape.length // GROUP), device=q.device)
    seen = (
        (group <= group[:, None]) if causal else torch.ones(len(group), len(group), dtype=torch.bool, device=q.device)
    )
    if name == "antidiagonal":
        rows, cols = groups_of(q), groups_of(keys)
        pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, GROUP - x.shape[2]))  # noqa: E731
        sums = [
            [sum((pad(r)[:, :, GROUP - 1 - t] * pad(c)[:, :, t]).sum(-1) for t in range(GROUP)) for c in cols]
            for r in rows
        ]
        logits = torch.stack([torch.stack(line, -1) for line in sums], -2) * scale / GROUP
        return from_groups(logits, seen, per_q, per_k)
    if name == "cumulant":
        mean_q = torch.stack([r.mean(2) for r in groups_of(q)], 2)
        mean_k, var_k = (
            torch.stack([f(c) for c in groups_of(keys)], 2)
            for f in (lambda c: c.mean(2), lambda c: c.var(2, correction=0))
        )
        # of half precision all features are rounded to bfloat16
        feature = (lambda x: x) if q.dtype == torch.float32 else (lambda x: x.bfloat16().double())
        logits = feature(scale * mean_q) @ feature(mean_k).mT
        logits = logits + feature(scale**2 / 2 * mean_q.square()) @ feature(var_k).mT
        return from_groups(logits, seen, per_q, per_k)
    if name == "sampled":
        token = torch.arange(shape.length, device=q.device)
        keys_seen = (
            (token <= token[::GROUP, None])
            if causal
            else torch.ones(len(group), shape.length, dtype=torch.bool, device=q.device)
        )
        exact_mass = from_groups(q.double()[:, :, ::GROUP] @ keys.mT * scale, keys_seen, per_q, block_k)
        return (exact_mass + formula("cumulant", operands, shape)) / 2
    assert name == "vertical_slash"
    token = torch.arange(shape.length, device=q.device)
    seen = (
        (token <= token[::GROUP, None])
        if causal
        else torch.ones(len(group), shape.length, dtype=torch.bool, device=q.device)
    )
    mass = from_groups(q.double()[:, :, ::GROUP] @ keys.mT * scale, seen, per_q, block_k)
    total, step = mass.clone(), block_q // block_k
    for i in range(1, count_q):
        for j in range(count_k):
            total[:, :, i, j] += mass[:, :, i - 1, j] / 2
            if j >= step:
                total[:, :, i, j] += mass[:, :, i - 1, j - step] / 2
    total = total.masked_fill(~visible, 0.0)
    return total / total.sum(-1, keepdim=True)


def live_at(name: str, probability: Tensor, tau: float, shape: Shape) -> Tensor:
    """The selection of the policy's rule, block by block."""
    rule = policy_named(name).rule
    visible, diagonal = (blocks(shape, probability.device) for blocks in (visible_blocks, diagonal_blocks))
    if rule == "mass":
        before = torch.where(probability[..., None, :] > probability[..., None], probability[..., None, :], 0.0).sum(-1)
        chosen = before < tau
    else:
        strength = probability * visible.sum(-1, keepdim=True) ** 0.25 if rule == "share" else probability
        chosen = strength > odds_of(tau)
    return visible & (chosen | diagonal | torch.full_like(chosen, tau >= 1))


def undecided(name: str, level: Tensor, tau: Tensor) -> Tensor:
    """Blocks whose fate rounding may decide."""
    return (level - tau).abs() < 1e-5


SHAPES = [
    Shape(length=333, head_dim=33, heads=4, kv_heads=2, batch=2, layout="gaps"),
    Shape(length=300, heads=2, kv_heads=1, blocks=(128, 64), mask="full", layout="strided"),
    Shape(length=512, head_dim=80, heads=1, kv_heads=1, blocks=(128, 128), dtype=torch.bfloat16),
    Shape(length=90, head_dim=16, blocks=(32, 16), dtype=torch.float16, scale=0.3, layout="bnhd"),
    Shape(length=5, head_dim=64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@EACH_POLICY
def test_scores_are_the_documented_formula(name: str, shape: Shape) -> None:
    operands, visible = operands_of(shape), visible_blocks(shape)
    scores = policy_named(name).scores(operands, shape.block_shape)
    truth = formula(name, operands, shape)
    came = scores.exp() if name == "sink_window" else rules.softmax(scores, visible)
    assert came.dtype == torch.float32
    torch.testing.assert_close(
        came.double().masked_fill(~visible, 0), truth.masked_fill(~visible, 0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.6, 0.9, 0.99, 1.0])
@EACH_POLICY
def test_levels_are_the_taus_from_which_blocks_are_live(name: str, tau: float) -> None:
    shape = Shape(length=900, heads=4, kv_heads=2, blocks=(64, 32))
    operands = operands_of(shape)
    level, truth = levels(name, operands, shape), formula(name, operands, shape)
    expected = live_at(name, truth, tau, shape)
    differs = ((level < tau) != expected) & ~undecided(name, level, torch.tensor(tau))
    assert not differs.any()
    if tau == 0.99 and name != "sink_window":
        assert 0.3 < float(expected.sum() / live_at(name, truth, 1.0, shape).sum()) <= 1.0


EACH_THETA = pytest.mark.parametrize("theta", [[0.35, 0.4, 0.45, OFF], [0.4] * 4], ids=["each its own", "one for all"])


@EACH_THETA
def test_levels_of_meansim_with_theta_are_the_selection(theta: list[float]) -> None:
    shape = Shape(length=700, heads=4, kv_heads=2, batch=2)
    operands = operands_of(shape)
    tau = [0.3, 0.4, 0.2, 0.6]
    live = levels("meansim", operands, shape, theta) < per_head(tau, operands.device)
    assert torch.equal(live, live_blocks(operands, sparse_call(shape, tau, theta)))
    assert live.float().mean() < 0.5
    kept = (live & ~live_blocks(operands, sparse_call(shape, tau))).any(-1).any(-1).any(0)
    assert kept.tolist() == [limit > OFF for limit in theta], "theta must matter"


@EACH_THETA
def test_levels_of_some_query_blocks_are_those_of_all(theta: list[float]) -> None:
    shape = Shape(length=700, heads=4, kv_heads=2, batch=2)
    operands = operands_of(shape)
    level = levels("meansim", operands, shape, theta)
    rows = torch.tensor([3, 4, 9])
    visible, diagonal = (blocks(shape)[None, None, rows] for blocks in (visible_blocks, diagonal_blocks))
    places = Places(visible, diagonal, torch.zeros_like(visible), rows)
    some = measured.levels_of(operands, shape.block_shape, "meansim", places, theta)
    assert torch.equal(some, level[:, :, rows])


@EACH_POLICY
def test_levels_on_triton_are_the_levels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(length=300, heads=4, kv_heads=2, batch=2, blocks=(64, 32))
    operands = operands_of(shape)
    theta = [0.0, 0.02, 0.3, OFF] if name == "meansim" else None
    expected = levels(name, operands, shape, theta)
    monkeypatch.setattr(measured, "_scored_by_torch", measured.scored_by_triton)
    came = levels(name, on(operands, TRITON_DEVICE), shape, theta).cpu()
    torch.testing.assert_close(came, expected, atol=1e-5, rtol=0)


def test_levels_of_a_policy_without_theta_are_refused_one() -> None:
    shape = Shape(length=100)
    with pytest.raises(ValueError, match=r"^theta is 0\.1 for policy cumulant; accepted: negative, it has none$"):
        levels("cumulant", operands_of(shape), shape, [0.1, OFF])
    with pytest.raises(ValueError, match="policy is 'median'; accepted: meansim, "):
        levels("median", operands_of(shape), shape)


def triton_lists(name: str | list[str], operands: Operands, tau: float | list[float], shape: Shape) -> BlockLists:
    """The lists of the Triton predictor: each part ascending."""
    lists = triton.select(operands, sparse_call(shape, tau, policy=name))
    counts = zip(lists.whole.flatten().tolist(), lists.counts.flatten().tolist(), strict=True)
    for (whole, count), rows in zip(counts, lists.indices.flatten(0, 2).tolist(), strict=True):
        for part in (rows[:whole], rows[whole:count]):
            assert part == sorted(set(part))
    return lists


def triton_mask(name: str | list[str], operands: Operands, tau: float | list[float], shape: Shape) -> Tensor:
    return live_of(triton_lists(name, operands, tau, shape))


def random_shapes(count: int) -> list[Shape]:
    draw = random.Random(3)
    shapes = []
    for _ in range(count):
        kv_heads, groups = draw.choice([(1, 1), (1, 4), (2, 1), (2, 2)])
        block_k = draw.choice([16, 32, 64])
        shapes.append(
            Shape(
                length=draw.randint(1, 450),
                head_dim=draw.choice([16, 33, 60, 64, 80, 128]),
                heads=kv_heads * groups,
                kv_heads=kv_heads,
                batch=draw.choice([1, 2]),
                dtype=draw.choice([torch.float32, torch.float16, torch.bfloat16]),
                mask="causal" if draw.random() < 0.5 else "full",
                blocks=(block_k * draw.choice([1, 2]), block_k),
                layout=draw.choice(["bhnd", "bnhd", "gaps", "strided"]),
                scale=draw.choice([None, 0.3]),
            )
        )
    return [
        *shapes,
        Shape(length=1700, head_dim=16, heads=1, kv_heads=1),
        Shape(length=600, heads=1, kv_heads=1, blocks=(128, 128)),
    ]


@pytest.mark.parametrize("shape", slow_after(3, random_shapes(6)), ids=shape_id)
@EACH_POLICY
def test_triton_selects_what_the_specification_selects(name: str, shape: Shape) -> None:
    operands = operands_of(shape)
    tau = [0.85 if h % 2 else 0.6 for h in range(shape.heads)]
    level, limits = levels(name, operands, shape), per_head(tau, operands.device)
    mask = triton_mask(name, on(operands, TRITON_DEVICE), tau, shape).cpu()
    assert not ((mask != (level < limits)) & ~undecided(name, level, limits)).any()


@EACH_MASK
@EACH_POLICY
def test_tau_zero_keeps_the_diagonal_and_tau_one_keeps_all(name: str, mask: str) -> None:
    shape = Shape(length=300, blocks=(64, 32), mask=mask)
    operands, visible = operands_of(shape), visible_blocks(shape)
    for live in (
        triton_mask(name, on(operands, TRITON_DEVICE), [0.0, 1.0], shape),
        live_blocks(operands, sparse_call(shape, [0.0, 1.0], policy=name)),
    ):
        assert torch.equal(live[0, 0].cpu(), visible & diagonal_blocks(shape))
        assert torch.equal(live[0, 1].cpu(), visible)


@pytest.mark.parametrize("on_triton", [False, True], ids=["specification", "triton"])
@EACH_POLICY
def test_a_later_token_changes_no_score_of_earlier_query_blocks(name: str, on_triton: bool) -> None:
    shape = Shape(length=700, blocks=(64, 32))
    operands = operands_of(shape, TRITON_DEVICE if on_triton else "cpu")
    visible = visible_blocks(shape, operands.device)

    def scored() -> Tensor:
        """Finer than a selection: any change of a score shows."""
        chosen = policy_named(name)
        if on_triton:
            scores = torch.empty(1, 2, *shape.counts, dtype=torch.int32, device=operands.device)
            chosen.write_scores(operands, shape.block_shape, scores)
            scores = scores.view(torch.float32)
        else:
            scores = chosen.scores(operands, shape.block_shape)
        return rules.levels(scores.masked_fill(~visible, 0.0), chosen.rule, visible).masked_fill(~visible, 0.0)

    before = scored()
    changed = 450  # inside query block 7
    for x, seed in ((operands.q, 5), (operands.k, 6)):
        x[:, :, changed:] = 30 * inputs(shape, operands.device.type, seed)[0][:, :, changed:]
    after = scored()
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert torch.equal(before[:, :, 7:], after[:, :, 7:]) == (name == "sink_window")


LOOKING = [name for name in POLICIES if name != "sink_window"]
"""Policies that look at q and k."""


@pytest.mark.parametrize("poisoned", ["q", "k"])
@pytest.mark.parametrize("name", slow_after(2, LOOKING))
def test_nan_keeps_blocks_of_its_own_head_only(name: str, poisoned: str) -> None:
    shape = Shape(length=320, heads=4, kv_heads=2, batch=2)
    operands = operands_of(shape, TRITON_DEVICE)
    clean = triton_mask(name, operands, 0.3, shape)
    # The first row of block 2: a probed one.
    (operands.q if poisoned == "q" else operands.k)[1, 1, 128] = torch.nan
    mask = triton_mask(name, operands, 0.3, shape)
    expected = live_blocks(on(operands, "cpu"), sparse_call(shape, 0.3, policy=name))
    assert torch.equal(mask.cpu(), expected)
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[1, [1] if poisoned == "q" else [2, 3]] = True
    assert torch.equal(mask[~touched], clean[~touched])
    kept = mask[touched][:, 2, :3] if poisoned == "q" else mask[touched][:, 2:, 2]
    assert kept.all()


@pytest.mark.parametrize("on_triton", [False, True], ids=["specification", "triton"])
@pytest.mark.parametrize("name", LOOKING)
def test_scores_that_overflow_keep_the_row(name: str, on_triton: bool) -> None:
    shape = Shape(length=320, mask="full")
    operands = operands_of(shape, TRITON_DEVICE if on_triton else "cpu")
    operands.q[:, :, 64:128] = operands.k[:, :, 128:192] = 1e25
    if on_triton:
        mask = triton_mask(name, operands, 0.3, shape)
    else:
        mask = live_blocks(operands, sparse_call(shape, 0.3, policy=name))
    assert mask[:, :, 1].all()
    assert not mask.all()


def test_selection_is_deterministic() -> None:
    shape = Shape(length=400, heads=len(POLICIES), kv_heads=1, dtype=torch.bfloat16)
    operands = operands_of(shape, TRITON_DEVICE)
    first, second = (triton_lists(list(POLICIES), operands, 0.8, shape) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


MIXED = ["cumulant", "meansim", "sink_window", "cumulant"]


@pytest.mark.parametrize("on_triton", [False, True], ids=["specification", "triton"])
def test_heads_may_differ(on_triton: bool) -> None:
    shape = Shape(length=400, heads=4, kv_heads=2, batch=2, layout="bnhd")
    operands = operands_of(shape, TRITON_DEVICE if on_triton else "cpu")
    call = sparse_call(shape, [0.8, 0.6, 0.05, 0.9], [OFF, 0.02, OFF, OFF], policy=MIXED)
    select = (lambda *given: live_of(triton.select(*given))) if on_triton else live_blocks
    together = select(operands, call)
    for h in range(4):
        alone = select(operands.taken([h]), call.taken([h], 2))
        assert torch.equal(together[:, h : h + 1], alone)
    assert len({int(together[:, h].sum()) for h in range(4)}) > 2


def test_the_operator_runs_policies() -> None:
    shape = Shape(length=400, heads=4, kv_heads=2, batch=2, layout="bnhd")
    operands = operands_of(shape)
    qkv = operands.q, operands.k, operands.v
    tau, theta, lam = [0.8, 0.6, 0.05, 0.7], [OFF, 0.02, OFF, OFF], [NO_SKIP] * 4
    call = sparse_call(shape, tau, theta, policy=MIXED)
    live = live_blocks(operands, call)
    out = torch.ops.afbs.sparse_attention(*qkv, tau, theta, lam, "causal", policy=MIXED)
    torch.testing.assert_close(out.double(), exact(operands, live, shape.blocks), atol=1e-5, rtol=0)
    _, counts = run(operands, call)
    assert torch.equal(counts, live.sum(-1, dtype=torch.int32))
    unnamed = torch.ops.afbs.sparse_attention(*qkv, tau, theta, lam, "causal")
    named = torch.ops.afbs.sparse_attention(*qkv, tau, theta, lam, "causal", policy=["meansim"] * 4)
    assert torch.equal(unnamed, named)
    assert not torch.equal(unnamed, out)


class Model(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        constants = ([0.8, 0.6, 0.05, 0.7], [OFF] * 4, [NO_SKIP] * 4)
        return torch.ops.afbs.sparse_attention(q * 2, k, v, *constants, "causal", policy=MIXED) + 1


def test_names_survive_opcheck_compile_and_export(tmp_path: Any) -> None:
    q, k, v = inputs(Shape(length=200, heads=4, kv_heads=2))
    constants = ([0.8, 0.6, 0.05, 0.7], [OFF] * 4, [NO_SKIP] * 4, "causal")
    torch.library.opcheck(torch.ops.afbs.sparse_attention.default, (q, k, v, *constants), {"policy": MIXED})
    expected = Model()(q, k, v)
    torch.testing.assert_close(torch.compile(Model(), fullgraph=True)(q, k, v), expected)
    torch.export.save(torch.export.export(Model(), (q, k, v)), tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(q, k, v), expected)


@pytest.mark.parametrize(
    ("names", "theta", "sentence"),
    [
        (["meansim"], OFF, "policy has 1 names; accepted: one for each of the 2 query heads"),
        (["meansim", "median"], OFF, f"policy is 'median'; accepted: {', '.join(POLICIES)}"),
        (
            ["meansim", "cumulant"],
            0.1,
            "theta is 0.1 for a head of policy cumulant; accepted: negative, only meansim has one",
        ),
    ],
)
def test_names_are_refused_in_a_sentence(names: list[str], theta: float, sentence: str) -> None:
    q, k, v = inputs(Shape(length=100))
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        torch.ops.afbs.sparse_attention(q, k, v, [0.5] * 2, [theta] * 2, [NO_SKIP] * 2, "causal", policy=names)


def test_every_policy_survives_the_operators_arguments() -> None:
    shape = Shape(length=100)
    for name in POLICIES:
        call = sparse_call(shape, 0.5, policy=name)
        assert call.of_arguments(2, call.arguments()) == call


def test_sink_window_extends_as_documented() -> None:
    shape = Shape(8192, 16, heads=1, kv_heads=1)
    q = torch.zeros(1, 1, 8192, 16)
    live = live_blocks(shape.of(q, q, q), sparse_call(shape, 0.5, policy="sink_window"))[0, 0]
    # WINDOW tokens behind the first row: 16 whole blocks of 64, and the sink.
    assert live[100].nonzero().flatten().tolist() == [0, *range(84, 101)]
    assert live[10].all(-1) == False  # noqa: E712
    assert live[10].sum() == 11


def test_groups_of_heads_keep_their_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(length=300, heads=4, kv_heads=2)
    operands = operands_of(shape, TRITON_DEVICE)
    call = sparse_call(shape, [0.9, 0.6, 0.05, 0.8], policy=MIXED)
    live = live_blocks(operands, call)
    monkeypatch.setattr(portable, "runs_triton", lambda device: True)
    monkeypatch.setattr(portable.TritonFamily, "heads_at_once", lambda *_: 2)
    out, counts = run(operands, call)
    assert torch.equal(counts, live.sum(-1, dtype=torch.int32))
    torch.testing.assert_close(out.double(), exact(operands, live, shape.blocks), atol=1e-5, rtol=0)
