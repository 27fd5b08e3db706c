"""Masks of every kind, softcap and sinks in standard operators, against the specification."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from afbs_compile.export.onnx import attributes, masked_attributes
from afbs_compile.export.onnx_function import DOMAIN, VERSION, all_functions
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.sight import resolved
from afbs_compile.kernels.spec.attention import masked_attention
from afbs_compile.kernels.spec.selection import live_blocks
from tests.any_mask import in_float64, poisoned, random_call, random_operands, undecided
from tests.export.test_onnx_function import onnx, onnxruntime
from tests.sweeps import slow_after

FLOAT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
SEEDS = slow_after(12, range(100))
RANKS = {"q": 4, "k": 4, "v": 4, "valid": 2, "attn_mask": 4, "sinks": 1}
SHAPES = (BlockShape(16, 16), BlockShape(32, 16), BlockShape(64, 32))


def drawn(seed):
    """A call of a few blocks at least, of any mask."""
    operands = random_operands(seed, largest=200)
    return operands, replace(random_call(seed, operands.heads), shape=SHAPES[seed % 3])


def by_node(operands, call):
    """What onnxruntime computes by the body of one node."""
    mask = operands.attn_mask
    if mask is not None and mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
        operands = resolved(operands)  # as the translation does: it is valid keys in another shape
        mask = None
    extra = masked_attributes(None if mask is None else mask.dtype, operands.softcap)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf)
    given = {
        "q": operands.q, "k": operands.k, "v": operands.v,
        "valid": torch.ones(1, 1, dtype=torch.bool) if operands.valid is None else operands.valid,
        "attn_mask": torch.zeros(1, 1, 1, 1) if mask is None else mask,
        "sinks": torch.full((1,), -math.inf) if operands.sinks is None else operands.sinks,
    }  # fmt: skip
    node = onnx.helper.make_node(
        "MaskedSparseAttention",
        list(given),
        ["out"],
        domain=DOMAIN,
        **attributes(call, operands.mask, operands.scale),
        **extra,
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [value(name, BOOL if name == "valid" else FLOAT, [None] * RANKS[name]) for name in given],
        [value("out", FLOAT, None)],
    )
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=imports, functions=all_functions(20), ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (out,) = made.run(None, {name: tensor.contiguous().numpy() for name, tensor in given.items()})
    return torch.from_numpy(out)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_over_the_blocks_of_the_specification(seed):
    operands, call = drawn(seed)
    live = live_blocks(operands, call)
    decided = ~undecided(operands, live, call.shape)
    out = by_node(operands, call)
    exact = in_float64(operands, live, call.shape)
    torch.testing.assert_close(out[decided].double(), exact[decided], rtol=1e-4, atol=1e-4)
    expected = masked_attention(operands, live, call.lam, call.shape)
    torch.testing.assert_close(out[decided], expected[decided], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_what_no_row_sees_has_no_effect(seed):
    operands, call = drawn(seed)
    out = by_node(operands, call)
    for value in (math.nan, math.inf, 1e4):
        torch.testing.assert_close(by_node(poisoned(operands, value), call), out, rtol=0, atol=0)
