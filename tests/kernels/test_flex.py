"""The CPU engine never runs FlexAttention eagerly, and says so where it cannot run it compiled."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from torch._dynamo.utils import counters

from afbs_compile.kernels import flex
from tests.kernels.helpers import Shape, all_blocks, error, exact, inputs, some_blocks, tolerance

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
    replace(kind, length=length, batch=batch, causal=causal, block_q=block_q, block_k=block_k)
    for kind in KINDS
    for length, batch, causal, block_q, block_k in (
        (65, 1, True, 64, 64),
        (128, 2, False, 128, 64),
        (300, 1, True, 128, 128),
        (511, 3, False, 64, 64),
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
            q, k, v = inputs(shape)
            live = some_blocks(shape)
            out = flex.attend(q, k, v, live, **shape.call)
            assert error(out, exact(q, k, v, live, shape)) <= tolerance(q, k, v, shape, live)
    assert len(CALLS) > 20


def test_lengths_batches_masks_and_blocks_do_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # A function of its own, which Dynamo has not seen: the first call decides what later ones may share.
    code = flex._fused.__code__.replace(co_name="fused_for_this_test")
    fresh = torch.compile(types.FunctionType(code, flex._fused.__globals__), dynamic=True, fullgraph=True)
    monkeypatch.setattr(flex, "_compiled", lambda: fresh)
    first, *others = [
        replace(FP32, length=length, batch=batch, causal=causal, heads=heads, kv_heads=heads, layout=layout)
        for length, batch, causal, heads, layout in (
            (256, 1, True, 4, "bhnd"),  # as many blocks as heads, by chance
            (1000, 1, False, 4, "bnhd"),
            (70, 3, True, 2, "gaps"),
            (640, 2, True, 5, "strided"),
        )
    ]
    flex.attend(*inputs(first), all_blocks(first), **first.call)
    before = counters["stats"]["unique_graphs"]
    for shape in others:
        flex.attend(*inputs(shape), all_blocks(shape), **shape.call)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_uncompiled_it_takes_the_slow_way_and_says_why(causal: bool) -> None:
    shape = Shape(length=1100, heads=4, kv_heads=2, batch=2, block_q=128, causal=causal, scale=0.1)
    q, k, v = inputs(shape)
    live = some_blocks(shape)
    with torch.compiler.set_stance("force_eager"), pytest.warns(flex.UnfusedAttentionWarning, match="stance"):
        out = flex.attend(q, k, v, live, **shape.call)
    assert error(out, exact(q, k, v, live, shape)) <= 1e-5
    assert out.transpose(1, 2).is_contiguous()


def test_a_failed_compilation_is_reported_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(*_: Any) -> NoReturn:
        tries.append(1)
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nfound")

    monkeypatch.setattr(flex, "_compiled", lambda: fail)
    failures: dict[Any, str] = {}
    monkeypatch.setattr(flex, "_uncompilable", lambda: failures)
    q, k, v = inputs(FP32)
    live = all_blocks(FP32)
    for _ in range(2):
        with pytest.warns(flex.UnfusedAttentionWarning, match="no C\\+\\+ compiler found"):
            out = flex.attend(q, k, v, live, **FP32.call)
        assert error(out, exact(q, k, v, live, FP32)) <= 1e-5
    assert len(tries) == 1
