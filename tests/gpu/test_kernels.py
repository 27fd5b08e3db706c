"""The Triton kernels on a real GPU: sizes, precisions and machinery that the interpreter cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels import launcher
from afbs_compile.kernels.attend.portable import engine as portable
from afbs_compile.kernels.attend.portable import launch, tiling
from afbs_compile.kernels.attend.run import run as run_call
from afbs_compile.kernels.blocks import BlockShape, live_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.select import triton
from afbs_compile.kernels.spec.attention import masked_attention
from afbs_compile.kernels.spec.selection import live_blocks
from tests.kernels.helpers import (
    MASKS,
    NO_SKIP,
    OFF,
    TRITON,
    Shape,
    all_blocks,
    blocks_id,
    dense,
    error,
    every_block,
    exact,
    in_double,
    inputs,
    operands_of,
    shape_id,
    some_blocks,
    sparse_call,
    tolerance,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BLOCKS = [(64, 64), (128, 64), (128, 128)]
HALF = {"dtype": torch.bfloat16, "layout": "bnhd"}
LONG = [
    Shape(length=4096, head_dim=128, heads=8, kv_heads=2, **HALF),
    Shape(length=4000, head_dim=64, heads=4, kv_heads=4, batch=2, dtype=torch.float16, layout="gaps"),
    Shape(length=4096, head_dim=96, heads=4, kv_heads=1, mask="full", **HALF),
    Shape(length=3001, head_dim=256, heads=2, kv_heads=2, mask="full", **HALF),
    Shape(length=3001, head_dim=128, heads=2, kv_heads=1),
    Shape(length=2000, head_dim=256, heads=2, kv_heads=2, mask="full"),
    Shape(length=1, head_dim=16, heads=8, kv_heads=1, batch=3, **HALF),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that no kernel wrote reads as NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def attend(operands: Operands, live: Tensor, lam: float | list[float], shape: Shape) -> Tensor:
    """The Triton kernel over live blocks."""
    return TRITON.attend(operands, live, sparse_call(shape, 1.0, lam=lam))


@pytest.mark.parametrize("blocks", BLOCKS, ids=blocks_id)
@pytest.mark.parametrize("shape", LONG, ids=shape_id)
def test_every_block_kept_is_sdpa(shape: Shape, blocks: tuple[int, int]) -> None:
    shape = replace(shape, blocks=blocks)
    operands = operands_of(shape, "cuda")
    out = attend(operands, all_blocks(shape, "cuda"), NO_SKIP, shape)
    assert error(out, dense(in_double(operands))) <= tolerance(operands)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("blocks", BLOCKS, ids=blocks_id)
@pytest.mark.parametrize("shape", LONG, ids=shape_id)
def test_some_blocks_kept_is_the_specification(shape: Shape, blocks: tuple[int, int]) -> None:
    shape = replace(shape, blocks=blocks)
    operands, live = operands_of(shape, "cuda"), some_blocks(shape, "cuda")
    out = attend(operands, live, NO_SKIP, shape)
    assert error(out, exact(operands, live, shape.blocks)) <= tolerance(operands, live, shape.blocks)


@pytest.mark.parametrize("blocks", BLOCKS, ids=blocks_id)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lambda_skips_what_the_reference_skips(blocks: tuple[int, int], mask: str, head_dim: int) -> None:
    shape = Shape(1500, head_dim, heads=4, kv_heads=2, mask=mask, blocks=blocks, **HALF)
    q, k, v = inputs(shape, "cuda")
    k[:, :, 200:] *= 0.2
    live, lam = some_blocks(shape, "cuda", share=0.7), [-0.1, -2.0, NO_SKIP, 0.0]
    out = attend(shape.of(q, k, v), live, lam, shape)
    expected = masked_attention(shape.of(q, k, v), live, lam, shape.block_shape)
    # A tile at the very edge of lambda may be skipped by one and not by the other; rounding is ten times smaller.
    assert float((out - expected).float().abs().mean()) <= 2e-3
    assert float((out - exact(shape.of(q, k, v), live, shape.blocks))[:, 0].abs().mean()) > 2e-2, "nothing was skipped"
    if blocks == (64, 64) and head_dim == 64:  # larger fp32 blocks are cut, and a cut block ignores lambda
        single = shape.of(q.float(), k.float(), v.float())
        expected = masked_attention(single, live, lam, shape.block_shape)
        assert float((attend(single, live, lam, shape) - expected).abs().mean()) <= 1e-4


@pytest.mark.parametrize("length", [16384, 32768])
@pytest.mark.parametrize("mask", MASKS)
def test_long_sequences_against_sdpa(length: int, mask: str) -> None:
    shape = Shape(length, 128, heads=8, kv_heads=2, mask=mask, blocks=(128, 64), **HALF)
    operands = operands_of(shape, "cuda")
    out, counts = run_call(operands, every_block(shape))
    assert torch.equal(counts, all_blocks(shape, "cuda").sum(-1, dtype=torch.int32))
    expected = dense(operands).float()
    # Both round to bf16 twice; the difference per head is an order below any tolerance of a recipe.
    differences = (out.float() - expected).abs().sum((0, 2, 3)) / expected.abs().sum((0, 2, 3))
    assert (differences < 0.005).all()


@pytest.mark.parametrize("length", [8192, 131072, 262144])
@pytest.mark.parametrize("mask", MASKS)
def test_predictor_at_length(length: int, mask: str) -> None:
    shape = Shape(length, 64, heads=2, kv_heads=1, mask=mask, **HALF)
    operands, call = operands_of(shape, "cuda"), sparse_call(shape, [0.6, 0.9], [OFF, 0.1])
    lists = triton.select(operands, call)
    assert ((lists.indices >= 0) & (lists.indices < shape.counts[1])).all()
    live, expected = live_of(lists), live_blocks(operands, call)
    # fp32 sums of thousands of probabilities in another order: the last block of a row may differ.
    assert float((live != expected).sum() / expected.sum()) < 1e-4
    assert ((live != expected).sum(-1) <= 4).all()
    whole = operands.mask.visibility(shape.grid, operands.device).whole
    assert torch.equal(lists.whole, (live & whole).sum(-1, dtype=torch.int32))
    for one, other in zip(lists, triton.select(operands, call), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e4, 6e4, -6e4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_constant_inputs_give_finite_results(fill: float, dtype: torch.dtype) -> None:
    shape = Shape(1000, 128, heads=2, kv_heads=1, dtype=dtype)
    q, k, v = inputs(shape, "cuda")
    operands = shape.of(q.fill_(fill), k.fill_(abs(fill)), v)
    out, _ = run_call(operands, sparse_call(shape, [0.5, 0.9], [OFF, 0.0], [NO_SKIP, -8.0]))
    assert out.isfinite().all()


def test_future_tokens_change_nothing_under_a_given_mask() -> None:
    for blocks in BLOCKS:
        shape = Shape(2000, 128, heads=2, kv_heads=1, blocks=blocks, **HALF)
        q, k, v = inputs(shape, "cuda")
        live = some_blocks(shape, "cuda")
        before = attend(shape.of(q, k, v), live, NO_SKIP, shape)
        for x, seed in ((q, 1), (k, 2), (v, 3)):
            x[:, :, 1001:] = 20 * inputs(shape, "cuda", seed)[0][:, : x.shape[1], 1001:]
        assert torch.equal(before[:, :, :1001], attend(shape.of(q, k, v), live, NO_SKIP, shape)[:, :, :1001])


def test_offsets_past_32_bits() -> None:
    # The last rows of the last batch element lie more than 2^31 elements after the start of the tensor.
    shape = Shape(130_000, 128, heads=2, kv_heads=2, mask="full", dtype=torch.bfloat16)
    wide = torch.empty(2, shape.length, 66, 128, dtype=torch.bfloat16, device="cuda")
    assert wide.numel() > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (wide[:, :, i : i + 2].transpose(1, 2) for i in (0, 2, 64))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
    live = some_blocks(replace(shape, batch=2), "cuda", share=0.05)
    shape = replace(shape, batch=2)
    operands, contiguous = shape.of(q, k, v), shape.of(q.contiguous(), k.contiguous(), v.contiguous())
    out, near = (attend(each, live, NO_SKIP, shape) for each in (operands, contiguous))
    assert torch.equal(out, near)
    assert out.isfinite().all()
    lists, lists_near = (triton.select(each, sparse_call(shape, 0.3)) for each in (operands, contiguous))
    assert torch.equal(lists.indices, lists_near.indices)


CONSTANTS: dict[str, Any] = {"tau": [0.5, 1.0], "theta": [OFF, OFF], "lam": [NO_SKIP, -9.0]}
CALL = Shape(2000, 128, heads=2, kv_heads=1, **HALF)


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The operator between other operations."""
    out = torch.ops.afbs.sparse_attention(q * 2, k, v, CONSTANTS["tau"], CONSTANTS["theta"], CONSTANTS["lam"], "causal")
    return out.transpose(1, 2).flatten(2) + 1


