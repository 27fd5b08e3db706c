"""``afbs::sparse_attention``: dispatch, checks, and life in eager, compiled and exported graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels import checks, flex, op, predict_triton, reference
from tests.kernels.helpers import (
    NO_SKIP,
    TRITON,
    TRITON_DEVICE,
    Shape,
    dense,
    error,
    exact,
    inputs,
    tolerance,
)

OFF = reference.THETA_OFF
SHAPE = Shape(length=300, heads=4, kv_heads=2, batch=2, layout="bnhd")
MIXED = {"tau": [1.0, 0.3, 0.6, 0.9], "theta": [OFF, 0.1, OFF, 0.2], "lam": [NO_SKIP] * 4}
"""One DENSE head among sparse ones."""
DENSE = {"tau": [1.0] * 4, "theta": [OFF] * 4, "lam": [NO_SKIP] * 4}
SPARSE_OP = torch.ops.afbs.sparse_attention


def run(q: Tensor, k: Tensor, v: Tensor, shape: Shape = SHAPE, **constants: Any) -> Tensor:
    """The operator, with the shape's call."""
    c = {**MIXED, **constants}
    return SPARSE_OP(
        q, k, v, c["tau"], c["theta"], c["lam"], shape.causal, shape.scale, shape.block_q, shape.block_k,
        c.get("min_length", 0),
    )  # fmt: skip


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


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128)], ids=["64x64", "128x64", "128x128"])
def test_operator_is_the_specification(causal: bool, blocks: tuple[int, int]) -> None:
    shape = replace(SHAPE, length=450, causal=causal, block_q=blocks[0], block_k=blocks[1])
    q, k, v = inputs(shape)
    expected = reference.sparse_attention(q, k, v, **MIXED, **shape.call)
    out = run(q, k, v, shape)
    assert error(out, expected) <= 1e-5
    assert error(out[:, 0], dense(q, k, v, shape)[:, 0]) <= 1e-5, "the DENSE head"
    assert error(out, dense(q, k, v, shape)) > 1e-3, "nothing was sparse"


def test_reference_flex_and_triton_agree_end_to_end() -> None:
    shape = replace(SHAPE, batch=1)
    q, k, v = inputs(shape)
    expected = reference.sparse_attention(q, k, v, **MIXED, **shape.call)
    assert error(run(q, k, v, shape), expected) <= 1e-5
    on_triton = [x.to(TRITON_DEVICE) for x in (q, k, v)]
    lists = predict_triton.predict_blocks(*on_triton[:2], MIXED["tau"], MIXED["theta"], **shape.call)
    live = reference.predict_mask(q, k, MIXED["tau"], MIXED["theta"], **shape.call)
    assert torch.equal(lists.counts.cpu(), live.sum(-1, dtype=torch.int32))
    assert error(TRITON.attend(*on_triton, live.to(TRITON_DEVICE), **shape.call).cpu(), expected) <= 1e-5


@pytest.mark.parametrize("token", [63, 64, 150, 255])
def test_end_to_end_a_later_token_changes_no_query_block_that_ends_before_it(token: int) -> None:
    q, k, v = inputs(SHAPE)
    before = run(q, k, v)
    for x, seed in ((q, 21), (k, 22), (v, 23)):
        x[:, :, token + 1 :] = 50 * inputs(SHAPE, seed=seed)[0][:, : x.shape[1], token + 1 :]
    after = run(q, k, v)
    safe = (token + 1) // SHAPE.block_q * SHAPE.block_q
    assert torch.equal(before[:, :, :safe], after[:, :, :safe])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("why", ["all-heads-dense", "too-short"])
