"""Policies: each against its formula in float64, Triton against PyTorch, causality, NaN, and heads that differ."""

from __future__ import annotations

import math
import random
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels import op, policy, predict, reference
from afbs_compile.kernels.policies import base, lists_triton
from afbs_compile.kernels.policies.select_triton import odds_of
from afbs_compile.kernels.policies.sink_window import WINDOW
from afbs_compile.recipe import Policy
from tests.kernels.helpers import NO_SKIP, TRITON_DEVICE, Shape, exact, inputs, shape_id
from tests.sweeps import slow_after

OFF = reference.THETA_OFF
CAUSAL_AND_FULL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
EACH_POLICY = pytest.mark.parametrize("name", policy.POLICIES)
GROUP = 16


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


def formula(name: str, q: Tensor, k: Tensor, shape: Shape) -> Tensor:
    """Probability (strength for ``sink_window``) of every block in float64, written as the documentation says it."""
    keys, scale = full_heads(k, q), shape.scale or shape.head_dim**-0.5
    per_q, per_k = shape.block_q // GROUP, shape.block_k // GROUP
    count_q, count_k = shape.counts
    visible = reference.visible_blocks(count_q, count_k, shape.block_q, shape.block_k, shape.causal, q.device)
    if name in ("meansim", "meanshare"):
        means = [
            torch.stack([p.mean(2) for p in x.double().split(b, 2)], 2)
            for x, b in ((q, shape.block_q), (keys, shape.block_k))
        ]
        return (means[0] @ means[1].transpose(-1, -2) * scale).masked_fill(~visible, -math.inf).softmax(-1)
    if name == "sink_window":
        strength = torch.empty(count_q, count_k, dtype=torch.float64, device=q.device)
        for i in range(count_q):
            for j in range(count_k):
                gaps = [
                    abs(r - c)
                    for r in (i * shape.block_q, (i + 1) * shape.block_q - 1)
                    for c in (j * shape.block_k, (j + 1) * shape.block_k - 1)
                ]
                strength[i, j] = math.inf if j == 0 else WINDOW / max(1, min(gaps))
        return strength.expand(*q.shape[:2], -1, -1)
    group = torch.arange(-(-shape.length // GROUP), device=q.device)
    seen = (
        (group <= group[:, None])
        if shape.causal
        else torch.ones(len(group), len(group), dtype=torch.bool, device=q.device)
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
        logits = scale * mean_q @ mean_k.mT + scale**2 / 2 * mean_q.square() @ var_k.mT
        return from_groups(logits, seen, per_q, per_k)
    assert name == "vertical_slash"
    token = torch.arange(shape.length, device=q.device)
    seen = (
        (token <= token[::GROUP, None])
        if shape.causal
        else torch.ones(len(group), shape.length, dtype=torch.bool, device=q.device)
    )
    mass = from_groups(q.double()[:, :, ::GROUP] @ keys.mT * scale, seen, per_q, shape.block_k)
    total, step = mass.clone(), shape.block_q // shape.block_k
    for i in range(1, count_q):
        for j in range(count_k):
            total[:, :, i, j] += mass[:, :, i - 1, j] / 2
            if j >= step:
                total[:, :, i, j] += mass[:, :, i - 1, j - step] / 2
    total = total.masked_fill(~visible, 0.0)
    return total / total.sum(-1, keepdim=True)


def live_at(name: str, probability: Tensor, tau: float, shape: Shape) -> Tensor:
    """The selection of the policy's rule, block by block."""
    rule = policy.policy_named(name).rule
    visible = reference.visible_blocks(*shape.counts, shape.block_q, shape.block_k, shape.causal, probability.device)
    diagonal = reference.diagonal_blocks(*shape.counts, shape.block_q, shape.block_k, probability.device)
    if rule == "mass":
        before = torch.where(probability[..., None, :] > probability[..., None], probability[..., None, :], 0.0).sum(-1)
        chosen = before < tau
    else:
        strength = probability * visible.sum(-1, keepdim=True).sqrt() if rule == "share" else probability
        chosen = strength > odds_of(tau)
    return visible & (chosen | diagonal | torch.full_like(chosen, tau >= 1))


def undecided(name: str, level: Tensor, tau: Tensor) -> Tensor:
    """Blocks whose fate rounding may decide."""
    return (level - tau).abs() < 1e-5


SHAPES = [
    Shape(length=333, head_dim=33, heads=4, kv_heads=2, batch=2, layout="gaps"),
    Shape(length=300, heads=2, kv_heads=1, block_q=128, block_k=64, causal=False, layout="strided"),
    Shape(length=512, head_dim=80, heads=1, kv_heads=1, block_q=128, block_k=128, dtype=torch.bfloat16),
    Shape(length=90, head_dim=16, block_q=32, block_k=16, dtype=torch.float16, scale=0.3, layout="bnhd"),
    Shape(length=5, head_dim=64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@EACH_POLICY
def test_scores_are_the_documented_formula(name: str, shape: Shape) -> None:
    q, k, _ = inputs(shape)
    scale = shape.scale or shape.head_dim**-0.5
    scores = policy.policy_named(name).scores(q, k, **{**shape.call, "scale": scale})
    visible = reference.visible_blocks(*shape.counts, shape.block_q, shape.block_k, shape.causal, q.device)
    truth = formula(name, q, k, shape)
    came = scores.exp() if name == "sink_window" else base.softmax(scores, visible)
    assert came.dtype == torch.float32
    torch.testing.assert_close(
        came.double().masked_fill(~visible, 0), truth.masked_fill(~visible, 0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.6, 0.9, 0.99, 1.0])
@EACH_POLICY
def test_levels_are_the_taus_from_which_blocks_are_live(name: str, tau: float) -> None:
    shape = Shape(length=900, heads=4, kv_heads=2, block_q=64, block_k=32)
    q, k, _ = inputs(shape)
    level = policy.levels(name, q, k, **shape.call)
    expected = live_at(name, formula(name, q, k, shape), tau, shape)
    differs = ((level < tau) != expected) & ~undecided(name, level, torch.tensor(tau))
    assert not differs.any()
    if tau == 0.99 and name != "sink_window":
        assert 0.3 < float(expected.sum() / live_at(name, formula(name, q, k, shape), 1.0, shape).sum()) <= 1.0


EACH_THETA = pytest.mark.parametrize("theta", [[0.35, 0.4, 0.45, OFF], [0.4] * 4], ids=["each its own", "one for all"])


@EACH_THETA
def test_levels_of_meansim_with_theta_are_the_reference_mask(theta: list[float]) -> None:
    shape = Shape(length=700, heads=4, kv_heads=2, batch=2)
    q, k, _ = inputs(shape)
    tau = [0.3, 0.4, 0.2, 0.6]
    mask = policy.levels("meansim", q, k, theta, **shape.call) < reference.per_head(tau, q)
    assert torch.equal(mask, reference.predict_mask(q, k, tau, theta, **shape.call))
    assert mask.float().mean() < 0.5
    kept = (mask & ~reference.predict_mask(q, k, tau, [OFF] * 4, **shape.call)).any(-1).any(-1).any(0)
    assert kept.tolist() == [limit > OFF for limit in theta], "theta must matter"


@EACH_THETA
def test_levels_of_some_query_blocks_are_those_of_all(theta: list[float]) -> None:
    shape = Shape(length=700, heads=4, kv_heads=2, batch=2)
    q, k, _ = inputs(shape)
    level = policy.levels("meansim", q, k, theta, **shape.call)
    rows, blocks = torch.tensor([3, 4, 9]), reference.block_count(700, 64)
    visible = reference.visible_blocks(blocks, blocks, 64, 64, True, q.device)[rows]
    diagonal = reference.diagonal_blocks(blocks, blocks, 64, 64, q.device)[rows]
    some = policy.levels("meansim", q, k, theta, **shape.call, places=(visible, diagonal), rows=rows)
    assert torch.equal(some, level[:, :, rows])


@EACH_POLICY
def test_levels_on_triton_are_the_levels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(length=300, heads=4, kv_heads=2, batch=2, block_q=64, block_k=32)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    theta = [0.0, 0.02, 0.3, OFF] if name == "meansim" else None
    expected = policy.levels(name, q.cpu(), k.cpu(), theta, **shape.call)
    monkeypatch.setattr(policy, "_scored_by_torch", policy.scored_by_triton)
    came = policy.levels(name, q, k, theta, **shape.call).cpu()
    torch.testing.assert_close(came, expected, atol=1e-5, rtol=0)


def triton_mask(name: str, q: Tensor, k: Tensor, tau: list[float], shape: Shape) -> Tensor:
    lists = lists_triton.predict_blocks(q, k, tau, [OFF] * len(tau), [name] * len(tau), **call_of(shape))
    for counts, rows in zip(lists.counts.flatten().tolist(), lists.indices.flatten(0, 2).tolist(), strict=True):
        assert rows[:counts] == sorted(set(rows[:counts]))
    return predict.lists_to_mask(lists, shape.counts[1])


def call_of(shape: Shape) -> dict[str, Any]:
    return {**shape.call, "scale": shape.scale or shape.head_dim**-0.5}


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
                causal=draw.random() < 0.5,
                block_q=block_k * draw.choice([1, 2]),
                block_k=block_k,
                layout=draw.choice(["bhnd", "bnhd", "gaps", "strided"]),
                scale=draw.choice([None, 0.3]),
            )
        )
    return [
        *shapes,
        Shape(length=1700, head_dim=16, heads=1, kv_heads=1),
        Shape(length=600, heads=1, kv_heads=1, block_q=128, block_k=128),
    ]


@pytest.mark.parametrize("shape", slow_after(3, random_shapes(6)), ids=shape_id)
@EACH_POLICY
def test_triton_selects_what_the_reference_selects(name: str, shape: Shape) -> None:
    q, k, _ = inputs(shape, TRITON_DEVICE)
    tau = [0.85 if h % 2 else 0.6 for h in range(shape.heads)]
    level = policy.levels(name, q.cpu(), k.cpu(), **shape.call).to(q.device)
    limits = reference.per_head(tau, q)
    differs = (triton_mask(name, q, k, tau, shape) != (level < limits)) & ~undecided(name, level, limits)
    assert not differs.any()


@CAUSAL_AND_FULL
@EACH_POLICY
def test_tau_zero_keeps_the_diagonal_and_tau_one_keeps_all(name: str, causal: bool) -> None:
    shape = Shape(length=300, block_q=64, block_k=32, causal=causal)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    visible = reference.visible_blocks(*shape.counts, 64, 32, causal, q.device)
    diagonal = visible & reference.diagonal_blocks(*shape.counts, 64, 32, q.device)
    for mask in (
        triton_mask(name, q, k, [0.0, 1.0], shape),
        policy.predict_mask(q.cpu(), k.cpu(), [0.0, 1.0], [OFF] * 2, [name] * 2, **shape.call),
    ):
        assert torch.equal(mask[0, 0].cpu(), diagonal.cpu())
        assert torch.equal(mask[0, 1].cpu(), visible.cpu())


@pytest.mark.parametrize("triton", [False, True], ids=["reference", "triton"])
@EACH_POLICY
def test_a_later_token_changes_no_score_of_earlier_query_blocks(name: str, triton: bool) -> None:
    shape = Shape(length=700, block_q=64, block_k=32)
    q, k, _ = inputs(shape, TRITON_DEVICE if triton else "cpu")
    visible = reference.visible_blocks(*shape.counts, 64, 32, True, q.device)
    call = call_of(shape)

    def levels() -> Tensor:
        """Finer than a selection: any change of a score shows."""
        chosen = policy.policy_named(name)
        if triton:
            scores = torch.empty(1, 2, *shape.counts, dtype=torch.int32, device=q.device)
            chosen.write_scores(q, k, scores, **call)
            scores = scores.view(torch.float32)
        else:
            scores = chosen.scores(q, k, **call)
        return base.levels(scores.masked_fill(~visible, 0.0), chosen.rule, visible).masked_fill(~visible, 0.0)

    before = levels()
    changed = 450  # inside query block 7
    for x, seed in ((q, 5), (k, 6)):
        x[:, :, changed:] = 30 * inputs(shape, q.device.type, seed)[0][:, :, changed:]
    after = levels()
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert torch.equal(before[:, :, 7:], after[:, :, 7:]) == (name == "sink_window")


@pytest.mark.parametrize("poisoned", ["q", "k"])
@pytest.mark.parametrize("name", slow_after(2, [name for name in policy.POLICIES if name != "sink_window"]))
def test_nan_keeps_blocks_of_its_own_head_only(name: str, poisoned: str) -> None:
    shape = Shape(length=320, heads=4, kv_heads=2, batch=2)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    tau = [0.3] * 4
    clean = triton_mask(name, q, k, tau, shape)
    (q if poisoned == "q" else k)[1, 1, 128] = torch.nan  # the first row of block 2: a probed one
    mask = triton_mask(name, q, k, tau, shape)
    expected = policy.predict_mask(q.cpu(), k.cpu(), tau, [OFF] * 4, [name] * 4, **shape.call)
    assert torch.equal(mask.cpu(), expected)
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[1, [1] if poisoned == "q" else [2, 3]] = True
    assert torch.equal(mask[~touched], clean[~touched])
    kept = mask[touched][:, 2, :3] if poisoned == "q" else mask[touched][:, 2:, 2]
    assert kept.all()


@pytest.mark.parametrize("triton", [False, True], ids=["reference", "triton"])
@pytest.mark.parametrize("name", [name for name in policy.POLICIES if name != "sink_window"])
def test_scores_that_overflow_keep_the_row(name: str, triton: bool) -> None:
    shape = Shape(length=320, causal=False)
    q, k, _ = inputs(shape, TRITON_DEVICE if triton else "cpu")
    q[:, :, 64:128] = k[:, :, 128:192] = 1e25
    if triton:
        mask = triton_mask(name, q, k, [0.3, 0.3], shape)
    else:
        mask = policy.predict_mask(q, k, [0.3, 0.3], [OFF] * 2, [name] * 2, **shape.call)
    assert mask[:, :, 1].all()
    assert not mask.all()


def test_selection_is_deterministic() -> None:
    shape = Shape(length=400, heads=len(policy.POLICIES), kv_heads=1, dtype=torch.bfloat16)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    arguments = (q, k, [0.8] * shape.heads, [OFF] * shape.heads, policy.POLICIES)
    first, second = (lists_triton.predict_blocks(*arguments, **call_of(shape)) for _ in range(2))
    assert torch.equal(first.counts, second.counts)
    assert torch.equal(first.indices, second.indices)


MIXED = ["cumulant", "meansim", "sink_window", "cumulant"]


@pytest.mark.parametrize("triton", [False, True], ids=["reference", "triton"])
def test_heads_may_differ(triton: bool) -> None:
    shape = Shape(length=400, heads=4, kv_heads=2, batch=2, layout="bnhd")
    q, k, _ = inputs(shape, TRITON_DEVICE if triton else "cpu")
    tau, theta = [0.8, 0.6, 0.05, 0.9], [OFF, 0.02, OFF, OFF]

    def select(q: Tensor, k: Tensor, mine: slice) -> Tensor:
        if triton:
            lists = lists_triton.predict_blocks(q, k, tau[mine], theta[mine], MIXED[mine], **call_of(shape))
            return predict.lists_to_mask(lists, shape.counts[1])
        return policy.predict_mask(q, k, tau[mine], theta[mine], MIXED[mine], **shape.call)

    together = select(q, k, slice(None))
    for h in range(4):
        assert torch.equal(together[:, h : h + 1], select(q[:, h : h + 1], k[:, h // 2][:, None], slice(h, h + 1)))
    assert len({int(together[:, h].sum()) for h in range(4)}) > 2


def test_the_operator_runs_policies() -> None:
    shape = Shape(length=400, heads=4, kv_heads=2, batch=2, layout="bnhd")
    q, k, v = inputs(shape)
    tau, theta, lam = [0.8, 0.6, 0.05, 0.7], [OFF, 0.02, OFF, OFF], [NO_SKIP] * 4
    live = policy.predict_mask(q, k, tau, theta, MIXED, **shape.call)
    out = torch.ops.afbs.sparse_attention(q, k, v, tau, theta, lam, True, policy=MIXED)
    torch.testing.assert_close(out.double(), exact(q, k, v, live, shape), atol=1e-5, rtol=0)
    _, counts = op.sparse_attention_with_counts(q, k, v, tau, theta, lam, causal=True, policy=MIXED)
    assert torch.equal(counts, live.sum(-1, dtype=torch.int32))
    unnamed = torch.ops.afbs.sparse_attention(q, k, v, tau, theta, lam, True)
    assert torch.equal(unnamed, torch.ops.afbs.sparse_attention(q, k, v, tau, theta, lam, True, policy=["meansim"] * 4))
    assert not torch.equal(unnamed, out)


class Model(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        constants = ([0.8, 0.6, 0.05, 0.7], [OFF] * 4, [NO_SKIP] * 4)
        return torch.ops.afbs.sparse_attention(q * 2, k, v, *constants, True, policy=MIXED) + 1


def test_names_survive_opcheck_compile_and_export(tmp_path: Any) -> None:
    q, k, v = inputs(Shape(length=200, heads=4, kv_heads=2))
    constants = ([0.8, 0.6, 0.05, 0.7], [OFF] * 4, [NO_SKIP] * 4, True)
    torch.library.opcheck(torch.ops.afbs.sparse_attention.default, (q, k, v, *constants), {"policy": MIXED})
    expected = Model()(q, k, v)
    torch.testing.assert_close(torch.compile(Model(), fullgraph=True)(q, k, v), expected)
    torch.export.save(torch.export.export(Model(), (q, k, v)), tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(q, k, v), expected)


@pytest.mark.parametrize(
    ("names", "theta", "sentence"),
    [
        (["meansim"], OFF, "policy has 1 names; accepted: one for each of the 2 query heads"),
        (["meansim", "median"], OFF, f"policy is 'median'; accepted: {', '.join(policy.POLICIES)}"),
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
        torch.ops.afbs.sparse_attention(q, k, v, [0.5] * 2, [theta] * 2, [NO_SKIP] * 2, True, policy=names)


def test_recipes_know_every_policy() -> None:
    assert get_args(Policy) == policy.POLICIES


def test_sink_window_extends_as_documented() -> None:
    q = torch.zeros(1, 1, 8192, 16)
    live = policy.predict_mask(q, q, [0.5], [OFF], ["sink_window"], causal=True, block_q=64, block_k=64)[0, 0]
    # WINDOW tokens behind the first row: 16 whole blocks of 64, and the sink.
    assert live[100].nonzero().flatten().tolist() == [0, *range(84, 101)]
    assert live[10].all(-1) == False  # noqa: E712
    assert live[10].sum() == 11


def test_groups_of_heads_keep_their_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(length=300, heads=4, kv_heads=2)
    q, k, v = inputs(shape, TRITON_DEVICE)
    tau, theta = [0.9, 0.6, 0.05, 0.8], [OFF] * 4
    live = policy.predict_mask(q, k, tau, theta, MIXED, **shape.call)
    monkeypatch.setattr(op, "engine_name", lambda device: "triton")
    monkeypatch.setattr(op, "heads_at_once", lambda *_: 2)
    out, counts = op.sparse_attention_with_counts(q, k, v, tau, theta, [NO_SKIP] * 4, causal=True, policy=MIXED)
    assert torch.equal(counts, live.sum(-1, dtype=torch.int32))
    torch.testing.assert_close(out.double(), exact(q, k, v, live, shape), atol=1e-5, rtol=0)
