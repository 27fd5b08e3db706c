"""Local keys are kept, last rows attend everything: every engine, levels and passes of calibration, the operator."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.kernels import op
from afbs_compile.kernels.blocks import live_of
from afbs_compile.kernels.call import Kept
from afbs_compile.kernels.measure import one_pass, pass_triton
from afbs_compile.kernels.measure.levels import Places, levels_of
from afbs_compile.kernels.measure.one_pass import PassPlan
from afbs_compile.kernels.policies.registry import POLICIES, UNNAMED
from afbs_compile.kernels.select import plain, triton
from afbs_compile.kernels.spec.selection import kept_blocks, live_blocks, per_head
from tests.kernels.helpers import (
    NO_SKIP,
    OFF,
    TRITON_DEVICE,
    Shape,
    dense,
    inputs,
    on,
    operands_of,
    shape_id,
    sparse_call,
    visible_blocks,
)
from tests.sweeps import slow_after

TAU = [0.3, 0.6]
SHAPES = [
    Shape(1, 16),
    Shape(64, 16),
    Shape(65, 16, mask="full"),
    Shape(300, 32, blocks=(64, 32), batch=2),
    Shape(512, 16, blocks=(128, 64)),
    Shape(777, 16, kv_heads=1),
]
KEPT = [Kept(last_rows=rows) for rows in (1, 64, 65, 200, 5000)]
KEPT += [Kept(local_keys=keys) for keys in (1, 32, 33, 64, 200, 5000)] + [Kept(64, 128)]


def always(shape: Shape, kept: Kept) -> torch.Tensor:
    """Bool ``[n_q, n_k]``: blocks that hold what is kept, key by key and row by row."""
    rows, keys = (torch.arange(shape.length).split(block) for block in shape.blocks)
    near = [[any(int(q[0]) - kept.local_keys <= int(key) < int(q[0]) for key in k) for k in keys] for q in rows]
    last = [any(int(row) >= shape.length - kept.last_rows for row in q) for q in rows]
    return torch.tensor(near) | torch.tensor(last)[:, None]


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_they_are_kept_and_the_others_are_as_before(shape: Shape, kept: Kept) -> None:
    operands = operands_of(shape)
    before = live_blocks(operands, sparse_call(shape, TAU))
    live = live_blocks(operands, sparse_call(shape, TAU, kept=kept))
    assert torch.equal(live, before | (always(shape, kept) & visible_blocks(shape)))


@pytest.mark.parametrize("kept", [Kept(last_rows=65), Kept(local_keys=40), Kept(64, 128), Kept(0, 2**31 - 1)], ids=str)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", slow_after(2, SHAPES[2:]), ids=shape_id)
def test_every_policy_and_engine_keeps_the_same(name: str, shape: Shape, kept: Kept) -> None:
    operands, visible = operands_of(shape), visible_blocks(shape)
    call = sparse_call(shape, TAU, policy=name, kept=kept)
    live = live_blocks(operands, call)
    before = live_blocks(operands, sparse_call(shape, TAU, policy=name))
    assert torch.equal(live, before | (always(shape, kept) & visible))
    places = Places(visible[None, None], kept_blocks(operands, shape.block_shape, kept), torch.zeros_like(visible))
    levels = levels_of(operands, shape.block_shape, name, places)
    assert torch.equal(levels < per_head(TAU, operands.device), live)
    assert torch.equal(live_of(plain.select(operands, call)), live)
    on_device = on(operands, TRITON_DEVICE)
    assert torch.equal(live_of(triton.select(on_device, call)).cpu(), live)
    if name == UNNAMED:
        with_theta = sparse_call(shape, TAU, 0.2, kept=kept)
        found = live_of(triton.select(on_device, with_theta)).cpu()
        assert torch.equal(found, live_blocks(operands, with_theta))


def test_last_rows_get_what_dense_attention_gives() -> None:
    shape = Shape(700, 32, kv_heads=1)
    q, k, v = inputs(shape)
    out = op.sparse_attention(q, k, v, TAU, [OFF] * 2, [NO_SKIP] * 2, "causal", last_rows=64)
    expected = dense(shape.of(q, k, v))
    torch.testing.assert_close(out[:, :, -64:], expected[:, :, -64:], rtol=1e-4, atol=1e-5)
    assert (out[:, :, 200:600] - expected[:, :, 200:600]).abs().max() > 0.1


def test_the_first_row_of_a_block_sees_the_keys_before_it() -> None:
    shape = Shape(512, 32)
    q, k, v = inputs(shape)
    k[:, :, 255], v[:, :, 255] = 2 * q[:, :, 256], 9.0  # all that row 256 asks for lies right before it
    constants = [0.0] * 2, [OFF] * 2, [NO_SKIP] * 2, "causal"
    sees = [(op.sparse_attention(q, k, v, *constants, local_keys=keys)[:, :, 256] > 8).all() for keys in (0, 1)]
    assert sees == [False, True]


@pytest.mark.parametrize("name", Kept._fields)
def test_fewer_than_none_are_refused(name: str) -> None:
    q, k, v = inputs(Shape(64, 16))
    with pytest.raises(ValueError, match=f"{name} is -1; accepted: 0 or more"):
        op.sparse_attention(q, k, v, TAU, [OFF] * 2, [NO_SKIP] * 2, "causal", **{name: -1})


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_a_pass_measures_last_rows_whole(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "triton":
        monkeypatch.setattr(one_pass, "plain_pass", pass_triton.triton_pass)
    shape = Shape(300, 32, blocks=(32, 32))
    operands = operands_of(shape)
    tau, theta = torch.tensor([[0.0, 0.5, 0.9]] * 2), torch.full((2,), OFF)
    plan = PassPlan(UNNAMED, shape.block_shape, Kept(last_rows=40))
    found = one_pass.one_pass(operands, dense(operands), tau, theta, plan)
    assert (found.live[:, 8:] == found.visible[0, 8:, None]).all()  # rows 256 to 299; 260 is the first of the last
    assert (found.difference[:, 8:] < 1e-3).all()
    assert (found.live[:, :8, 0] == 1).all()
    assert (found.difference[:, 2:8, 0] > 1).all()
