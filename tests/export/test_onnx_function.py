"""The bodies in standard operators against the reference, function by function."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.export.onnx_function import DOMAIN, VERSION, function_protos
from afbs_compile.kernels import reference

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")

TAU = [0.3, 0.6, 0.9, 1.0]
THETA = [-1.0, 0.2, 0.5, -1.0]
LAM = [-1000.0] * 4
OPSET = 18
FLOAT, HALF, BOOL = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BOOL"))


def session(name, inputs, outputs, attributes, kinds, opset=OPSET, optimized=None):
    """A session of one node."""
    nodes = [onnx.helper.make_node(name, inputs, outputs, domain=DOMAIN, **attributes)]
    return session_of(nodes, inputs, outputs, kinds, opset, optimized)


def session_of(nodes, inputs, outputs, kinds, opset=OPSET, optimized=None):
    """A session of some nodes."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "nodes",
        [value(x, kinds.get(x, FLOAT), [None] * 4) for x in inputs],
        [value(x, kinds.get(x, FLOAT), None) for x in outputs],
    )
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=imports, functions=function_protos(opset), ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # idle threads of onnxruntime spin, which slows a busy machine down
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(made, **tensors):
    return [torch.from_numpy(x) for x in made.run(None, {name: x.numpy() for name, x in tensors.items()})]


def settings(causal, block_q, block_k, min_length=0, max_length=0):
    return {
        "tau": TAU, "theta": THETA, "policy_code": [0] * 4, "is_causal": int(causal), "scale": 0.25,
        "block_q": block_q, "block_k": block_k, "min_length": min_length, "max_length": max_length,
    }  # fmt: skip


def predictor(causal, block_q, block_k):
    return session("PredictMask", ["q", "k"], ["live"], settings(causal, block_q, block_k), {"live": BOOL})


def attention(causal, block_q, block_k, kind=None, **limits):
    attributes = settings(causal, block_q, block_k, **limits)
    attributes.update(lam=LAM, policy=["meansim"] * 4, predictor_version=1)
    kinds = dict.fromkeys(("q", "k", "v", "out"), kind or FLOAT)
    return session("SparseAttention", ["q", "k", "v"], ["out"], attributes, kinds)


def operands(length, *, batch=1, kv_heads=2, seed=0, dim=16):
    torch.manual_seed(seed)
    walk = torch.randn(batch, 1, length, dim).cumsum(2) / length**0.5
    return [3 * walk + torch.randn(batch, heads, length, dim) for heads in (4, kv_heads, kv_heads)]


def expected_mask(q, k, causal, block_q, block_k):
    return reference.predict_mask(q, k, TAU, THETA, causal=causal, scale=0.25, block_q=block_q, block_k=block_k)


def expected_output(q, k, v, causal, block_q, block_k):
    return reference.sparse_attention(
        q, k, v, TAU, THETA, LAM, causal=causal, scale=0.25, block_q=block_q, block_k=block_k
    )


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 64), (32, 16), (128, 128)])
def test_the_same_blocks_and_the_same_output(causal, block_q, block_k):
    masks, outputs = predictor(causal, block_q, block_k), attention(causal, block_q, block_k)
    skipped = 0
    for seed, (batch, length, kv_heads) in enumerate(
        [(1, 1, 2), (1, 63, 4), (2, 64, 1), (1, 65, 2), (2, 300, 2), (1, 777, 4), (1, 1024, 2)]
    ):
        q, k, v = operands(length, batch=batch, kv_heads=kv_heads, seed=seed)
        live = expected_mask(q, k, causal, block_q, block_k)
        (found,) = run(masks, q=q, k=k)
        assert torch.equal(found, live)
        (out,) = run(outputs, q=q, k=k, v=v)
        torch.testing.assert_close(out, expected_output(q, k, v, causal, block_q, block_k), rtol=1e-4, atol=1e-5)
        skipped += int((~live).sum())
    assert skipped > 50


