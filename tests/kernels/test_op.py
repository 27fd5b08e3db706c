"""``afbs::sparse_attention``: dispatch, checks, and life in eager, compiled and exported graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels import op
from afbs_compile.kernels.attend.engines import family_on
from afbs_compile.kernels.attend.flex import engine as flex
from afbs_compile.kernels.attend.portable import engine as portable
from afbs_compile.kernels.attend.portable.engine import Portable
from afbs_compile.kernels.attend.run import run as run_call
from afbs_compile.kernels.blocks import block_count
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import DTYPES
from afbs_compile.kernels.select import triton
from afbs_compile.kernels.spec import attention
from afbs_compile.kernels.spec.selection import live_blocks
from tests.kernels.helpers import (
    MASKS,
    NO_SKIP,
    OFF,
    TRITON,
    TRITON_DEVICE,
    Shape,
    all_blocks,
    blocks_id,
    dense,
    error,
    exact,
    in_double,
    inputs,
    on,
    operands_of,
    sparse_call,
    tolerance,
)
from tests.kernels.test_operands import REFUSED_OPERANDS

SHAPE = Shape(length=300, heads=4, kv_heads=2, batch=2, layout="bnhd")
MIXED = {"tau": [1.0, 0.3, 0.6, 0.9], "theta": [OFF, 0.1, OFF, 0.2], "lam": [NO_SKIP] * 4}
"""One DENSE head among sparse ones."""
DENSE = {"tau": [1.0] * 4, "theta": [OFF] * 4, "lam": [NO_SKIP] * 4}
SPARSE_OP = torch.ops.afbs.sparse_attention


def run(q: Tensor, k: Tensor, v: Tensor, shape: Shape = SHAPE, **constants: Any) -> Tensor:
    """The operator, with the shape's call."""
    c = {**MIXED, **constants}
    return SPARSE_OP(
        q, k, v, c["tau"], c["theta"], c["lam"], shape.mask, shape.scale, *shape.blocks, c.get("min_length", 0)
    )


def mixed(shape: Shape = SHAPE) -> SparseCall:
    """:data:`MIXED` as a call."""
    return sparse_call(shape, **MIXED)


@pytest.fixture(autouse=True)
def compile_as_often_as_needed() -> Iterator[None]:
    """Every test compiles the same code; a reset of Dynamo between them would also drop FlexAttention's kernels."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


class Model(torch.nn.Module):
    """The operator between other operations, as a rewritten graph has it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = run(q * 2, k, v, scale=None)
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1) + 1


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128)], ids=blocks_id)
def test_operator_is_the_specification(mask: str, blocks: tuple[int, int]) -> None:
    shape = replace(SHAPE, length=450, mask=mask, blocks=blocks)
    operands = operands_of(shape)
    out = run(operands.q, operands.k, operands.v, shape)
    assert error(out, attention.sparse_attention(operands, mixed(shape))) <= 1e-5
    assert error(out[:, 0], dense(operands)[:, 0]) <= 1e-5, "the DENSE head"
    assert error(out, dense(operands)) > 1e-3, "nothing was sparse"


def test_specification_flex_and_triton_agree_end_to_end() -> None:
    shape = replace(SHAPE, batch=1)
    operands, call = operands_of(shape), mixed(shape)
    expected = attention.sparse_attention(operands, call)
    assert error(run(operands.q, operands.k, operands.v, shape), expected) <= 1e-5
    on_triton = on(operands, TRITON_DEVICE)
    live = live_blocks(operands, call)
    assert torch.equal(triton.select(on_triton, call).counts.cpu(), live.sum(-1, dtype=torch.int32))
    assert error(TRITON.attend(on_triton, live.to(TRITON_DEVICE), call).cpu(), expected) <= 1e-5


