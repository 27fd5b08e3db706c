"""Block selection: the Triton predictor and the CPU's fast path, against the specification."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockLists, block_count, live_of
from afbs_compile.kernels.call import KEEP_ALL, Kept, SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.select import plain, triton
from afbs_compile.kernels.spec.selection import live_blocks
from tests.kernels.helpers import (
    MASKS,
    OFF,
    TRITON_DEVICE,
    Shape,
    blocks_id,
    diagonal_blocks,
    inputs,
    operands_of,
    shape_id,
    sparse_call,
    visible_blocks,
)
from tests.sweeps import slow_after


def random_shapes(count: int) -> list[Shape]:
    """Shapes over the whole contract, the same in every run."""
    draw = random.Random(7)
    shapes = []
    for _ in range(count):
        kv_heads, groups = draw.choice([(1, 1), (1, 4), (1, 8), (2, 1), (2, 2)])
        block_k = draw.choice([32, 64])
        shapes.append(
            Shape(
                length=draw.randint(1, 450),
                head_dim=draw.choice([16, 33, 60, 64, 80, 96, 128, 256]),
                heads=kv_heads * groups,
                kv_heads=kv_heads,
                batch=2 if groups == 1 else 1,
                dtype=draw.choice([torch.float32, torch.float16, torch.bfloat16]),
                mask="causal" if draw.random() < 0.5 else "full",
                blocks=(block_k * draw.choice([1, 2]), block_k),
                layout=draw.choice(["bhnd", "bnhd", "gaps", "strided"]),
                scale=draw.choice([None, 0.3]),
            )
        )
    return shapes


def constants(heads: int, seed: int) -> tuple[list[float], list[float]]:
    """A tau and a theta for each head, all different; the last of several heads is DENSE."""
    draw = random.Random(seed)
    tau = [draw.choice([0.0, draw.uniform(0.05, 0.95), draw.uniform(0.9, 0.999)]) for _ in range(heads)]
    theta = [draw.choice([OFF, draw.uniform(0.0, 0.6)]) for _ in range(heads)]
    return ([*tau[:-1], KEEP_ALL] if heads > 1 else tau), theta


def undecided(operands: Operands, tau: list[float], theta: list[float], shape: Shape) -> Tensor:
    """Blocks whose fate fp32 rounding may decide: the selection changes when the thresholds move by 1e-5."""
    masks = [
        live_blocks(operands, sparse_call(shape, [t + a for t in tau], [t + b for t in theta]))
        for a in (-1e-5, 0.0, 1e-5)
        for b in (-1e-6, 0.0, 1e-6)
    ]
    return torch.stack(masks).any(0) & ~torch.stack(masks).all(0)


def triton_live(operands: Operands, call: SparseCall) -> Tensor:
    """What the lists of the Triton predictor name."""
    return live_of(triton.select(operands, call))


@pytest.mark.parametrize("shape", slow_after(8, random_shapes(24)), ids=shape_id)
def test_triton_selects_what_the_specification_selects(shape: Shape) -> None:
    operands = operands_of(shape, TRITON_DEVICE)
    tau, theta = constants(shape.heads, seed=shape.length)
    call = sparse_call(shape, tau, theta)
    differs = (triton_live(operands, call) != live_blocks(operands, call)) & ~undecided(operands, tau, theta, shape)
    assert not differs.any()


@pytest.mark.parametrize("together", [2, 4])
@pytest.mark.parametrize("policy", ["meansim", "meanshare", "cumulant", "sink_window"])
@pytest.mark.parametrize("select", [plain.select, triton.select], ids=["plain", "triton"])
def test_heads_that_share_a_selection_have_what_any_of_them_selects(
    select: Callable[[Operands, SparseCall], BlockLists], policy: str, together: int
) -> None:
    apart = Shape(420, heads=8, kv_heads=2, batch=2)
    shape = replace(apart, blocks=(64, 64, together))
    operands = operands_of(apart, TRITON_DEVICE if select is triton.select else "cpu")
    taus = [0.3, 0.9, 0.5, 0.6, 0.2, 0.95, 0.7, 0.8] if policy == "meansim" else [0.5 + 0.05 * h for h in range(8)]
    kept = Kept(last_rows=3, local_keys=10)
    own = live_blocks(operands, sparse_call(apart, taus, policy=policy, kept=kept))
    shared = live_blocks(operands, call := sparse_call(shape, taus, policy=policy, kept=kept))
    groups = own.unflatten(1, (-1, together))
    assert torch.equal(shared.unflatten(1, (-1, together)), groups.any(2, keepdim=True).expand_as(groups))
    if policy != "sink_window":
        assert not torch.equal(shared, own)
    lists = select(operands, call)
    assert torch.equal(live_of(lists), shared)
    check_lists(lists, operands, shape)


@pytest.mark.parametrize("select", [plain.select, triton.select], ids=["plain", "triton"])
def test_nan_in_one_head_keeps_all_blocks_of_those_that_share_its_selection(
    select: Callable[[Operands, SparseCall], BlockLists],
) -> None:
    shape = Shape(420, heads=4, kv_heads=2, blocks=(64, 64, 2))
    operands = operands_of(shape, TRITON_DEVICE if select is triton.select else "cpu")
    operands.q[0, 1, 330] = torch.nan
    visible = visible_blocks(shape)
    for policy, tau in (("meanshare", 0.7), ("meansim", 0.3)):
        live = live_of(select(operands, sparse_call(shape, tau, policy=policy))).cpu()
        assert torch.equal(live[0, :2, 5], visible[5].expand(2, -1))
        assert not torch.equal(live[0, 2:, 5], visible[5].expand(2, -1))
        assert not torch.equal(live[0, :2, 4], visible[4].expand(2, -1))


def test_some_of_the_random_selections_are_sparse() -> None:
    shares = []
    for shape in random_shapes(24):
        operands = operands_of(shape)
        live = live_blocks(operands, sparse_call(shape, *constants(shape.heads, seed=shape.length)))
        visible = live_blocks(operands, sparse_call(shape, 1.0))
        shares.append(float(live.sum() / visible.sum()))
    assert sum(share < 0.8 for share in shares) >= 10


SELECTORS = pytest.mark.parametrize("select", [plain.select, triton.select], ids=["plain", "triton"])


def check_lists(lists: BlockLists, operands: Operands, shape: Shape) -> None:
    """In range, whole blocks first, each part ascending, and whole exactly where the mask says so."""
    assert lists.whole.dtype == lists.partial.dtype == lists.indices.dtype == torch.int32
    assert ((lists.indices >= 0) & (lists.indices < shape.counts[1])).all()
    rows = operands.mask.visibility(shape.grid, operands.device)
    count_q = shape.counts[0]
    parts = zip(*(x.flatten().tolist() for x in lists[:2]), lists.indices.flatten(0, 2).tolist(), strict=True)
    for place, (whole, partial, indices) in enumerate(parts):
        first, rest = indices[:whole], indices[whole : whole + partial]
        assert first == sorted(set(first))
        assert rest == sorted(set(rest))
        mine = rows.whole[place % count_q].tolist()
        assert all(mine[block] for block in first)
        assert not any(mine[block] for block in rest)
        assert all(rows.visible[place % count_q].tolist()[block] for block in (*first, *rest))


@SELECTORS
@pytest.mark.parametrize("mask", MASKS)
def test_lists_are_ascending_and_in_range(mask: str, select: Callable[..., BlockLists]) -> None:
    shape = Shape(length=500, heads=4, blocks=(32, 32), mask=mask)
    operands = operands_of(shape, TRITON_DEVICE)
    call = sparse_call(shape, [0.3, 0.6, 0.9, 1.0], [OFF, 0.1, 0.2, OFF])
    lists = select(operands, call)
    check_lists(lists, operands, shape)
    assert torch.equal(lists.counts, live_of(lists).sum(-1, dtype=torch.int32))
    assert lists.counts.dtype == torch.int32


@SELECTORS
@pytest.mark.parametrize("length", [1, 64, 193, 256])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (64, 32)], ids=blocks_id)
@pytest.mark.parametrize("mask", MASKS)
def test_lists_name_whole_blocks_first(
    mask: str, blocks: tuple[int, int], length: int, select: Callable[..., BlockLists]
) -> None:
    shape = Shape(length, 16, heads=4, kv_heads=1, mask=mask, blocks=blocks)
    operands = operands_of(shape, TRITON_DEVICE)
    by_rule = ["meansim", "cumulant", "sink_window", "meansim"]  # mass, share, strength; the last head keeps all
    lists = select(operands, sparse_call(shape, [0.4, 0.4, 0.05, 1.0], policy=by_rule))
    check_lists(lists, operands, shape)
    visible, whole, _ = operands.mask.visibility(shape.grid, operands.device)
    assert torch.equal(lists.whole[0, 3].long(), (visible & whole).sum(-1))
    assert torch.equal(lists.partial[0, 3].long(), (visible & ~whole).sum(-1))
    if mask == "causal":
        assert (lists.partial > 0).all(), "a row sees nothing after itself"
    else:
        assert int(lists.partial[0, 3].sum()) == (0 if length % blocks[1] == 0 else shape.counts[0])


@pytest.mark.parametrize("shape", slow_after(8, random_shapes(24)), ids=shape_id)
@pytest.mark.parametrize("theta", [OFF, 0.2], ids=["theta-off", "theta-on"])
def test_the_cpu_selects_what_the_specification_selects(shape: Shape, theta: float) -> None:
    operands = operands_of(shape)
    tau, thetas = constants(shape.heads, seed=shape.length)[0], [theta] * shape.heads
    call = sparse_call(shape, tau, thetas)
    differs = live_of(plain.select(operands, call)) != live_blocks(operands, call)
    assert not (differs & ~undecided(operands, tau, thetas, shape)).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("poisoned", ["q", "k"])
def test_the_cpu_treats_blocks_that_are_not_finite_as_the_specification_does(poisoned: str, value: float) -> None:
    shape = Shape(length=520, heads=4, kv_heads=2, batch=2)
    q, k, v = inputs(shape)
    (q if poisoned == "q" else k)[1, 1, 200] = value
    operands, call = shape.of(q, k, v), sparse_call(shape, 0.3)
    assert torch.equal(live_of(plain.select(operands, call)), live_blocks(operands, call))


def test_the_cpu_lists_what_the_specification_selects() -> None:
    shape = Shape(length=500, heads=4, kv_heads=2, batch=2)
    operands, call = operands_of(shape), sparse_call(shape, 0.4, 0.1)
    assert torch.equal(live_of(plain.select(operands, call)), live_blocks(operands, call))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads_tau", [[0.0, 1.0]], ids=["tau0-and-tau1"])
def test_tau_zero_keeps_the_diagonal_and_tau_one_keeps_all(mask: str, heads_tau: list[float]) -> None:
    shape = Shape(length=600, blocks=(64, 32), mask=mask)
    live = triton_live(operands_of(shape, TRITON_DEVICE), sparse_call(shape, heads_tau))
    visible = visible_blocks(shape, TRITON_DEVICE)
    assert torch.equal(live[0, 0], visible & diagonal_blocks(shape, TRITON_DEVICE))
    assert torch.equal(live[0, 1], visible)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, -6e4], ids=["zeros", "ones", "1e4", "-6e4"])
def test_equally_probable_blocks_stay_or_go_together(value: float) -> None:
    shape = Shape(length=640, heads=2, dtype=torch.float16, mask="full")
    q, _, v = inputs(shape, TRITON_DEVICE)
    k = torch.full_like(q, value)
    q[..., 1:] = 0.0  # one product a score: no rounding can tell the blocks apart
    # Each of ten blocks has probability 0.1 and none is more probable than another: nothing precedes any of them.
    assert triton_live(shape.of(q, k, v), sparse_call(shape, [0.05, 0.95])).all()


@pytest.mark.parametrize("poisoned", ["q", "k"])
def test_nan_keeps_blocks_of_its_own_head_only(poisoned: str) -> None:
    shape = Shape(length=512, heads=4, kv_heads=2, batch=2)
    operands, call = operands_of(shape, TRITON_DEVICE), sparse_call(shape, 0.3)
    clean = triton_live(operands, call)
    (operands.q if poisoned == "q" else operands.k)[1, 1, 200] = torch.nan
    live = triton_live(operands, call)
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[1, [1] if poisoned == "q" else [2, 3]] = True
    assert torch.equal(live[~touched], clean[~touched])
    assert torch.equal(live, live_blocks(operands, call))
    # Token 200 lies in block 3. As a query it keeps all that its block sees; as a key it is seen by all who may.
    kept = live[touched][:, 3, :4] if poisoned == "q" else live[touched][:, 3:, 3]
    assert kept.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scores_that_overflow_keep_the_row(dtype: torch.dtype) -> None:
    shape = Shape(length=320, dtype=dtype, mask="full")
    operands, call = operands_of(shape, TRITON_DEVICE), sparse_call(shape, 0.3)
    operands.q[:, :, 64:128] = operands.k[:, :, 128:192] = 1e25
    live = triton_live(operands, call)
    assert torch.equal(live, live_blocks(operands, call))
    assert live[:, :, 1].all()
    assert not live.all()


@pytest.mark.parametrize("select", [live_blocks, triton_live], ids=["specification", "triton"])
def test_a_later_token_changes_no_selection_of_earlier_query_blocks(select: Callable[..., Tensor]) -> None:
    shape = Shape(length=700, heads=2, blocks=(64, 32))
    operands, call = operands_of(shape, TRITON_DEVICE), sparse_call(shape, [0.5, 0.8], [OFF, 0.1])
    before = select(operands, call)
    changed = 450  # inside query block 7
    for x, seed in ((operands.q, 5), (operands.k, 6)):
        x[:, :, changed:] = 30 * inputs(shape, TRITON_DEVICE, seed)[0][:, :, changed:]
    after = select(operands, call)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.equal(before[:, :, 7:], after[:, :, 7:])


def test_selection_is_deterministic() -> None:
    shape = Shape(length=400, heads=2, dtype=torch.bfloat16)
    operands, call = operands_of(shape, TRITON_DEVICE), sparse_call(shape, [0.5, 0.7], [0.1, OFF])
    first, second = (triton.select(operands, call) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_hundreds_of_key_blocks() -> None:
    shape = Shape(length=4900, head_dim=16, heads=1, kv_heads=1, blocks=(128, 16))
    operands, call = operands_of(shape, TRITON_DEVICE), sparse_call(shape, 0.6)
    differs = triton_live(operands, call) != live_blocks(operands, call)
    assert not (differs & ~undecided(operands, [0.6], [OFF], shape)).any()


@pytest.mark.parametrize(("batch", "length"), [(0, 100), (2, 0)], ids=["batch0", "length0"])
def test_nothing_to_select(batch: int, length: int) -> None:
    shape = Shape(length)
    q = torch.zeros(batch, 2, length, 64, device=TRITON_DEVICE)
    lists = triton.select(shape.of(q, q, q), sparse_call(shape, 0.5))
    assert lists.whole.shape == lists.partial.shape == (batch, 2, block_count(length, 64))
    assert lists.indices.numel() == 0
