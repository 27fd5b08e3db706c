"""The bodies in standard operators against the reference, function by function."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from afbs_compile.export.onnx import attributes
from afbs_compile.export.onnx_function import DOMAIN, VERSION, all_functions
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies import rules
from afbs_compile.kernels.policies.statistics import block_means
from afbs_compile.kernels.sight import sight_of
from afbs_compile.kernels.spec import attention as specification
from afbs_compile.kernels.spec.selection import live_blocks, near_blocks

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")

TAU = (0.3, 0.6, 0.9, 1.0)
THETA = (-1.0, 0.2, 0.5, -1.0)
LAM = (-1000.0,) * 4
SCALE = 0.25
EACH_MASK = pytest.mark.parametrize("mask", [Causal(), Full()], ids=["causal", "bidirectional"])
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
    model = onnx.helper.make_model(graph, opset_imports=imports, functions=all_functions(opset), ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # idle threads of onnxruntime spin, which slows a busy machine down
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(made, **tensors):
    return [torch.from_numpy(x) for x in made.run(None, {name: x.numpy() for name, x in tensors.items()})]


def call_of(tau=TAU, theta=THETA, policy=("meansim",) * 4, blocks=(64, 64), **other):
    return SparseCall(tuple(tau), tuple(theta), LAM, tuple(policy), BlockShape(*blocks), **other)


FORMULA = ("ahead", "behind", "chunk", "at_end")
SELECTION = {
    "tau": "tau", "theta": "theta", "order": "order", "ends": "ends", "scaling": "scale", "size_q": "block_q",
    "size_k": "block_k", "last": "last_rows", "local": "local_keys", "shortest": "min_length", "longest": "max_length",
}  # fmt: skip
"""The inputs of the function that selects, and the attributes of the node that they are."""


def predictor(call, mask, **options):
    """A session of the function that selects, for a call without more than a formula."""
    given = attributes(call, mask, SCALE)
    make = functools.partial(onnx.helper.make_node, domain=DOMAIN)
    nothing = {"mask": torch.zeros(1, 1, 1, 1), "softcap": torch.tensor(0.0), "no": torch.tensor(False)}
    constants = {name: onnx.numpy_helper.from_array(value.numpy()) for name, value in nothing.items()}
    constants |= {name: onnx.numpy_helper.from_array(np.array(given[name])) for name in FORMULA}
    for name, attribute in SELECTION.items():
        value = np.array(given[attribute])
        constants[name] = onnx.numpy_helper.from_array(value.astype("float32") if value.dtype.kind == "f" else value)
    nodes = [
        *(onnx.helper.make_node("Constant", [], [name], value=value) for name, value in constants.items()),
        make("Formula", ["q", "k", *FORMULA], ["formula"]),
        make("AllRows", ["k"], ["valid"]),
        make(
            "PredictMask",
            ["q", "k", "formula", "valid", "mask", *SELECTION, "softcap", "no", "no", "no"],
            ["live"],
        ),
    ]
    return session_of(nodes, ["q", "k"], ["live"], {"live": BOOL}, **options)


def attention(call, mask, kind=None):
    """A session of the whole node."""
    kinds = dict.fromkeys(("q", "k", "v", "out"), kind or FLOAT)
    return session("SparseAttention", ["q", "k", "v"], ["out"], attributes(call, mask, SCALE), kinds)


def operands(length, *, batch=1, kv_heads=2, seed=0, dim=16):
    torch.manual_seed(seed)
    walk = torch.randn(batch, 1, length, dim).cumsum(2) / length**0.5
    return [3 * walk + torch.randn(batch, heads, length, dim) for heads in (4, kv_heads, kv_heads)]


def expected_mask(q, k, call, mask):
    return live_blocks(Operands(q, k, k, mask, SCALE), call)


def expected_output(q, k, v, call, mask):
    return specification.sparse_attention(Operands(q, k, v, mask, SCALE), call)


@EACH_MASK
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (32, 16), (128, 128)])
def test_the_same_blocks_and_the_same_output(mask, blocks):
    call = call_of(blocks=blocks)
    masks, outputs = predictor(call, mask), attention(call, mask)
    skipped = 0
    for seed, (batch, length, kv_heads) in enumerate(
        [(1, 1, 2), (1, 63, 4), (2, 64, 1), (1, 65, 2), (2, 300, 2), (1, 777, 4), (1, 1024, 2)]
    ):
        q, k, v = operands(length, batch=batch, kv_heads=kv_heads, seed=seed)
        live = expected_mask(q, k, call, mask)
        (found,) = run(masks, q=q, k=k)
        assert torch.equal(found, live)
        (out,) = run(outputs, q=q, k=k, v=v)
        torch.testing.assert_close(out, expected_output(q, k, v, call, mask), rtol=1e-4, atol=1e-5)
        skipped += int((~live).sum())
    assert skipped > 50


def test_blocks_that_are_equally_probable_stay_or_go_together():
    """A tie of all: every block has the same mean, so every block is needed to reach any mass."""
    q, k = torch.ones(1, 4, 512, 16), torch.ones(1, 2, 512, 16)
    (found,) = run(predictor(call_of(), Causal()), q=q, k=k)
    assert torch.equal(found, expected_mask(q, k, call_of(), Causal()))
    assert torch.equal(found[0, 0], torch.ones(8, 8, dtype=torch.bool).tril())


@EACH_MASK
def test_heads_that_select_by_share(mask):
    """Keep block j when p_j * n ** (1/4) > (1 - tau) / tau, n the visible blocks; diagonal ones always."""
    tau, share, mass = (0.3, 0.5, 0.6, 1.0), "meanshare", "meansim"
    call = call_of(tau, (-1.0,) * 4, (share, share, mass, share))
    q, k, v = operands(777)
    (found,) = run(predictor(call, mask), q=q, k=k)
    one = Operands(q, k, v, mask, SCALE)
    sight = sight_of(one, call.shape)
    visible, diagonal = sight.visible[0, 0], near_blocks(one, call.shape, sight)[0, 0]
    scores = block_means(q, 64) @ block_means(k, 64).repeat_interleave(2, 1).transpose(-1, -2) * SCALE
    p = rules.softmax(scores, visible)
    taus = torch.tensor(tau)[:, None, None]
    by_share = p * visible.sum(-1, keepdim=True) ** 0.25 > (1 - taus) / taus
    expected = (by_share | diagonal | (taus >= 1)) & visible
    expected[:, 2] = expected_mask(q, k, call_of((tau[2],) * 4, (-1.0,) * 4), mask)[:, 2]
    assert torch.equal(found, expected)
    assert (~found & visible).sum() > 50


@pytest.mark.parametrize("fill", [0.0, 1e-30, 1e30])
def test_rows_without_a_direction_or_with_a_huge_one(fill):
    q, k, _ = operands(300)
    k[:, :, 70:200] = fill
    q[:, :, 5] = 0
    (found,) = run(predictor(call_of(), Full()), q=q, k=k)
    assert torch.equal(found, expected_mask(q, k, call_of(), Full()))


def test_no_token_of_the_future_is_seen():
    made = attention(call_of(), Causal())
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
    (out,) = run(attention(call_of(**limits), Causal()), q=q, k=k, v=v)
    if not dense:
        torch.testing.assert_close(out, expected_output(q, k, v, call_of(), Causal()), rtol=1e-4, atol=1e-5)
        return
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
    torch.testing.assert_close(out, expected)


def test_half_precision_is_computed_in_single():
    q, k, v = (x.half() for x in operands(300))
    (out,) = run(attention(call_of(), Causal(), HALF), q=q, k=k, v=v)
    assert out.dtype == torch.float16
    expected = expected_output(q.float(), k.float(), v.float(), call_of(), Causal())
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
