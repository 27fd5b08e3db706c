"""Attention over given blocks: every engine against SDPA and against the specification in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.attend.portable import launch, tiling
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.attention import masked_attention
from tests.kernels.helpers import (
    ATTENTIONS,
    FLEX,
    MASKS,
    NO_SKIP,
    TRITON,
    TRITON_DEVICE,
    Attention,
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
    some_blocks,
    sparse_call,
    tolerance,
)

LAYOUTS = ["bhnd", "bnhd", "gaps", "strided"]

# FlexAttention compiles once for each (dtype, head_dim, groups, single key head or not): few kinds, many shapes.
FLEX_KINDS = [
    (torch.float32, 64, 1, 2),
    (torch.float32, 64, 4, 1),
    (torch.float32, 256, 8, 1),
    (torch.float32, 17, 2, 2),
    (torch.float16, 60, 1, 2),
    (torch.bfloat16, 96, 2, 2),
]


def random_shapes(engine: Attention, count: int) -> list[Shape]:
    """Shapes over the whole contract, the same in every run."""
    draw = random.Random(3)
    shapes = []
    for index in range(count):
        dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
        head_dim, (groups, kv_heads) = draw.randint(16, 256), draw.choice([(1, 1), (1, 2), (2, 2), (4, 1), (8, 1)])
        if engine is FLEX:
            dtype, head_dim, groups, kv_heads = FLEX_KINDS[index % len(FLEX_KINDS)]
        blocks = draw.choice([(64, 64), (128, 64), (128, 128)])
        shapes.append(
            Shape(
                length=draw.randint(1, 1000) if index % 4 == 0 and groups < 4 else draw.randint(1, 300),
                head_dim=head_dim,
                heads=kv_heads * groups,
                kv_heads=kv_heads,
                batch=draw.randint(1, 4) if groups < 4 else 1,
                dtype=dtype,
                mask="causal" if draw.random() < 0.5 else "full",
                blocks=blocks,
                layout=draw.choice(LAYOUTS),
            )
        )
    return shapes


CASES = [
    pytest.param(engine, shape, id=f"{engine}-{shape}", marks=[pytest.mark.slow] if index >= 12 else [])
    for engine in (FLEX, TRITON)
    for index, shape in enumerate(random_shapes(engine, 24))
]


@pytest.mark.parametrize(("engine", "shape"), CASES)
def test_every_block_kept_is_sdpa(engine: Attention, shape: Shape) -> None:
    operands = operands_of(shape, engine.device)
    out = engine.attend(operands, all_blocks(shape, engine.device), every_block(shape))
    assert error(out, dense(in_double(operands))) <= tolerance(operands)


@pytest.mark.parametrize(("engine", "shape"), CASES)
def test_some_blocks_kept_is_the_specification(engine: Attention, shape: Shape) -> None:
    operands = operands_of(shape, engine.device)
    live = some_blocks(shape, engine.device, seed=shape.length)
    out = engine.attend(operands, live, every_block(shape))
    assert error(out, exact(operands, live, shape.blocks)) <= tolerance(operands, live, shape.blocks)


@pytest.mark.parametrize("engine", ATTENTIONS, ids=str)
def test_output_is_free_to_be_flattened(engine: Attention) -> None:
    shape = Shape(length=150, heads=4, batch=2, layout="gaps")
    operands = operands_of(shape, engine.device)
    out = engine.attend(operands, all_blocks(shape, engine.device), every_block(shape))
    assert out.dtype == operands.q.dtype
    if engine.name != "reference":
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("engine", ATTENTIONS, ids=str)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (128, 128)], ids=blocks_id)
@pytest.mark.parametrize("token", [0, 100, 127, 128, 299])
def test_future_tokens_change_nothing_under_a_given_mask(
    engine: Attention, blocks: tuple[int, int], token: int
) -> None:
    shape = Shape(length=300, blocks=blocks)
    q, k, v = inputs(shape, engine.device)
    live = some_blocks(shape, engine.device, share=0.6)
    before = engine.attend(shape.of(q, k, v), live, every_block(shape))
    for x, seed in ((q, 11), (k, 12), (v, 13)):
        x[:, :, token + 1 :] = 100 * inputs(shape, engine.device, seed)[0][:, :, token + 1 :]
    after = engine.attend(shape.of(q, k, v), live, every_block(shape))
    assert torch.equal(before[:, :, : token + 1], after[:, :, : token + 1])
    assert token == 299 or not torch.equal(before[:, :, token + 1 :], after[:, :, token + 1 :])


@pytest.mark.parametrize("engine", ATTENTIONS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_stays_in_its_head_and_batch(engine: Attention, mask: str, poisoned: str) -> None:
    shape = Shape(length=200, heads=4, kv_heads=4, batch=2, mask=mask)
    q, k, v = inputs(shape, engine.device)
    live = all_blocks(shape, engine.device)
    clean = engine.attend(shape.of(q, k, v), live, every_block(shape))
    {"q": q, "k": k, "v": v}[poisoned][1, 2, 70] = torch.nan
    out = engine.attend(shape.of(q, k, v), live, every_block(shape))
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[1, 2] = True
    assert torch.equal(out[~touched], clean[~touched])
    assert out[1, 2, 70].isnan().all()
    if poisoned == "k":
        assert out[1, 2, 70 if mask == "causal" else 0 :].isnan().all()
    if poisoned == "q":
        assert torch.equal(out[1, 2, 71:], clean[1, 2, 71:])
    if (
        mask == "causal"
    ):  # keys of the same block are multiplied by exact zeros, and 0 * NaN is NaN; earlier blocks are clean
        assert torch.equal(out[1, 2, :64], clean[1, 2, :64])


EXTREMES = {
    "zeros": lambda x: torch.zeros_like(x),
    "ones": lambda x: torch.ones_like(x),
    "1e4": lambda x: (x * 1e4).clamp(-6e4, 6e4),
    "6e4": lambda x: torch.full_like(x, 6e4),
    "tiny": lambda x: x * 1e-7,
}


@pytest.mark.parametrize("engine", ATTENTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_values_give_finite_results(engine: Attention, dtype: torch.dtype, extreme: str) -> None:
    shape = Shape(length=150, dtype=dtype, head_dim=64 if dtype == torch.float32 else 60)
    q, k, _ = (EXTREMES[extreme](x) for x in inputs(shape, engine.device))
    v = inputs(shape, engine.device)[2]
    live = some_blocks(shape, engine.device)
    out = engine.attend(shape.of(q, k, v), live, every_block(shape))
    assert out.isfinite().all()
    if extreme not in ("1e4", "6e4"):  # there one key takes all, and rounding decides between ties
        assert error(out, exact(shape.of(q, k, v), live, shape.blocks)) <= (1e-5 if dtype == torch.float32 else 4e-3)


def some_rows_overflow(q: Tensor, k: Tensor) -> None:
    q[:, :, 5:17] = 0.0
    q[:, :, 5:17, 0] = 3e38
    k[:, :, 3, 0] = 4.0


def some_rows_are_inf_less_inf(q: Tensor, k: Tensor) -> None:
    q[:, :, 5:17] = 0.0
    q[:, :, 5:17, :2] = 3e38
    k[:, :, :, 0], k[:, :, :, 1] = 4.0, -4.0


def keys_of_a_block_underflow(q: Tensor, k: Tensor) -> None:
    q[..., 0] = q[..., 0].abs() + 10
    k[..., 0] = 0.0
    k[:, :, :64, 0] = -3e38


def everything_overflows(q: Tensor, k: Tensor) -> None:
    q.mul_(1e25)
    k.mul_(1e25)


@pytest.mark.parametrize("engine", ATTENTIONS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "extreme", [some_rows_overflow, some_rows_are_inf_less_inf, keys_of_a_block_underflow, everything_overflows]
)
def test_scores_that_leave_fp32_give_what_a_softmax_in_fp32_gives(
    engine: Attention, dtype: torch.dtype, mask: str, extreme: Callable[[Tensor, Tensor], None]
) -> None:
    """NaN in the rows that meet +inf and in no other; a score of -inf is a key that is not seen."""
    shape = Shape(length=300, dtype=dtype, mask=mask, head_dim=64 if dtype == torch.float32 else 96)
    q, k, v = inputs(shape, engine.device)
    extreme(q, k)
    operands = shape.of(q, k, v)
    live = all_blocks(shape, engine.device)
    out = engine.attend(operands, live, every_block(shape)).float()
    scores = q.float() @ k.float().mT * operands.scale
    scores = scores.masked_fill(~operands.mask.matrix(300, 300, q.device), -torch.inf)
    seen = ~(scores == -torch.inf).all(-1)  # a row without any other score is 0 or NaN, as in PyTorch
    expected = scores.softmax(-1) @ v.float()
    assert torch.equal(out[seen].isnan(), expected[seen].isnan())
    assert expected[seen].isnan().any() == (extreme is not keys_of_a_block_underflow)
    torch.testing.assert_close(
        out[seen], expected[seen], equal_nan=True, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0
    )
    if dtype == torch.float32:
        assert torch.equal(out[seen].isnan(), dense(operands)[seen].isnan())


@pytest.mark.parametrize("engine", ATTENTIONS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_infinite_values_reach_the_rows_that_see_them(
    engine: Attention, dtype: torch.dtype, mask: str, value: float
) -> None:
    shape = Shape(length=300, dtype=dtype, mask=mask, head_dim=64 if dtype == torch.float32 else 96)
    q, k, v = inputs(shape, engine.device)
    v[:, :, 150, 3] = value
    out = engine.attend(shape.of(q, k, v), all_blocks(shape, engine.device), every_block(shape))
    sees = slice(150 if mask == "causal" else 0, None)
    assert (out[:, :, sees, 3] == value).all()
    apart = torch.arange(shape.head_dim) != 3
    assert out[..., apart].isfinite().all()
    assert out[:, :, : 128 if mask == "causal" else 0].isfinite().all()  # before the block: see docs/limits.md


@pytest.mark.parametrize("engine", ATTENTIONS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("mask", MASKS)
def test_lengths_around_the_block(engine: Attention, length: int, mask: str) -> None:
    shape = Shape(length=length, mask=mask)
    q, k, v = inputs(shape, engine.device)
    live = some_blocks(shape, engine.device)
    out = engine.attend(shape.of(q, k, v), live, every_block(shape))
    assert error(out, exact(shape.of(q, k, v), live, shape.blocks)) <= 1e-5


@pytest.mark.parametrize("engine", ATTENTIONS, ids=str)
def test_batch_zero(engine: Attention) -> None:
    shape = Shape(length=100, batch=0)
    q, k, v = inputs(shape, engine.device)
    assert engine.attend(shape.of(q, k, v), all_blocks(shape, engine.device), every_block(shape)).shape == q.shape


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_triton_takes_any_scale(scale: float, mask: str) -> None:
    shape = Shape(length=150, scale=scale, mask=mask)
    q, k, v = inputs(shape, TRITON_DEVICE)
    live = some_blocks(shape, TRITON_DEVICE)
    out = TRITON.attend(shape.of(q, k, v), live, every_block(shape))
    assert error(out, exact(shape.of(q, k, v), live, shape.blocks)) <= 1e-5


def skip(operands: Operands, live: Tensor, lam: list[float], shape: Shape) -> tuple[Tensor, Tensor]:
    """Triton's and the specification's result with products skipped."""
    out = TRITON.attend(operands, live, sparse_call(shape, 1.0, lam=lam))
    return out, masked_attention(operands, live, lam, shape.block_shape)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (32, 16)], ids=blocks_id)
@pytest.mark.slow
def test_lambda_skips_what_the_reference_skips(mask: str, blocks: tuple[int, int]) -> None:
    if blocks == (128, 64) and TRITON_DEVICE == "cuda":
        pytest.skip("on a GPU these blocks are cut in fp32; tests/gpu has them in bf16")
    shape = Shape(length=333, heads=4, kv_heads=2, mask=mask, blocks=blocks)
    q, k, v = inputs(shape, TRITON_DEVICE)
    k[:, :, 100:] *= 0.2  # the first keys give most rows their maximum
    live = some_blocks(shape, TRITON_DEVICE, share=0.7)
    out, expected = skip(shape.of(q, k, v), live, [-0.1, -1.0, NO_SKIP, 0.0], shape)
    assert error(out, expected) <= 1e-5
    whole = exact(shape.of(q, k, v), live, shape.blocks)
    assert error(expected[:, 0], whole[:, 0]) > 1e-3, "nothing was skipped: the case is too easy"
    assert error(out[:, 2], whole[:, 2]) <= 1e-5


def test_lambda_looks_at_no_later_row() -> None:
    shape = Shape(length=300, heads=1, kv_heads=1)
    q, k, v = inputs(shape, TRITON_DEVICE)
    k[:, :, 40:] *= 0.2
    live, lam, token = all_blocks(shape, TRITON_DEVICE), [-0.1], 150
    before = skip(shape.of(q, k, v), live, lam, shape)
    for x, seed in ((q, 11), (k, 12), (v, 13)):
        x[:, :, token + 1 :] = 10 * inputs(shape, TRITON_DEVICE, seed)[0][:, :, token + 1 :]
    after = skip(shape.of(q, k, v), live, lam, shape)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, :, : token + 1], other[:, :, : token + 1])


def test_lambda_ignores_rows_past_the_end() -> None:
    # 65 rows: the second query block holds one row and 63 rows of nothing, which must not keep a tile alive.
    shape = Shape(length=65, heads=1, kv_heads=1, mask="full")
    q, k, v = inputs(shape, TRITON_DEVICE)
    k[:, :, 64:] = 0.0
    k[:, :, :64] = q[:, :, 64:]
    out, expected = skip(shape.of(q, k, v), all_blocks(shape, TRITON_DEVICE), [-1.0], shape)
    assert error(out, expected) <= 1e-5


def test_blocks_that_do_not_fit_are_cut_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_shapes", lambda _: (tiling.LaunchShape(32, 64, 4, 1),))
    for mask in MASKS:
        shape = Shape(length=300, head_dim=64, blocks=(128, 128), mask=mask)
        q, k, v = inputs(shape, TRITON_DEVICE)
        live = some_blocks(shape, TRITON_DEVICE)
        # A cut block ignores lambda: it skips nothing.
        out = TRITON.attend(shape.of(q, k, v), live, sparse_call(shape, 1.0, lam=-1.0))
        assert error(out, exact(shape.of(q, k, v), live, shape.blocks)) <= 1e-5


def test_a_row_stride_too_wide_for_32_bits_is_copied() -> None:
    storage = torch.empty(1, dtype=torch.float16, device="meta")
    wide = torch.as_strided(storage, (1, 1, 10, 64), (64, 64, launch.LARGEST_ROW_STRIDE, 1))
    near = torch.as_strided(storage, (1, 1, 10, 64), (64, 64, launch.LARGEST_ROW_STRIDE - 1, 1))
    assert launch._addressable(wide).is_contiguous()
    assert launch._addressable(near) is near


@pytest.mark.parametrize("engine", [FLEX, TRITON], ids=str)
def test_only_live_blocks_are_read(engine: Attention) -> None:
    shape = Shape(length=512, mask="full")
    q, k, v = inputs(shape, engine.device)
    live = some_blocks(replace(shape, heads=1), engine.device).expand(1, 2, -1, -1).clone()
    live[..., 5] = False  # nobody reads block 5
    expected = engine.attend(shape.of(q, k, v), live, every_block(shape))
    k[:, :, 320:384] = v[:, :, 320:384] = torch.nan
    assert torch.equal(engine.attend(shape.of(q, k, v), live, every_block(shape)), expected)
