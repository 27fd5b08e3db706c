"""The coarse attention on Triton against float64: rows and keys divided among programs, and what it must not see."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.features import first_rows
from afbs_compile.kernels.policies.grouped import GroupedPolicy, block_mass
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.kernels.policies.triton import grouped
from tests.kernels.helpers import TRITON_DEVICE, Shape, operands_of, shape_id
from tests.sweeps import slow_after

GROUP = 16


def mass_of_rows(operands: Operands, shape: Shape) -> Tensor:
    """float64 ``[B, H, n_q, n_k]``, row by row: each group's first row; blurred blocks left out."""
    block_q, block_k = shape.blocks
    count_q, count_k = -(-operands.q_len // block_q), -(-operands.k_len // block_k)
    seen = operands.mask.matrix(operands.q_len, operands.k_len, torch.device("cpu"))
    blurred = operands.mask.visibility(operands.grid(shape.block_shape), torch.device("cpu")).blurred
    clear = ~blurred.repeat_interleave(block_k, 1)[:, : operands.k_len]
    mass = torch.zeros(*operands.q.shape[:2], count_q, count_k, dtype=torch.float64)
    for i in range(count_q):
        firsts = range(i * block_q, min((i + 1) * block_q, operands.q_len), GROUP)
        for row in firsts:
            for head in range(operands.heads):
                keys = operands.k[:, head // operands.groups].double()
                logits = torch.einsum("bd,bkd->bk", operands.q[:, head, row].double(), keys) * operands.scale
                weights = logits.masked_fill(~(seen[row] & clear[i]), -math.inf).softmax(-1).nan_to_num(0.0)
                for j in range(count_k):
                    mass[:, head, i, j] += weights[:, j * block_k : (j + 1) * block_k].sum(-1) / len(firsts)
    return mass


def by_triton(operands: Operands, shape: Shape, of_groups: Tensor) -> Tensor:
    """The mean that the kernels write over some masses."""
    out = of_groups.float().log().to(TRITON_DEVICE).view(torch.int32).contiguous()
    moved = replace(operands, q=operands.q.to(TRITON_DEVICE), k=operands.k.to(TRITON_DEVICE))
    grouped.write_log_mass(first_rows(moved), moved, shape.block_shape, out, averaged=True)
    return out.view(torch.float32).exp().cpu()


def drawn_masses(operands: Operands, shape: Shape) -> Tensor:
    grid = operands.grid(shape.block_shape)
    generator = torch.Generator().manual_seed(2)
    return torch.rand(*operands.q.shape[:2], grid.count_q, grid.count_k, generator=generator) / grid.count_k


def visible(operands: Operands, shape: Shape) -> Tensor:
    return operands.mask.visibility(operands.grid(shape.block_shape), torch.device("cpu")).visible


def divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """More programs and more launches than lengths of a test would need."""
    monkeypatch.setattr(grouped, "COLUMNS", 256)
    monkeypatch.setattr(grouped, "SUMS_AT_ONCE", 1)


SHAPES = [
    Shape(length=333, head_dim=33, heads=4, kv_heads=2, batch=2, blocks=(64, 32), layout="gaps"),
    Shape(length=300, heads=2, kv_heads=1, blocks=(128, 64), mask="full", layout="strided", scale=-0.3),
    Shape(length=1288, head_dim=128, heads=1, kv_heads=1, blocks=(128, 128), dtype=torch.bfloat16),
    Shape(length=1097, head_dim=80, heads=2, kv_heads=1, dtype=torch.float32, mask="full"),
    Shape(length=90, head_dim=16, blocks=(32, 16), dtype=torch.float16, scale=0.3, layout="bnhd"),
    Shape(length=200, head_dim=192, heads=1, kv_heads=1, blocks=(16, 16), dtype=torch.bfloat16),
    Shape(length=5, head_dim=64),
    Shape(length=1, head_dim=64, mask="full"),
]


@pytest.mark.parametrize("shape", slow_after(6, SHAPES), ids=shape_id)
@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
def test_the_mean_of_either_mass(shape: Shape, divided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if divided:
        divide(monkeypatch)
    operands = operands_of(shape)
    of_groups = drawn_masses(operands, shape)
    expected, there = (mass_of_rows(operands, shape) + of_groups) / 2, visible(operands, shape)
    came = by_triton(operands, shape, of_groups)
    torch.testing.assert_close(came.double()[..., there], expected[..., there], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("shape", slow_after(3, SHAPES), ids=shape_id)
@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if isinstance(policy, GroupedPolicy)])
def test_the_mass_of_every_policy_by_groups(
    policy: str, shape: Shape, divided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if divided:
        divide(monkeypatch)
    operands, by = operands_of(shape), POLICIES[policy]
    moved = replace(operands, q=operands.q.to(TRITON_DEVICE), k=operands.k.to(TRITON_DEVICE))
    grid = operands.grid(shape.block_shape)
    out = torch.full((*operands.q.shape[:2], grid.count_q, grid.count_k), -7, dtype=torch.int32, device=TRITON_DEVICE)
    grouped.write_log_mass(by.features_on_gpu(moved), moved, shape.block_shape, out)
    came = out.view(torch.float32).exp().cpu()
    expected = block_mass(by.features(operands), operands, shape.block_shape)
    rounding = 2e-2 if policy == "cumulant" and shape.dtype != torch.float32 else 1e-4
    torch.testing.assert_close(came, expected, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_tilings_hold_a_row_and_whole_blocks(dim: int, large: bool) -> None:
    for size, per_k in ((2, 8), (2, 128), (4, 4)):
        tiling = grouped.Tiling.of(dim, size, per_k, large=large)
        assert tiling.depth * tiling.chunks >= dim
        assert tiling.cols % per_k == tiling.columns % tiling.cols == tiling.rows % grouped.ROWS_NORMALISED == 0
        held = (tiling.rows + tiling.cols * tiling.stages) * tiling.depth * size
        assert held <= (96 if large else 64) * 1024


@pytest.mark.parametrize("policy", ["antidiagonal", "cumulant", "vertical_slash"])
def test_logits_that_leave_fp32_are_marked_where_they_lie(policy: str) -> None:
    shape = Shape(330, heads=4, kv_heads=2, blocks=(64, 32))
    operands = operands_of(shape)
    operands.q[0, 1, 70] = operands.q[0, 1, 64] = 1e21
    operands.k[0, 0, 130] = operands.k[0, 0, 128] = 1e21
    features = POLICIES[policy].features(operands)  # type: ignore[attr-defined]
    out = torch.zeros(1, 4, 6, 11, dtype=torch.int32)
    grouped.mark_overflow(features, shape.block_shape, out)
    marked = out.view(torch.float32).isnan()
    expected = torch.zeros_like(marked)
    expected[0, 1, 1, 4] = True  # only there both are large
    if policy == "cumulant":  # whose second order squares either
        expected[0, 1, 1] = expected[0, :2, :, 4] = True
    assert torch.equal(marked, expected)


def test_long_rows_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with much shared memory."""
    monkeypatch.setattr(grouped, "capability", lambda _: 9)
    shape = SHAPES[2]
    operands = operands_of(shape)
    moved = replace(operands, q=operands.q.to(TRITON_DEVICE), k=operands.k.to(TRITON_DEVICE))
    features = POLICIES["cumulant"].features_on_gpu(moved)
    assert grouped.Tiling.of(features.q.shape[3], 2, 8, large=True).chunks == 1
    out = torch.empty(1, 1, 11, 11, dtype=torch.int32, device=TRITON_DEVICE)
    grouped.write_log_mass(features, moved, shape.block_shape, out)
    expected = block_mass(POLICIES["cumulant"].features(operands), operands, shape.block_shape)
    torch.testing.assert_close(out.view(torch.float32).exp().cpu(), expected, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("blocks", [(64, 64), (128, 32)])
def test_rows_behind_a_cache(blocks: tuple[int, int]) -> None:
    shape = Shape(length=200, heads=2, kv_heads=1, blocks=blocks)
    long = operands_of(replace(shape, length=456))
    operands = replace(long, q=long.q[:, :, 256:], mask=mask_of("causal_end"))
    of_groups = drawn_masses(operands, shape)
    expected, there = (mass_of_rows(operands, shape) + of_groups) / 2, visible(operands, shape)
    came = by_triton(operands, shape, of_groups)
    torch.testing.assert_close(came.double()[..., there], expected[..., there], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_other_rows_and_later_keys_change_no_bit(value: float) -> None:
    """Rows that are not sampled, keys that no sampled row of a query block sees, and heads beside."""
    shape = Shape(length=420, heads=4, kv_heads=2)
    operands = operands_of(shape)
    of_groups = drawn_masses(operands, shape)
    before = by_triton(operands, shape, of_groups)
    q, k = operands.q.clone(), operands.k.clone()
    rows = torch.arange(shape.length) % GROUP != 0
    q[:, :, rows] = value
    k[:, :, 320:] = value
    k[:, 1] = value
    after = by_triton(replace(operands, q=q, k=k), shape, of_groups)
    there = visible(operands, shape)
    there[5:] = False
    assert torch.equal(before[:, :2][..., there], after[:, :2][..., there])


def test_a_row_that_meets_nan_has_nan_where_it_looks() -> None:
    shape = Shape(length=420, heads=2, kv_heads=1)
    operands = operands_of(shape)
    operands.k[:, :, 130] = math.nan
    came = by_triton(operands, shape, drawn_masses(operands, shape))
    there = visible(operands, shape)
    assert not came[:, :, :2][..., there[:2]].isnan().any()
    assert came[:, :, 3:][..., there[3:]].isnan().all()
