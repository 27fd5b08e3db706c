"""The CPU engine never runs FlexAttention eagerly, and says so where it cannot run it compiled."""

from __future__ import annotations

import types
import warnings
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from torch._dynamo.utils import counters

from afbs_compile.kernels.attend import machine
from afbs_compile.kernels.attend.flex import engine as flex
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.masks.registry import MASKS as MASK_KINDS
from afbs_compile.kernels.spec.selection import live_blocks
from tests.kernels.helpers import (
    FLEX,
    MASKS,
    Shape,
    all_blocks,
    error,
    every_block,
    exact,
    in_double,
    operands_of,
    some_blocks,
    sparse_call,
    tolerance,
)
from tests.masks import Dilated

FP32 = Shape(length=100, dtype=torch.float32, head_dim=64)
KINDS = [
    FP32,
    replace(FP32, scale=0.3),
    replace(FP32, heads=4, kv_heads=1),
    replace(FP32, heads=4, kv_heads=2, head_dim=17),
    replace(FP32, dtype=torch.float16, head_dim=60),
    replace(FP32, dtype=torch.bfloat16, head_dim=96, heads=4, kv_heads=2),
]
CALLS = [
    replace(kind, length=length, batch=batch, mask=mask, blocks=blocks)
    for kind in KINDS
    for length, batch, mask, blocks in (
        (65, 1, "causal", (64, 64)),
        (128, 2, "full", (128, 64)),
        (300, 1, "causal", (128, 128)),
        (511, 3, "full", (64, 64)),
    )
]


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Stands where no call may come."""
    raise AssertionError("FlexAttention ran uncompiled")


@pytest.mark.slow
def test_no_call_falls_to_eager_however_many_kinds_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_attend_by_rows", refuse)
    monkeypatch.setattr("torch.nn.attention.flex_attention._warn_once", refuse)
    # With the limit at one, the second kind already would be dropped, as the ninth is by default.
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1, suppress_errors=True):
        for shape in CALLS:
            operands, live = operands_of(shape), some_blocks(shape)
            out = FLEX.attend(operands, live, every_block(shape))
            assert error(out, exact(operands, live, shape.blocks)) <= tolerance(operands, live, shape.blocks)
    assert len(CALLS) > 20


def test_lengths_batches_masks_and_blocks_do_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # A function of its own, which Dynamo has not seen: the first call decides what later ones may share.
    code = flex._fused.__code__.replace(co_name="fused_for_this_test")
    fresh = torch.compile(types.FunctionType(code, flex._fused.__globals__), dynamic=True, fullgraph=True)
    monkeypatch.setattr(flex, "_compiled", lambda: fresh)
    first, *others = [
        replace(FP32, length=length, batch=batch, mask=mask, heads=heads, kv_heads=heads, layout=layout)
        for length, batch, mask, heads, layout in (
            (256, 1, "causal", 4, "bhnd"),  # as many blocks as heads, by chance
            (1000, 1, "full", 4, "bnhd"),
            (70, 3, "causal", 2, "gaps"),
            (640, 2, "causal", 5, "strided"),
        )
    ]
    FLEX.attend(operands_of(first), all_blocks(first), every_block(first))
    before = counters["stats"]["unique_graphs"]
    for shape in others:
        FLEX.attend(operands_of(shape), all_blocks(shape), every_block(shape))
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("mask", MASKS)
def test_uncompiled_it_takes_the_slow_way_and_says_why(mask: str) -> None:
    shape = Shape(length=1100, heads=4, kv_heads=2, batch=2, blocks=(128, 64), mask=mask, scale=0.1)
    operands, live = operands_of(shape), some_blocks(shape)
    with torch.compiler.set_stance("force_eager"), pytest.warns(flex.UnfusedAttentionWarning, match="stance"):
        out = FLEX.attend(operands, live, every_block(shape))
    assert error(out, exact(operands, live, shape.blocks)) <= 1e-5
    assert out.transpose(1, 2).is_contiguous()


def test_a_failed_compilation_is_reported_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(*_: Any) -> NoReturn:
        tries.append(1)
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nfound")

    monkeypatch.setattr(flex, "_compiled", lambda: fail)
    failures: dict[Any, str] = {}
    monkeypatch.setattr(flex, "_uncompilable", failures)
    operands, live = operands_of(FP32), all_blocks(FP32)
    for _ in range(2):
        with pytest.warns(flex.UnfusedAttentionWarning, match="no C\\+\\+ compiler found"):
            out = FLEX.attend(operands, live, every_block(FP32))
        assert error(out, exact(operands, live, FP32.blocks)) <= 1e-5
    assert len(tries) == 1
    assert list(failures) == [machine.compile_key(torch.device("cpu"), torch.float32, 64)]
    assert flex.Flex().note(operands) == "FlexAttention cannot be compiled: no C++ compiler found"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("length", "blocks"), [(40, (64, 64)), (333, (64, 64)), (400, (128, 64))], ids=str)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "by rows"])
@pytest.mark.slow
def test_a_mask_that_is_no_band(
    compiled: bool, length: int, blocks: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MASK_KINDS, "dilated", Dilated)
    head_dim = 64 if dtype == torch.float32 else 96
    shape = Shape(length, head_dim, heads=4, kv_heads=2, batch=2, blocks=blocks, dtype=dtype)
    operands = replace(operands_of(shape), mask=Dilated(3))
    call = sparse_call(shape, [0.3, 0.6, 0.9, 1.0])
    stance = "default" if compiled else "force_eager"
    with torch.compiler.set_stance(stance), warnings.catch_warnings():
        warnings.simplefilter("error" if compiled else "ignore", flex.UnfusedAttentionWarning)
        out, counts = run(operands, call)
    live = live_blocks(operands, call)
    assert torch.equal(counts, live.sum(-1, dtype=torch.int32))
    assert length < 100 or float(live.float().mean()) < 0.6, "nothing was sparse"
    assert error(out, exact(operands, live, blocks)) <= tolerance(operands, live, blocks)
    # As a softmax over what is seen, written without the package's own helpers.
    places, double = torch.arange(length), in_double(operands)
    seen = (places <= places[:, None]) & ((places[:, None] - places) % 3 == 0)
    scores = double.q @ double.k.repeat_interleave(2, 1).mT * operands.scale
    truth = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ double.v.repeat_interleave(2, 1)
    assert error(out[:, 3], truth[:, 3]) <= tolerance(operands, live, blocks)
    if compiled and dtype == torch.float32:
        text = torch.ops.afbs.sparse_attention(
            operands.q, operands.k, operands.v, [*call.tau], [*call.theta], [*call.lam], "dilated(3)", None, *blocks
        )
        assert torch.equal(text, out)