def test_blocks_that_are_equally_probable_stay_or_go_together():
    """A tie of all: every block has the same mean, so every block is needed to reach any mass."""
    q, k = torch.ones(1, 4, 512, 16), torch.ones(1, 2, 512, 16)
    (found,) = run(predictor(True, 64, 64), q=q, k=k)
    assert torch.equal(found, expected_mask(q, k, True, 64, 64))
    assert torch.equal(found[0, 0], torch.ones(8, 8, dtype=torch.bool).tril())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_heads_that_select_by_share(causal):
    """Keep block j when p_j * sqrt(n) > (1 - tau) / tau, n the visible blocks; diagonal ones always."""
    tau = [0.3, 0.5, 0.6, 1.0]
    attributes = settings(causal, 64, 64) | {"tau": tau, "theta": [-1.0] * 4, "policy_code": [1, 1, 0, 1]}
    made = session("PredictMask", ["q", "k"], ["live"], attributes, {"live": BOOL})
    q, k, _ = operands(777)
    (found,) = run(made, q=q, k=k)
    mean_q, mean_k = (reference.block_statistics(x, 64)[0] for x in (q, k))
    visible = reference.visible_blocks(13, 13, 64, 64, causal, q.device)
    diagonal = reference.diagonal_blocks(13, 13, 64, 64, q.device)
    p = reference.block_probabilities(mean_q, mean_k, visible, scale=0.25)
    taus = reference.per_head(tau, q)
    by_share = p * visible.sum(-1, keepdim=True).sqrt() > (1 - taus) / taus
    expected = (by_share | diagonal | (taus >= 1)) & visible
    expected[:, 2] = expected_mask_of(q, k, [tau[2]] * 4, causal)[:, 2]
    assert torch.equal(found, expected)
    assert (~found & visible).sum() > 50


def expected_mask_of(q, k, tau, causal):
    return reference.predict_mask(q, k, tau, [-1.0] * 4, causal=causal, scale=0.25)


@pytest.mark.parametrize("fill", [0.0, 1e-30, 1e30])
def test_rows_without_a_direction_or_with_a_huge_one(fill):
    q, k, _ = operands(300)
    k[:, :, 70:200] = fill
    q[:, :, 5] = 0
    (found,) = run(predictor(False, 64, 64), q=q, k=k)
    assert torch.equal(found, expected_mask(q, k, False, 64, 64))


def test_no_token_of_the_future_is_seen():
    made = attention(True, 64, 64)
    q, k, v = operands(256)
    (before,) = run(made, q=q, k=k, v=v)
    for x in (q, k, v):
        x[:, :, 192:] = torch.randn_like(x[:, :, 192:]) * 50
    (after,) = run(made, q=q, k=k, v=v)
    assert torch.equal(before[:, :, :192], after[:, :, :192])
    k[:, :, 192:], v[:, :, 192:] = float("nan"), float("nan")
    (poisoned,) = run(made, q=q, k=k, v=v)
    assert torch.equal(before[:, :, :192], poisoned[:, :, :192])


@pytest.mark.parametrize(
    ("limits", "dense"), [({"min_length": 201}, True), ({"max_length": 199}, True), ({"max_length": 200}, False)]
)
def test_outside_its_lengths_everything_is_kept(limits, dense):
    q, k, v = operands(200)
    (out,) = run(attention(True, 64, 64, **limits), q=q, k=k, v=v)
    if not dense:
        torch.testing.assert_close(out, expected_output(q, k, v, True, 64, 64), rtol=1e-4, atol=1e-5)
        return
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
    torch.testing.assert_close(out, expected)


def test_half_precision_is_computed_in_single():
    q, k, v = (x.half() for x in operands(300))
    (out,) = run(attention(True, 64, 64, HALF), q=q, k=k, v=v)
    assert out.dtype == torch.float16
    expected = expected_output(q.float(), k.float(), v.float(), True, 64, 64)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
