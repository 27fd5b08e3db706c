"""Local keys are kept, last rows attend everything: every engine, levels and passes of calibration, the operator."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.kernels import one_pass, op, policy, predict, predict_triton, reference
from afbs_compile.kernels.policies import lists_triton
from afbs_compile.kernels.reference import Kept
from tests.kernels.helpers import NO_SKIP, TRITON_DEVICE, Shape, dense, inputs, shape_id
from tests.sweeps import slow_after

OFF = reference.THETA_OFF
TAU = [0.3, 0.6]
SHAPES = [
    Shape(1, 16),
    Shape(64, 16),
    Shape(65, 16, causal=False),
    Shape(300, 32, block_q=64, block_k=32, batch=2),
    Shape(512, 16, block_q=128, block_k=64),
    Shape(777, 16, kv_heads=1),
]
KEPT = [Kept(last_rows=rows) for rows in (1, 64, 65, 200, 5000)]
KEPT += [Kept(local_keys=keys) for keys in (1, 32, 33, 64, 200, 5000)] + [Kept(64, 128)]


def always(shape: Shape, kept: Kept) -> torch.Tensor:
    """Bool ``[n_q, n_k]``: blocks that hold what is kept, key by key and row by row."""
    rows, keys = (torch.arange(shape.length).split(block) for block in (shape.block_q, shape.block_k))
    near = [[any(int(q[0]) - kept.local_keys <= int(key) < int(q[0]) for key in k) for k in keys] for q in rows]
    last = [any(int(row) >= shape.length - kept.last_rows for row in q) for q in rows]
    return torch.tensor(near) | torch.tensor(last)[:, None]


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_they_are_kept_and_the_others_are_as_before(shape: Shape, kept: Kept) -> None:
    q, k, _ = inputs(shape)
    before = reference.predict_mask(q, k, TAU, [OFF] * 2, **shape.call)
    live = reference.predict_mask(q, k, TAU, [OFF] * 2, kept=kept, **shape.call)
    visible = reference.visible_blocks(*shape.counts, shape.block_q, shape.block_k, shape.causal, q.device)
    assert torch.equal(live, before | (always(shape, kept) & visible))


@pytest.mark.parametrize("kept", [Kept(last_rows=65), Kept(local_keys=40), Kept(64, 128), Kept(0, 2**31 - 1)], ids=str)
@pytest.mark.parametrize("name", policy.POLICIES)
@pytest.mark.parametrize("shape", slow_after(2, SHAPES[2:]), ids=shape_id)
def test_every_policy_and_engine_keeps_the_same(name: str, shape: Shape, kept: Kept) -> None:
    q, k, _ = inputs(shape)
    call = {**shape.call, "kept": kept}
    policies = [name] * shape.heads
    live = policy.predict_mask(q, k, TAU, [OFF] * 2, policies, **call)
    before = policy.predict_mask(q, k, TAU, [OFF] * 2, policies, **shape.call)
    visible = reference.visible_blocks(*shape.counts, shape.block_q, shape.block_k, shape.causal, q.device)
    assert torch.equal(live, before | (always(shape, kept) & visible))
    levels = policy.levels(name, q, k, **call)
    assert torch.equal(levels < reference.per_head(TAU, q), live)
    on_device = q.to(TRITON_DEVICE), k.to(TRITON_DEVICE)
    scale = shape.head_dim**-0.5
    lists = lists_triton.predict_blocks(*on_device, TAU, [OFF] * 2, policies, **{**call, "scale": scale})
    assert torch.equal(predict.lists_to_mask(lists, shape.counts[1]).cpu(), live)
    if name == policy.DEFAULT:
        lists = predict_triton.predict_blocks(*on_device, TAU, [0.2] * 2, **call)
        expected = reference.predict_mask(q, k, TAU, [0.2] * 2, **call)
        assert torch.equal(predict.lists_to_mask(lists, shape.counts[1]).cpu(), expected)


def test_last_rows_get_what_dense_attention_gives() -> None:
    shape = Shape(700, 32, kv_heads=1)
    q, k, v = inputs(shape)
    out = op.sparse_attention(q, k, v, TAU, [OFF] * 2, [NO_SKIP] * 2, True, last_rows=64)
    expected = dense(q, k, v, shape)
    torch.testing.assert_close(out[:, :, -64:], expected[:, :, -64:], rtol=1e-4, atol=1e-5)
    assert (out[:, :, 200:600] - expected[:, :, 200:600]).abs().max() > 0.1


def test_the_first_row_of_a_block_sees_the_keys_before_it() -> None:
    shape = Shape(512, 32)
    q, k, v = inputs(shape)
    k[:, :, 255], v[:, :, 255] = 2 * q[:, :, 256], 9.0  # all that row 256 asks for lies right before it
    sees = [
        (op.sparse_attention(q, k, v, [0.0] * 2, [OFF] * 2, [NO_SKIP] * 2, True, local_keys=keys)[:, :, 256] > 8).all()
        for keys in (0, 1)
    ]
    assert sees == [False, True]


@pytest.mark.parametrize("name", Kept._fields)
def test_fewer_than_none_are_refused(name: str) -> None:
    q, k, v = inputs(Shape(64, 16))
    with pytest.raises(ValueError, match=f"{name} is -1; accepted: 0 or more"):
        op.sparse_attention(q, k, v, TAU, [OFF] * 2, [NO_SKIP] * 2, True, **{name: -1})


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_a_pass_measures_last_rows_whole(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "triton":
        monkeypatch.setattr(one_pass, "torch_pass", one_pass._triton_pass)
    shape = Shape(300, 32, block_q=32, block_k=32)
    q, k, v = (x[0] for x in inputs(shape))
    exact = dense(q[None], k[None], v[None], shape)[0]
    tau, theta = torch.tensor([[0.0, 0.5, 0.9]] * 2), torch.full((2,), OFF)
    found = one_pass.one_pass(q, k, v, exact, tau, theta, **shape.call, kept=Kept(last_rows=40))
    assert (found.live[:, 8:] == found.visible[8:, None]).all()  # rows 256 to 299; 260 is the first of the last
    assert (found.difference[:, 8:] < 1e-3).all()
    assert (found.live[:, :8, 0] == 1).all()
    assert (found.difference[:, 2:8, 0] > 1).all()