def test_dense_calls_are_sdpa(dtype: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the sparse engine ran")

    monkeypatch.setattr(op, "_sparse_attention", refuse)
    shape = replace(SHAPE, dtype=dtype)
    q, k, v = inputs(shape)
    out = run(q, k, v, shape, **(DENSE if why == "all-heads-dense" else {"min_length": shape.length + 1}))
    assert torch.equal(out, dense(q, k, v, shape))
    assert out.transpose(1, 2).is_contiguous()


def test_min_length_itself_is_sparse() -> None:
    q, k, v = inputs(SHAPE)
    assert torch.equal(run(q, k, v, min_length=SHAPE.length), run(q, k, v))


def test_with_counts_never_dispatches_to_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_dense_attention", None)
    q, k, v = inputs(SHAPE)
    out, counts = op.sparse_attention_with_counts(q, k, v, **DENSE, **SHAPE.call)
    assert error(out, dense(q, k, v, SHAPE)) <= 1e-5
    assert counts.dtype == torch.int32
    assert counts.tolist() == [[[1, 2, 3, 4, 5]] * 4] * 2
    out, counts = op.sparse_attention_with_counts(q, k, v, **MIXED, **SHAPE.call)
    live = reference.predict_mask(q, k, MIXED["tau"], MIXED["theta"], **SHAPE.call)
    assert torch.equal(counts, live.sum(-1, dtype=torch.int32))
    assert error(out, exact(q, k, v, live, SHAPE)) <= 1e-5


@pytest.mark.parametrize(("batch", "length"), [(0, 300), (2, 0), (0, 0)], ids=["batch0", "length0", "both"])
def test_empty_calls_return_empty(batch: int, length: int) -> None:
    q, k, v = (torch.zeros(batch, h, length, 64) for h in (4, 2, 2))
    assert run(q, k, v).shape == q.shape
    out, counts = op.sparse_attention_with_counts(q, k, v, **MIXED, **SHAPE.call)
    assert out.shape == q.shape
    assert counts.shape == (batch, 4, reference.block_count(length, 64))


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=lambda d: str(d)[6:])
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
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_opcheck(constants: dict[str, list[float]], dtype: torch.dtype, layout: str) -> None:
    shape = replace(SHAPE, length=130, dtype=dtype, head_dim=64 if dtype == torch.float32 else 96, layout=layout)
    args = (*inputs(shape), *(constants[name] for name in ("tau", "theta", "lam")), True)
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
        q, k, v = inputs(SHAPE)
        errors.append(error(run(q, k, v), reference.sparse_attention(q, k, v, **MIXED, **SHAPE.call)))
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
        q, k, v = inputs(shape)
        out, _ = op.sparse_attention_with_counts(q, k, v, **DENSE, **shape.call)
        assert error(out, dense(q.double(), k.double(), v.double(), shape)) <= tolerance(q, k, v, shape)


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
def test_groups_of_heads_give_what_all_heads_give(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(length=300, heads=6, kv_heads=kv_heads, batch=2, layout="bnhd")
    q, k, v = (x.to(TRITON_DEVICE) for x in inputs(shape))
    heads = [0.2, 0.4, 0.6, 0.8, 0.9, 1.0], [OFF, 0.1, 0.2, OFF, 0.1, OFF], [NO_SKIP, -2.0, -4.0, 0.0, NO_SKIP, -1.0]
    monkeypatch.setattr(op, "engine_name", lambda _: "triton")
    at_once, counts = op.sparse_attention_with_counts(q, k, v, *heads, **shape.call)
    made = []
    predict_blocks = op.predict_blocks
    monkeypatch.setattr(op, "LISTS_SHARE", 0.0)
    monkeypatch.setattr(op, "predict_blocks", lambda q, k, *a, **c: made.append(q) or predict_blocks(q, k, *a, **c))
    out, counts_in_groups = op.sparse_attention_with_counts(q, k, v, *heads, **shape.call)
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
    q, k = (torch.empty(1, h, length, 128, dtype=torch.bfloat16, device="meta") for h in (heads, kv_heads))
    assert op.heads_at_once(q, k, *blocks) == expected


def test_engine_names() -> None:
    assert op.engine_name(torch.device("cpu")) == "flex"
    assert op.engine_name(torch.device("xpu")) == "flex"
    assert op.engine_name(torch.device("cuda", 1)) == "triton"


def test_a_gradient_is_refused() -> None:
    q, k, v = inputs(SHAPE)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match=r"has no gradient: run the model under torch\.no_grad"):
        run(q, k, v)
    with torch.no_grad():
        run(q, k, v)
    run(q.detach(), k, v)


