"""The policies in standard operators against the torch operator's own."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.export.onnx import OPSETS, POLICIES
from afbs_compile.kernels import policy
from afbs_compile.kernels.reference import Kept
from tests.export.test_onnx_function import (
    BOOL,
    DOMAIN,
    FLOAT,
    HALF,
    LAM,
    onnx,
    operands,
    run,
    session,
    session_of,
    settings,
)  # fmt: skip
from tests.sweeps import slow_after

OFF = [-1.0] * 4
TAU = {
    "meansim": [0.6, 0.8, 0.95, 1.0],
    "meanshare": [0.6, 0.75, 0.85, 1.0],
    "cumulant": [0.5, 0.7, 0.85, 1.0],
    "antidiagonal": [0.6, 0.8, 0.95, 1.0],
    "sink_window": [0.03, 0.1, 0.2, 1.0],
    "vertical_slash": [0.6, 0.8, 0.95, 1.0],
}
"""For each of four heads, so that a good part of the blocks goes; 1 keeps them all."""

SIZES = [(1, 1, 2), (1, 15, 4), (2, 64, 1), (1, 65, 2), (2, 300, 2), (1, 777, 4), (1, 1024, 2)]
"""Batch, length, key heads."""

EACH_POLICY = pytest.mark.parametrize("name", POLICIES)
EACH_DIRECTION = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def attributes_of(names, tau, causal, block_q=64, block_k=64, **limits):
    codes = [POLICIES[name] for name in names]
    return settings(causal, block_q, block_k, **limits) | {"tau": tau, "theta": OFF, "policy_code": codes}


def predictor(names, tau, *call, **options):
    return session("PredictMask", ["q", "k"], ["live"], attributes_of(names, tau, *call), {"live": BOOL}, **options)


def attention_attributes(names, tau, *call):
    return attributes_of(names, tau, *call) | {"lam": LAM, "policy": list(names), "predictor_version": 1}


def attention(names, tau, *call, kind=FLOAT):
    attributes = attention_attributes(names, tau, *call)
    return session("SparseAttention", ["q", "k", "v"], ["out"], attributes, dict.fromkeys(("q", "k", "v", "out"), kind))


def expected_mask(q, k, names, tau, causal, block_q=64, block_k=64):
    return policy.predict_mask(
        q, k, tau, OFF, names, causal=causal, scale=0.25, block_q=block_q, block_k=block_k
    )  # fmt: skip


def expected_output(q, k, v, names, tau, causal, block_q=64, block_k=64):
    return torch.ops.afbs.sparse_attention(q, k, v, tau, OFF, LAM, causal, 0.25, block_q, block_k, policy=names)


@EACH_POLICY
@EACH_DIRECTION
@pytest.mark.parametrize(("block_q", "block_k"), slow_after(2, [(64, 64), (128, 64), (32, 16), (128, 128)]))
def test_the_same_blocks_and_the_same_output(name, causal, block_q, block_k):
    call = ([name] * 4, TAU[name], causal, block_q, block_k)
    masks, outputs = predictor(*call), attention(*call)
    live = skipped = 0
    for seed, (batch, length, kv_heads) in enumerate(SIZES):
        q, k, v = operands(length, batch=batch, kv_heads=kv_heads, seed=seed)
        expected = expected_mask(q, k, *call)
        (found,) = run(masks, q=q, k=k)
        assert torch.equal(found, expected)
        (out,) = run(outputs, q=q, k=k, v=v)
        torch.testing.assert_close(out, expected_output(q, k, v, *call), rtol=1e-4, atol=1e-5)
        rows = torch.arange(found.shape[2])[:, None] * block_q
        distant = torch.arange(found.shape[3]) * block_k + block_k <= rows  # behind the diagonal
        live += int((found[:, :3] & distant).sum())
        skipped += int((~found[:, :3] & distant).sum())
    assert live > 5
    assert skipped > 50


@EACH_POLICY
@EACH_DIRECTION
def test_local_keys_and_last_rows_keep_blocks(name, causal):
    attributes = attributes_of([name] * 4, TAU[name], causal, 64, 32) | {"last_rows": 100, "local_keys": 30}
    masks = session("PredictMask", ["q", "k"], ["live"], attributes, {"live": BOOL})
    for seed, (batch, length, kv_heads) in enumerate(SIZES):
        q, k, _ = operands(length, batch=batch, kv_heads=kv_heads, seed=seed)
        call = {"causal": causal, "scale": 0.25, "block_q": 64, "block_k": 32}
        (found,) = run(masks, q=q, k=k)
        assert torch.equal(found, policy.predict_mask(q, k, TAU[name], OFF, [name] * 4, kept=Kept(100, 30), **call))


@EACH_DIRECTION
@pytest.mark.parametrize("names", [list(POLICIES)[:4], list(POLICIES)[:1:-1]], ids=["first", "last"])
def test_each_head_of_a_call_has_its_own_policy(causal, names):
    tau = [0.5, 0.6, 1.0, 0.7]
    masks, outputs = predictor(names, tau, causal), attention(names, tau, causal)
    for seed, (batch, length, kv_heads) in enumerate(SIZES):
        q, k, v = operands(length, batch=batch, kv_heads=kv_heads, seed=seed)
        (found,) = run(masks, q=q, k=k)
        assert torch.equal(found, expected_mask(q, k, names, tau, causal))
        (out,) = run(outputs, q=q, k=k, v=v)
        torch.testing.assert_close(out, expected_output(q, k, v, names, tau, causal), rtol=1e-4, atol=1e-5)


@EACH_POLICY
def test_calls_of_a_model_may_divide_their_heads_differently(name):
    """onnxruntime lets tensors share memory whose shapes it takes to be equal."""
    other = "cumulant" if name != "cumulant" else "antidiagonal"
    calls = [[name] * n + [other] * (4 - n) for n in (1, 3, 4, 2, 1)]
    tau = [0.5, 0.6, 0.7, 0.8]
    nodes = [
        onnx.helper.make_node(
            "SparseAttention",
            ["q", "k", f"v{i}"],
            [f"v{i + 1}"],
            domain=DOMAIN,
            **attention_attributes(names, tau, True),
        )
        for i, names in enumerate(calls)
    ]
    last = f"v{len(calls)}"
    made = session_of(nodes, ["q", "k", "v0"], [last], dict.fromkeys(("q", "k", "v0", last), FLOAT))
    q, k, v = operands(512, kv_heads=4)
    (out,) = run(made, q=q, k=k, v0=v)
    for names in calls:
        v = expected_output(q, k, v, names, tau, True)
    torch.testing.assert_close(out, v, rtol=1e-4, atol=1e-5)


@EACH_POLICY
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(name, opset):
    q, k, _ = operands(300)
    (found,) = run(predictor([name] * 4, TAU[name], True, opset=opset), q=q, k=k)
    assert torch.equal(found, expected_mask(q, k, [name] * 4, TAU[name], True))


@pytest.mark.parametrize(("names", "loops"), [(["meansim", "meanshare"], 0), (["meansim", "cumulant"], 1)])
def test_what_no_head_uses_is_not_computed(tmp_path, names, loops):
    """onnxruntime drops the predictors of other policies when it loads the file; that of cumulant is a loop."""
    predictor(names * 2, [0.5] * 4, True, optimized=tmp_path / "optimized.onnx")
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("Loop") == loops
    assert "If" not in kinds


@EACH_POLICY
@EACH_DIRECTION
def test_rows_that_see_nan_or_infinity_keep_everything(name, causal):
    made = predictor([name] * 4, [0.3] * 4, causal)
    for bad in (float("nan"), float("inf")):
        q, k, _ = operands(500)
        k[:, 0, 200, 3] = bad
        q[:, 3, 333] = bad
        (found,) = run(made, q=q, k=k)
        assert torch.equal(found, expected_mask(q, k, [name] * 4, [0.3] * 4, causal))


@EACH_POLICY
def test_no_token_of_the_future_is_seen(name):
    made = attention([name] * 4, TAU[name], True)
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
    (out,) = run(attention([name] * 4, TAU[name], True, kind=HALF), q=q, k=k, v=v)
    assert out.dtype == torch.float16
    expected = expected_output(q.float(), k.float(), v.float(), [name] * 4, TAU[name], True)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