@pytest.mark.parametrize("token", [63, 64, 150, 255])
def test_end_to_end_a_later_token_changes_no_query_block_that_ends_before_it(token: int) -> None:
    q, k, v = inputs(SHAPE)
    before = run(q, k, v)
    for x, seed in ((q, 21), (k, 22), (v, 23)):
        x[:, :, token + 1 :] = 50 * inputs(SHAPE, seed=seed)[0][:, : x.shape[1], token + 1 :]
    after = run(q, k, v)
    safe = (token + 1) // SHAPE.blocks[0] * SHAPE.blocks[0]
    assert torch.equal(before[:, :, :safe], after[:, :, :safe])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("why", ["all-heads-dense", "too-short"])
def test_dense_calls_are_sdpa(dtype: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the sparse engine ran")

    monkeypatch.setattr(op, "run", refuse)
    shape = replace(SHAPE, dtype=dtype)
    operands = operands_of(shape)
    given = DENSE if why == "all-heads-dense" else {"min_length": shape.length + 1}
    out = run(operands.q, operands.k, operands.v, shape, **given)
    assert torch.equal(out, dense(operands))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("constants", [DENSE, MIXED], ids=["dense", "sparse"])
@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.2])
@pytest.mark.parametrize("mask", MASKS)
def test_any_scale_is_the_softmax_it_says(mask: str, scale: float, constants: dict[str, list[float]]) -> None:
    # PyTorch's own CPU kernels return NaN for is_causal=True with a scale of 0 or less.
    for length in (5, 200):
        shape = replace(SHAPE, length=length, mask=mask, scale=scale)
        operands = operands_of(shape)
        live = all_blocks(shape) if constants is DENSE else live_blocks(operands, mixed(shape))
        out = run(operands.q, operands.k, operands.v, shape, **constants)
        scores = in_double(operands).q @ operands.k.double().repeat_interleave(2, 1).mT * scale
        allowed = live.repeat_interleave(64, 2).repeat_interleave(64, 3)[..., :length, :length]
        allowed = allowed & operands.mask.matrix(length, length, operands.device)
        truth = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ operands.v.double().repeat_interleave(2, 1)
        assert error(out, truth) <= 1e-5


def test_min_length_itself_is_sparse() -> None:
    q, k, v = inputs(SHAPE)
    assert torch.equal(run(q, k, v, min_length=SHAPE.length), run(q, k, v))


def test_a_run_never_dispatches_to_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "dense_attention", None)
    operands = operands_of(SHAPE)
    out, counts = run_call(operands, sparse_call(SHAPE, **DENSE))
    assert error(out, dense(operands)) <= 1e-5
    assert counts.dtype == torch.int32
    assert counts.tolist() == [[[1, 2, 3, 4, 5]] * 4] * 2
    out, counts = run_call(operands, mixed())
    live = live_blocks(operands, mixed())
    assert torch.equal(counts, live.sum(-1, dtype=torch.int32))
    assert error(out, exact(operands, live, SHAPE.blocks)) <= 1e-5


