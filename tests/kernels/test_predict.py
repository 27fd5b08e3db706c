"""Block selection: the Triton predictor and the lists, against ``reference.predict_mask``."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels import predict, predict_triton, reference
from tests.kernels.helpers import TRITON_DEVICE, Shape, inputs, shape_id, some_blocks
from tests.sweeps import slow_after

OFF = reference.THETA_OFF


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
                causal=draw.random() < 0.5,
                block_q=block_k * draw.choice([1, 2]),
                block_k=block_k,
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
    return ([*tau[:-1], reference.KEEP_ALL] if heads > 1 else tau), theta


def undecided(q: Tensor, k: Tensor, tau: list[float], theta: list[float], shape: Shape) -> Tensor:
    """Blocks whose fate fp32 rounding may decide: the selection changes when the thresholds move by 1e-5."""
    masks = [
        reference.predict_mask(q, k, [t + a for t in tau], [t + b for t in theta], **shape.call)
        for a in (-1e-5, 0.0, 1e-5)
        for b in (-1e-6, 0.0, 1e-6)
    ]
    return torch.stack(masks).any(0) & ~torch.stack(masks).all(0)


def predict_on_triton(
    q: Tensor, k: Tensor, tau: list[float], theta: list[float], shape: Shape
) -> tuple[predict.BlockLists, Tensor]:
    """The lists of the Triton predictor, and their mask."""
    lists = predict_triton.predict_blocks(q, k, tau, theta, **shape.call)
    return lists, predict.lists_to_mask(lists, shape.counts[1])


@pytest.mark.parametrize("shape", slow_after(8, random_shapes(24)), ids=shape_id)
def test_triton_selects_what_the_reference_selects(shape: Shape) -> None:
    q, k, _ = inputs(shape, TRITON_DEVICE)
    tau, theta = constants(shape.heads, seed=shape.length)
    expected = reference.predict_mask(q, k, tau, theta, **shape.call)
    _, mask = predict_on_triton(q, k, tau, theta, shape)
    differs = (mask != expected) & ~undecided(q, k, tau, theta, shape)
    assert not differs.any()


def test_some_of_the_random_selections_are_sparse() -> None:
    shares = []
    for shape in random_shapes(24):
        q, k, _ = inputs(shape)
        live = reference.predict_mask(q, k, *constants(shape.heads, seed=shape.length), **shape.call)
        visible = reference.predict_mask(q, k, [1.0] * shape.heads, [OFF] * shape.heads, **shape.call)
        shares.append(float(live.sum() / visible.sum()))
    assert sum(share < 0.8 for share in shares) >= 10


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_lists_are_ascending_and_in_range(causal: bool) -> None:
    shape = Shape(length=500, heads=4, block_q=32, block_k=32, causal=causal)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    lists, mask = predict_on_triton(q, k, [0.3, 0.6, 0.9, 1.0], [OFF, 0.1, 0.2, OFF], shape)
    assert lists.counts.dtype == lists.indices.dtype == torch.int32
    assert ((lists.indices >= 0) & (lists.indices < shape.counts[1])).all()
    assert torch.equal(lists.counts, mask.sum(-1, dtype=torch.int32))
    for counts, rows in zip(lists.counts.flatten().tolist(), lists.indices.flatten(0, 2).tolist(), strict=True):
        assert rows[:counts] == sorted(set(rows[:counts]))


def test_lists_and_masks_convert_into_each_other() -> None:
    live = some_blocks(Shape(length=1000, heads=3, batch=2, block_q=64, block_k=32, causal=False))
    live[0, 0, 0] = False
    lists = predict.mask_to_lists(live)
    assert torch.equal(predict.lists_to_mask(lists, live.shape[-1]), live)
    assert lists.indices[1, 2, 3, : lists.counts[1, 2, 3]].tolist() == live[1, 2, 3].nonzero().flatten().tolist()


@pytest.mark.parametrize("shape", slow_after(8, random_shapes(24)), ids=shape_id)
@pytest.mark.parametrize("theta", [OFF, 0.2], ids=["theta-off", "theta-on"])
def test_the_cpu_selects_what_the_reference_selects(shape: Shape, theta: float) -> None:
    q, k, _ = inputs(shape)
    tau = constants(shape.heads, seed=shape.length)[0]
    constants_of_call = tau, [theta] * shape.heads
    mask = predict.predict_mask(q, k, *constants_of_call, **shape.call)
    expected = reference.predict_mask(q, k, *constants_of_call, **shape.call)
    assert not ((mask != expected) & ~undecided(q, k, *constants_of_call, shape)).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("poisoned", ["q", "k"])
def test_the_cpu_treats_blocks_that_are_not_finite_as_the_reference_does(poisoned: str, value: float) -> None:
    shape = Shape(length=520, heads=4, kv_heads=2, batch=2)
    q, k, _ = inputs(shape)
    (q if poisoned == "q" else k)[1, 1, 200] = value
    call = ([0.3] * 4, [OFF] * 4)
    assert torch.equal(
        predict.predict_mask(q, k, *call, **shape.call), reference.predict_mask(q, k, *call, **shape.call)
    )


def test_predict_blocks_on_the_cpu_lists_the_reference_mask() -> None:
    shape = Shape(length=500, heads=4, kv_heads=2, batch=2)
    q, k, _ = inputs(shape)
    lists = predict.predict_blocks(q, k, [0.4] * 4, [0.1] * 4, **shape.call)
    expected = reference.predict_mask(q, k, [0.4] * 4, [0.1] * 4, **shape.call)
    assert torch.equal(predict.lists_to_mask(lists, shape.counts[1]), expected)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads_tau", [[0.0, 1.0]], ids=["tau0-and-tau1"])
def test_tau_zero_keeps_the_diagonal_and_tau_one_keeps_all(causal: bool, heads_tau: list[float]) -> None:
    shape = Shape(length=600, block_q=64, block_k=32, causal=causal)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    _, mask = predict_on_triton(q, k, heads_tau, [OFF, OFF], shape)
    device = torch.device(TRITON_DEVICE)
    visible = reference.visible_blocks(*shape.counts, 64, 32, causal, device)
    assert torch.equal(mask[0, 0], visible & reference.diagonal_blocks(*shape.counts, 64, 32, device))
    assert torch.equal(mask[0, 1], visible)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, -6e4], ids=["zeros", "ones", "1e4", "-6e4"])
def test_equally_probable_blocks_stay_or_go_together(value: float) -> None:
    shape = Shape(length=640, heads=2, dtype=torch.float16, causal=False)
    q, _, _ = inputs(shape, TRITON_DEVICE)
    k = torch.full_like(q, value)
    q[..., 1:] = 0.0  # one product a score: no rounding can tell the blocks apart
    # Each of ten blocks has probability 0.1 and none is more probable than another: nothing precedes any of them.
    _, mask = predict_on_triton(q, k, [0.05, 0.95], [OFF, OFF], shape)
    assert mask.all()


@pytest.mark.parametrize("poisoned", ["q", "k"])
def test_nan_keeps_blocks_of_its_own_head_only(poisoned: str) -> None:
    shape = Shape(length=512, heads=4, kv_heads=2, batch=2)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    tau, theta = [0.3] * 4, [OFF] * 4
    _, clean = predict_on_triton(q, k, tau, theta, shape)
    (q if poisoned == "q" else k)[1, 1, 200] = torch.nan
    _, mask = predict_on_triton(q, k, tau, theta, shape)
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[1, [1] if poisoned == "q" else [2, 3]] = True
    assert torch.equal(mask[~touched], clean[~touched])
    expected = reference.predict_mask(q, k, tau, theta, **shape.call)
    assert torch.equal(mask, expected)
    # Token 200 lies in block 3. As a query it keeps all that its block sees; as a key it is seen by all who may.
    kept = mask[touched][:, 3, :4] if poisoned == "q" else mask[touched][:, 3:, 3]
    assert kept.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scores_that_overflow_keep_the_row(dtype: torch.dtype) -> None:
    shape = Shape(length=320, dtype=dtype, causal=False)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    q[:, :, 64:128] = k[:, :, 128:192] = 1e25
    _, mask = predict_on_triton(q, k, [0.3, 0.3], [OFF, OFF], shape)
    assert torch.equal(mask, reference.predict_mask(q, k, [0.3, 0.3], [OFF, OFF], **shape.call))
    assert mask[:, :, 1].all()
    assert not mask.all()


@pytest.mark.parametrize("triton", [False, True], ids=["reference", "triton"])
def test_a_later_token_changes_no_selection_of_earlier_query_blocks(triton: bool) -> None:
    shape = Shape(length=700, heads=2, block_q=64, block_k=32)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    select = predict_on_triton if triton else lambda *a: (None, reference.predict_mask(*a[:-1], **a[-1].call))
    tau, theta = [0.5, 0.8], [OFF, 0.1]
    _, before = select(q, k, tau, theta, shape)
    changed = 450  # inside query block 7
    for x, seed in ((q, 5), (k, 6)):
        x[:, :, changed:] = 30 * inputs(shape, TRITON_DEVICE, seed)[0][:, :, changed:]
    _, after = select(q, k, tau, theta, shape)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.equal(before[:, :, 7:], after[:, :, 7:])


def test_selection_is_deterministic() -> None:
    shape = Shape(length=400, heads=2, dtype=torch.bfloat16)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    first, second = (predict_on_triton(q, k, [0.5, 0.7], [0.1, OFF], shape)[0] for _ in range(2))
    assert torch.equal(first.counts, second.counts)
    assert torch.equal(first.indices, second.indices)


def test_hundreds_of_key_blocks() -> None:
    shape = Shape(length=4900, head_dim=16, heads=1, kv_heads=1, block_q=128, block_k=16)
    q, k, _ = inputs(shape, TRITON_DEVICE)
    _, mask = predict_on_triton(q, k, [0.6], [OFF], shape)
    expected = reference.predict_mask(q, k, [0.6], [OFF], **shape.call)
    assert not ((mask != expected) & ~undecided(q, k, [0.6], [OFF], shape)).any()


@pytest.mark.parametrize(("batch", "length"), [(0, 100), (2, 0)], ids=["batch0", "length0"])
def test_nothing_to_predict(batch: int, length: int) -> None:
    q = torch.zeros(batch, 2, length, 64, device=TRITON_DEVICE)
    lists = predict_triton.predict_blocks(q, q, [0.5] * 2, [OFF] * 2, causal=True)
    assert lists.counts.shape == (batch, 2, reference.block_count(length, 64))
    assert lists.indices.numel() == 0
