"""The policies in standard operators against the torch operator's own."""

from __future__ import annotations

from dataclasses import replace
from itertools import starmap

import pytest
import torch

from afbs_compile.export.onnx import OPSETS, attributes
from afbs_compile.export.onnx_predict import policy_codes
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import Kept
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.op import arguments_of
from tests.export.test_onnx_function import (
    DOMAIN,
    EACH_MASK,
    FLOAT,
    HALF,
    SCALE,
    attention,
    call_of,
    expected_mask,
    onnx,
    operands,
    predictor,
    run,
    session_of,
)  # fmt: skip
from tests.sweeps import slow_after

POLICIES = list(policy_codes())
TAU = {
    "meansim": [0.6, 0.8, 0.95, 1.0],
    "meanshare": [0.6, 0.75, 0.85, 1.0],
    "cumulant": [0.5, 0.7, 0.85, 1.0],
    "sampled": [0.5, 0.7, 0.85, 1.0],
    "antidiagonal": [0.6, 0.8, 0.95, 1.0],
    "sink_window": [0.03, 0.1, 0.2, 1.0],
    "vertical_slash": [0.6, 0.8, 0.95, 1.0],
}
"""For each of four heads, so that a good part of the blocks goes; 1 keeps them all."""

SIZES = [(1, 1, 2), (1, 15, 4), (2, 64, 1), (1, 65, 2), (2, 300, 2), (1, 777, 4), (1, 1024, 2)]
"""Batch, length, key heads."""

EACH_POLICY = pytest.mark.parametrize("name", POLICIES)


def of_policies(names, tau, **other):
    """A call whose heads have these policies."""
    return call_of(tau, (-1.0,) * 4, names, **other)


def of_policy(name, **other):
    """A call whose heads are all of one policy, and skip a good part of the blocks."""
    return of_policies([name] * 4, TAU[name], **other)


def by_operator(q, k, v, call, mask):
    """What the torch operator computes."""
    return torch.ops.afbs.sparse_attention(q, k, v, **arguments_of(call, mask, SCALE))


@EACH_POLICY
@EACH_MASK
@pytest.mark.parametrize("blocks", slow_after(1, starmap(BlockShape, [(64, 64), (128, 64), (32, 16), (128, 128)])))
def test_the_same_blocks_and_the_same_output(name, mask, blocks):
    call = of_policy(name, blocks=blocks)
    masks, outputs = predictor(call, mask), attention(call, mask)
    live = skipped = 0
    for seed, (batch, length, kv_heads) in enumerate(SIZES):
        q, k, v = operands(length, batch=batch, kv_heads=kv_heads, seed=seed)
        expected = expected_mask(q, k, call, mask)
        (found,) = run(masks, q=q, k=k)
        assert torch.equal(found, expected)
        (out,) = run(outputs, q=q, k=k, v=v)
        torch.testing.assert_close(out, by_operator(q, k, v, call, mask), rtol=1e-4, atol=1e-5)
        rows = torch.arange(found.shape[2])[:, None] * blocks[0]
        distant = torch.arange(found.shape[3]) * blocks[1] + blocks[1] <= rows  # behind the diagonal
        live += int((found[:, :3] & distant).sum())
        skipped += int((~found[:, :3] & distant).sum())
    assert live > 2  # the coarsest blocks leave 165 behind the diagonal
    assert skipped > 50


@EACH_POLICY
@EACH_MASK
def test_local_keys_and_last_rows_keep_blocks(name, mask):
    call = of_policy(name, blocks=(64, 32), kept=Kept(100, 30))
    masks = predictor(call, mask)
    for seed, (batch, length, kv_heads) in enumerate(SIZES):
        q, k, _ = operands(length, batch=batch, kv_heads=kv_heads, seed=seed)
        (found,) = run(masks, q=q, k=k)
        assert torch.equal(found, expected_mask(q, k, call, mask))


