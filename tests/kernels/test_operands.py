"""The operands of a call: their parts, dense attention on them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.operands import check_operands
from tests.kernels.helpers import MASKS, Shape, all_blocks, dense, error, exact, inputs, operands_of

SHAPE = Shape(length=300, heads=4, kv_heads=2, batch=2, layout="bnhd")


def _with(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda qkv: [change(x) if i == index else x for i, x in enumerate(qkv)]


REFUSED_OPERANDS = {
    "q has 3 dimensions; accepted: 4": _with(0, lambda x: x[0]),
    "k has dtype torch.int64; accepted: torch.float16, torch.bfloat16, torch.float32": _with(1, Tensor.long),
    "v is torch.float16 on cpu, q is torch.float32 on cpu; accepted: the same": _with(2, Tensor.half),
    "q has head_dim 513; accepted: 1 to 512": lambda qkv: [F.pad(x, (0, 513 - 64)) for x in qkv],
    "q has 4 heads and k has 3; accepted: a multiple": _with(1, lambda x: F.pad(x, (0, 0, 0, 0, 0, 1))),
    "v has size 300 in dimension 2; accepted: 299": _with(1, lambda x: x[:, :, 1:]),
    "k has size 1 in dimension 0; accepted: 2": _with(1, lambda x: x[:1]),
    "k has size 32 in dimension 3; accepted: 64": _with(1, lambda x: x[..., :32]),
    "v has size 299 in dimension 2; accepted: 300": _with(2, lambda x: x[:, :, 1:]),
}


@pytest.mark.parametrize("sentence", REFUSED_OPERANDS)
def test_operands_are_refused_in_a_sentence(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_operands(SHAPE.of(*REFUSED_OPERANDS[sentence](list(inputs(SHAPE)))))


REFUSED_EXTRAS = {
    "valid is torch.float32 on cpu; accepted: torch.bool, on cpu": {"valid": torch.ones(2, 300)},
    "valid has size 1 in dimension 0; accepted: 2": {"valid": torch.ones(1, 300, dtype=torch.bool)},
    "attn_mask is torch.int64 on cpu; accepted: torch.bool": {"attn_mask": torch.ones(2, 1, 1, 300).long()},
    "attn_mask has 2 dimensions; accepted: 4": {"attn_mask": torch.ones(300, 300)},
    "attn_mask has size 3 in dimension 1; accepted: 4": {"attn_mask": torch.ones(1, 3, 1, 300)},
    "sinks has size 2 in dimension 0; accepted: 4": {"sinks": torch.ones(2)},
    "softcap is -1.0; accepted: 0 for none": {"softcap": -1.0},
}


@pytest.mark.parametrize("sentence", REFUSED_EXTRAS)
def test_what_else_a_call_has_is_refused_in_a_sentence(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_operands(replace(operands_of(SHAPE), **REFUSED_EXTRAS[sentence]))


def test_sizes_that_follow_from_the_tensors() -> None:
    operands = operands_of(SHAPE)
    check_operands(operands)
    assert (operands.heads, operands.groups, operands.q_len, operands.k_len) == (4, 2, 300, 300)
    assert operands.work == 300 * 301 // 2
    assert operands.grid(BlockShape(128, 64))[:2] == (300, 300)
    assert operands.key_heads([0, 3]) == [0, 1]


def test_some_heads_bring_a_key_head_each() -> None:
    operands = operands_of(SHAPE)
    assert operands.taken([0, 1, 2, 3]) is operands
    part = operands.taken([3, 0, 1])
    assert torch.equal(part.q, operands.q[:, [3, 0, 1]])
    assert torch.equal(part.k, operands.k[:, [1, 0, 0]])
    assert torch.equal(part.v, operands.v[:, [1, 0, 0]])
    assert part.groups == 1


def test_groups_elements_and_first_rows_are_views() -> None:
    operands = operands_of(SHAPE)
    for part, q, k in (
        (operands.grouped(2, 4), operands.q[:, 2:4], operands.k[:, 1:]),
        (operands.element(1), operands.q[1:], operands.k[1:]),
        (operands.first_rows(70), operands.q[:, :, :70], operands.k[:, :, :70]),
    ):
        assert torch.equal(part.q, q)
        assert torch.equal(part.k, k)
        assert part.q.data_ptr() == q.data_ptr()
        assert part.mask == operands.mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_dense_attention_takes_any_scale(mask: str, scale: float, dtype: torch.dtype) -> None:
    shape = replace(SHAPE, mask=mask, scale=scale, dtype=dtype)
    operands = operands_of(shape)
    truth = exact(operands, all_blocks(shape), shape.blocks)
    assert error(dense_attention(operands), truth) <= (1e-5 if dtype == torch.float32 else 2e-2)
    assert operands.with_positive_scale().scale > 0
    if scale > 0:
        assert torch.equal(dense_attention(operands), dense(operands))