@pytest.mark.parametrize(("batch", "length"), [(0, 300), (2, 0), (0, 0)], ids=["batch0", "length0", "both"])
def test_empty_calls_return_empty(batch: int, length: int) -> None:
    q, k, v = (torch.zeros(batch, h, length, 64) for h in (4, 2, 2))
    assert run(q, k, v).shape == q.shape
    out, counts = run_call(SHAPE.of(q, k, v), mixed())
    assert out.shape == q.shape
    assert counts.shape == (batch, 4, block_count(length, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_one_token(dtype: torch.dtype) -> None:
    q, k, v = inputs(replace(SHAPE, length=1, dtype=dtype))
    assert torch.equal(run(q, k, v), v.repeat_interleave(2, 1))


@pytest.mark.parametrize("fill", [0.0, 1.0, 6e4], ids=["zeros", "ones", "6e4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_constant_inputs_give_finite_results(fill: float, dtype: torch.dtype) -> None:
    shape = replace(SHAPE, dtype=dtype, head_dim=60 if dtype == torch.float16 else 64)
    q, k, _ = (torch.full_like(x, fill) for x in inputs(shape))
    v = inputs(shape)[2]
    assert run(q, k, v, shape).isfinite().all()


def test_nan_in_one_head_stays_there() -> None:
    q, k, v = inputs(SHAPE)
    clean = run(q, k, v)
    q[1, 3, 100] = torch.nan
    out = run(q, k, v)
    out[1, 3], clean[1, 3] = 0.0, 0.0
    assert torch.equal(out, clean)


@pytest.mark.parametrize("constants", [MIXED, DENSE], ids=["mixed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("layout", "mask"), [("bhnd", "causal"), ("bnhd", "causal"), ("bhnd", "full")])
def test_opcheck(constants: dict[str, list[float]], dtype: torch.dtype, layout: str, mask: str) -> None:
    shape = replace(SHAPE, length=130, dtype=dtype, head_dim=64 if dtype == torch.float32 else 96, layout=layout)
    args = (*inputs(shape), *(constants[name] for name in ("tau", "theta", "lam")), mask)
    torch.library.opcheck(SPARSE_OP.default, args)


@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
def test_compiles_into_one_graph(dynamic: bool | None) -> None:
    compiled = torch.compile(Model(), fullgraph=True, dynamic=dynamic)
    for length in (300, 200, 333, 1):
        q, k, v = inputs(replace(SHAPE, length=length))
        assert error(compiled(q, k, v), Model()(q, k, v)) <= 1e-6


def test_dynamic_lengths_compile_once() -> None:
    compiles = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(Model(), fullgraph=True, dynamic=True, backend=backend)
    for length in (300, 200, 64, 500):
        compiled(*inputs(replace(SHAPE, length=length)))
    assert len(compiles) == 1


def test_runs_inside_a_backend_while_another_graph_is_compiled() -> None:
    errors = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        operands = operands_of(SHAPE)
        out = run(operands.q, operands.k, operands.v)
        errors.append(error(out, attention.sparse_attention(operands, mixed())))
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(3))
    assert len(errors) == 1
    assert errors[0] <= 1e-5


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_exports(dynamic: bool) -> None:
    auto = torch.export.Dim.DYNAMIC
    dims = {name: {0: auto, 2: auto} for name in "qkv"} if dynamic else None
    program = torch.export.export(Model(), inputs(SHAPE), dynamic_shapes=dims)
    assert "afbs.sparse_attention" in program.graph_module.code
    example = inputs(replace(SHAPE, batch=3, length=150) if dynamic else SHAPE)
    assert torch.equal(program.module()(*example), Model()(*example))


def test_half_precision_is_as_exact_as_sdpa() -> None:
    for dtype, dim in ((torch.float16, 60), (torch.bfloat16, 96)):
        shape = replace(SHAPE, dtype=dtype, head_dim=dim)
        operands = operands_of(shape)
        out, _ = run_call(operands, sparse_call(shape, **DENSE))
        assert error(out, dense(in_double(operands))) <= tolerance(operands)


@pytest.mark.parametrize("constants", [MIXED, DENSE], ids=["mixed", "dense"])
def test_autocast_changes_nothing(constants: dict[str, list[float]]) -> None:
    q, k, v = inputs(SHAPE)
    expected = run(q, k, v, **constants)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(q, k, v, **constants)
    assert torch.equal(out, expected)


def test_inference_mode_gives_the_same() -> None:
    expected = run(*inputs(SHAPE))
    with torch.inference_mode():
        assert torch.equal(run(*inputs(SHAPE)), expected)


@pytest.mark.parametrize("kv_heads", [6, 3, 2], ids=["mha", "gqa2", "gqa3"])
@pytest.mark.slow
def test_groups_of_heads_give_what_all_heads_give(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(length=300, heads=6, kv_heads=kv_heads, batch=2, layout="bnhd")
    operands = operands_of(shape, TRITON_DEVICE)
    heads = [0.2, 0.4, 0.6, 0.8, 0.9, 1.0], [OFF, 0.1, 0.2, OFF, 0.1, OFF], [NO_SKIP, -2.0, -4.0, 0.0, NO_SKIP, -1.0]
    call = sparse_call(shape, *heads)
    monkeypatch.setattr(portable, "runs_triton", lambda device: True)
    at_once, counts = run_call(operands, call)
    made = []
    select = triton.select
    monkeypatch.setattr(portable, "LISTS_SHARE", 0.0)
    monkeypatch.setattr(triton, "select", lambda operands, call: made.append(call) or select(operands, call))
    out, counts_in_groups = run_call(operands, call)
    assert len(made) == kv_heads
    assert torch.equal(out, at_once)
    assert torch.equal(counts_in_groups, counts)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "blocks", "expected"),
    [(32768, 32, 32, (128, 128), 32), (131072, 32, 32, (128, 128), 32), (131072, 32, 32, (64, 64), 8),
     (131072, 32, 8, (64, 64), 4), (2**20, 32, 8, (64, 64), 4)],
)  # fmt: skip
def test_lists_take_a_small_part_of_the_memory(
    length: int, heads: int, kv_heads: int, blocks: tuple[int, int], expected: int
) -> None:
    shape = Shape(length, 128, heads=heads, blocks=blocks)
    q, k = (torch.empty(1, h, length, 128, dtype=torch.bfloat16, device="meta") for h in (heads, kv_heads))
    assert Portable().heads_at_once(shape.of(q, k, k), sparse_call(shape, 0.5)) == expected


def test_families_of_engines() -> None:
    assert family_on(torch.device("cpu")) == "flex"
    assert family_on(torch.device("xpu")) == "flex"
    assert family_on(torch.device("cuda", 1)) == "triton"


def test_a_gradient_is_refused() -> None:
    q, k, v = inputs(SHAPE)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match=r"has no gradient: run the model under torch\.no_grad"):
        run(q, k, v)
    with torch.no_grad():
        run(q, k, v)
    run(q.detach(), k, v)


REFUSED_CONSTANTS = {
    "tau has 3 constants; accepted: one for each of the 4 query heads": {"tau": [0.5] * 3},
    "lam has 0 constants; accepted: one": {"lam": []},
    r"theta is \[0.0, inf, 0.0, 0.0\]; accepted: finite": {"theta": [0.0, float("inf"), 0.0, 0.0]},
    r"tau is \[nan, 0.5, 0.5, 0.5\]; accepted: finite": {"tau": [float("nan"), 0.5, 0.5, 0.5]},
    "lam is .*; accepted: numbers at most 0": {"lam": [1.0, 0.0, 0.0, 0.0]},
    "block_q is 96; accepted: 16, 32, 64, 128": {"blocks": (96, 64)},
    "block_q is 64 and block_k is 128; accepted: block_q a multiple": {"blocks": (64, 128)},
    "mask is 'banded'; accepted: full, causal": {"mask": "banded"},
}


@pytest.mark.parametrize("sentence", REFUSED_OPERANDS)
def test_operands_are_refused_in_a_sentence(sentence: str) -> None:
    qkv = REFUSED_OPERANDS[sentence](list(inputs(SHAPE)))
    with pytest.raises(ValueError, match=sentence):
        run(*qkv)


@pytest.mark.parametrize("sentence", REFUSED_CONSTANTS)
def test_constants_are_refused_in_a_sentence(sentence: str) -> None:
    constants = dict(REFUSED_CONSTANTS[sentence])
    shape = replace(SHAPE, **{name: constants.pop(name) for name in ("blocks", "mask") if name in constants})
    with pytest.raises(ValueError, match=sentence):
        run(*inputs(SHAPE), shape, **constants)


def test_refused_while_tracing_too() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    q, k, v = (mode.from_tensor(x) for x in inputs(SHAPE))
    shorter = k[:, :, 1:]
    with mode, pytest.raises(ValueError, match="v has size 300 in dimension 2"):
        run(q, shorter, v)


def test_the_engine_is_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_attend_by_rows", None)
    q, k, v = inputs(SHAPE)
    compiled = torch.compile(Model(), fullgraph=True)
    assert error(compiled(q, k, v), Model()(q, k, v)) <= 1e-6