@EACH_MASK
@pytest.mark.parametrize("together", [2, 4])
def test_heads_that_share_a_selection(together, mask):
    call = of_policies(["cumulant"] * 4, (0.5, 0.6, 0.7, 0.8), blocks=BlockShape(64, 32, together))
    outputs = attention(call, mask)
    for seed, (batch, length, kv_heads) in enumerate(SIZES):
        q, k, v = operands(length, batch=batch, kv_heads=min(kv_heads, 4 // together), seed=seed)
        (out,) = run(outputs, q=q, k=k, v=v)
        expected = by_operator(q, k, v, call, mask)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    apart = replace(call, shape=BlockShape(64, 32))
    assert not torch.allclose(by_operator(q, k, v, apart, mask), expected, atol=1e-4)


@EACH_MASK
@pytest.mark.parametrize("names", [POLICIES[:4], POLICIES[:-5:-1]], ids=["first", "last"])
def test_each_head_of_a_call_has_its_own_policy(mask, names):
    call = of_policies(names, (0.5, 0.6, 1.0, 0.7))
    masks, outputs = predictor(call, mask), attention(call, mask)
    for seed, (batch, length, kv_heads) in enumerate(SIZES):
        q, k, v = operands(length, batch=batch, kv_heads=kv_heads, seed=seed)
        (found,) = run(masks, q=q, k=k)
        assert torch.equal(found, expected_mask(q, k, call, mask))
        (out,) = run(outputs, q=q, k=k, v=v)
        torch.testing.assert_close(out, by_operator(q, k, v, call, mask), rtol=1e-4, atol=1e-5)


@EACH_POLICY
def test_calls_of_a_model_may_divide_their_heads_differently(name):
    """onnxruntime lets tensors share memory whose shapes it takes to be equal."""
    other = "cumulant" if name != "cumulant" else "antidiagonal"
    calls = [of_policies([name] * n + [other] * (4 - n), (0.5, 0.6, 0.7, 0.8)) for n in (1, 3, 4, 2, 1)]
    nodes = [
        onnx.helper.make_node(
            "SparseAttention",
            ["q", "k", f"v{i}"],
            [f"v{i + 1}"],
            domain=DOMAIN,
            **attributes(call, Causal(), SCALE),
        )
        for i, call in enumerate(calls)
    ]
    last = f"v{len(calls)}"
    made = session_of(nodes, ["q", "k", "v0"], [last], dict.fromkeys(("q", "k", "v0", last), FLOAT))
    q, k, v = operands(512, kv_heads=4)
    (out,) = run(made, q=q, k=k, v0=v)
    for call in calls:
        v = by_operator(q, k, v, call, Causal())
    torch.testing.assert_close(out, v, rtol=1e-4, atol=1e-5)


@EACH_POLICY
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(name, opset):
    q, k, _ = operands(300)
    (found,) = run(predictor(of_policy(name), Causal(), opset=opset), q=q, k=k)
    assert torch.equal(found, expected_mask(q, k, of_policy(name), Causal()))


@pytest.mark.parametrize(("names", "loops"), [(["meansim", "meanshare"], 0), (["meansim", "cumulant"], 1)])
def test_what_no_head_uses_is_not_computed(tmp_path, names, loops):
    """onnxruntime drops the predictors of other policies when it loads the file; that of cumulant is a loop."""
    predictor(of_policies(names * 2, (0.5,) * 4), Causal(), optimized=tmp_path / "optimized.onnx")
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("Loop") == loops
    assert "If" not in kinds


@EACH_POLICY
@EACH_MASK
def test_rows_that_see_nan_or_infinity_keep_everything(name, mask):
    call = of_policies([name] * 4, (0.3,) * 4)
    made = predictor(call, mask)
    for bad in (float("nan"), float("inf")):
        q, k, _ = operands(500)
        k[:, 0, 200, 3] = bad
        q[:, 3, 333] = bad
        (found,) = run(made, q=q, k=k)
        assert torch.equal(found, expected_mask(q, k, call, mask))


@EACH_POLICY
def test_no_token_of_the_future_is_seen(name):
    made = attention(of_policy(name), Causal())
    q, k, v = operands(400)
    (before,) = run(made, q=q, k=k, v=v)
    for fill in (50.0, float("nan")):
        for x in (q, k, v):
            x[:, :, 320:] = fill
        (after,) = run(made, q=q, k=k, v=v)
        assert torch.equal(before[:, :, :320], after[:, :, :320])


@EACH_POLICY
def test_half_precision_is_computed_in_single(name):
    q, k, v = (x.half() for x in operands(300))
    (out,) = run(attention(of_policy(name), Causal(), HALF), q=q, k=k, v=v)
    assert out.dtype == torch.float16
    expected = by_operator(q.float(), k.float(), v.float(), of_policy(name), Causal())
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