def test_cuda_graph_capture() -> None:
    q, k, v = inputs(CALL, "cuda")
    run(q, k, v)  # compiles the kernels and uploads the constants
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(q, k, v)
    for x, seed in ((q, 1), (k, 2), (v, 3)):
        x.copy_(inputs(CALL, "cuda", seed)[0][:, : x.shape[1]])
    graph.replay()
    torch.testing.assert_close(out, run(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_with_inductor(mode: str, dynamic: bool) -> None:
    launcher.device_constants.cache_clear()
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, mode=mode, dynamic=dynamic)
    with torch.no_grad():
        for _ in range(4):
            q, k, v = inputs(CALL, "cuda")
            torch.testing.assert_close(compiled(q, k, v), run(q, k, v), rtol=1e-2, atol=1e-2)


def test_the_operator_does_not_synchronise() -> None:
    q, k, v = inputs(CALL, "cuda")
    run(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_opcheck() -> None:
    q, k, v = inputs(replace(CALL, length=300), "cuda")
    torch.library.opcheck(torch.ops.afbs.sparse_attention.default, (q, k, v, *CONSTANTS.values(), "causal"))


def test_dense_calls_are_sdpa_in_the_same_layout() -> None:
    q, k, v = inputs(CALL, "cuda")
    out = torch.ops.afbs.sparse_attention(q, k, v, [1.0] * 2, [OFF] * 2, [NO_SKIP] * 2, "causal")
    assert error(out, dense(CALL.of(q, k, v))) == 0.0
    assert out.transpose(1, 2).is_contiguous()


def test_direct_launches_look_at_alignment_and_sizes_again() -> None:
    for length in (2000, 2000, 2048, 2001):  # the second call of a kind is launched past Triton's inspection
        shape = replace(CALL, length=length)
        q, k, v = inputs(shape, "cuda")
        expected = run(q, k, v)
        for offset in (1, 8, 1):  # elements of two bytes: only eight of them keep the alignment
            moved = [torch.empty(x.numel() + 8, dtype=x.dtype, device="cuda")[offset:][: x.numel()] for x in (q, k, v)]
            moved = [
                m.view(x.transpose(1, 2).shape).transpose(1, 2).copy_(x) for m, x in zip(moved, (q, k, v), strict=True)
            ]
            assert error(run(*moved), expected) <= 1e-2
        assert torch.equal(run(q, k, v), expected)


@pytest.mark.parametrize("blocks", BLOCKS, ids=blocks_id)
def test_heads_in_groups_are_heads_at_once(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(3001, 128, heads=8, kv_heads=4, batch=2, blocks=blocks, **HALF)
    operands = operands_of(shape, "cuda")
    constants = [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0], [OFF, 0.1] * 4, [NO_SKIP, -8.0] * 4
    call = sparse_call(shape, *constants)
    out, counts = run_call(operands, call)
    monkeypatch.setattr(portable, "LISTS_SHARE", 0.0)
    out_in_groups, counts_in_groups = run_call(operands, call)
    assert torch.equal(counts, counts_in_groups)
    assert torch.equal(out, out_in_groups)


@pytest.mark.parametrize("theta", [OFF, 0.2], ids=["theta-off", "theta-on"])
def test_the_predictor_is_captured_and_replayed(theta: float) -> None:
    operands, call = operands_of(CALL, "cuda"), sparse_call(CALL, [0.5, 0.9], [OFF, theta])
    triton.select(operands, call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists = triton.select(operands, call)
    for x, seed in ((operands.q, 1), (operands.k, 2)):
        x.copy_(inputs(CALL, "cuda", seed)[0][:, : x.shape[1]])
    graph.replay()
    for one, other in zip(lists, triton.select(operands, call), strict=True):
        assert torch.equal(one, other)


def test_off_hopper_the_first_long_call_times_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tiling.candidates(BlockShape(128, 128), 128, 2, tiling.Chip(163 << 10, hopper=False))
    monkeypatch.setattr(tiling, "_shapes", lambda _: elsewhere)
    monkeypatch.setattr(tiling, "_chosen", {})
    shape = Shape(4000, 128, heads=2, kv_heads=1, blocks=(128, 128), **HALF)
    operands, live = operands_of(shape, "cuda"), some_blocks(shape, "cuda")
    out = attend(operands, live, NO_SKIP, shape)
    assert error(out, exact(operands, live, shape.blocks)) <= tolerance(operands, live, shape.blocks)
    (chosen,) = tiling._chosen.values()
    assert chosen in elsewhere
    told = launch.described(operands, every_block(shape))
    assert told.startswith(
        f"portable {chosen.tile_q}x{chosen.tile_k} tiles, {chosen.warps} warps, {chosen.stages} stage"
    )
    assert torch.equal(attend(operands, live, NO_SKIP, shape), out)