def _with(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda qkv: [change(x) if i == index else x for i, x in enumerate(qkv)]


REFUSED_OPERANDS = {
    "q has 3 dimensions; accepted: 4": _with(0, lambda x: x[0]),
    "k has dtype torch.int64; accepted: torch.float16, torch.bfloat16, torch.float32": _with(1, Tensor.long),
    "v is torch.float16 on cpu, q is torch.float32 on cpu; accepted: the same": _with(2, Tensor.half),
    "q has head_dim 8; accepted: 16 to 256": lambda qkv: [x[..., :8] for x in qkv],
    "q has head_dim 257; accepted: 16 to 256": lambda qkv: [F.pad(x, (0, 257 - 64)) for x in qkv],
    "q has 4 heads and k has 3; accepted: a multiple": _with(1, lambda x: F.pad(x, (0, 0, 0, 0, 0, 1))),
    "k has size 299 in dimension 2; accepted: 300": _with(1, lambda x: x[:, :, 1:]),
    "k has size 1 in dimension 0; accepted: 2": _with(1, lambda x: x[:1]),
    "v has size 32 in dimension 3; accepted: 64": _with(2, lambda x: x[..., :32]),
}
REFUSED_CONSTANTS = {
    "tau has 3 constants; accepted: one for each of the 4 query heads": {"tau": [0.5] * 3},
    "lam has 0 constants; accepted: one": {"lam": []},
    r"theta is \[0.0, inf, 0.0, 0.0\]; accepted: finite": {"theta": [0.0, float("inf"), 0.0, 0.0]},
    r"tau is \[nan, 0.5, 0.5, 0.5\]; accepted: finite": {"tau": [float("nan"), 0.5, 0.5, 0.5]},
    "lam is .*; accepted: numbers at most 0": {"lam": [1.0, 0.0, 0.0, 0.0]},
    "block_q is 96; accepted: 16, 32, 64, 128": {"block_q": 96},
    "block_q is 64 and block_k is 128; accepted: block_q a multiple": {"block_k": 128},
}


@pytest.mark.parametrize("sentence", REFUSED_OPERANDS)
def test_operands_are_refused_in_a_sentence(sentence: str) -> None:
    qkv = REFUSED_OPERANDS[sentence](list(inputs(SHAPE)))
    with pytest.raises(ValueError, match=sentence):
        run(*qkv)
    with pytest.raises(ValueError, match=sentence):
        op.sparse_attention_with_counts(*qkv, **MIXED, **SHAPE.call)


@pytest.mark.parametrize("sentence", REFUSED_CONSTANTS)
def test_constants_are_refused_in_a_sentence(sentence: str) -> None:
    changed = REFUSED_CONSTANTS[sentence]
    blocks = {name: value for name, value in changed.items() if name.startswith("block")}
    constants = {name: value for name, value in changed.items() if name not in blocks}
    with pytest.raises(ValueError, match=sentence):
        run(*inputs(SHAPE), replace(SHAPE, **blocks), **constants)


def test_refused_while_tracing_too() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    q, k, v = (mode.from_tensor(x) for x in inputs(SHAPE))
    shorter = k[:, :, 1:]
    with mode, pytest.raises(ValueError, match="k has size 299 in dimension 2"):
        run(q, shorter, v)


def test_the_engine_is_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_attend_by_rows", None)
    q, k, v = inputs(SHAPE)
    compiled = torch.compile(Model(), fullgraph=True)
    assert error(compiled(q, k, v), Model()(q, k, v)) <= 1e-6
