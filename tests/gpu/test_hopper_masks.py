"""The Hopper kernel on the chip under windows, chunks, offsets and valid keys, over lists of any kind."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.attend.hopper import launch
from afbs_compile.kernels.attend.hopper.engine import Hopper
from afbs_compile.kernels.blocks import BlockShape, lists_of
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.band import seen_by_blocks
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.kernels.sight import sight_of
from tests.any_mask import in_float64, poisoned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

SHAPES = (BlockShape(128, 128), BlockShape(128, 64))
MASKS = ("full", "causal", "causal_end", "window(1)", "window(130)", "chunk(100)", "chunk(256)", "around(70,40)")
LENGTHS = ((700, 700), (300, 801), (801, 300), (129, 64))
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def call_of(mask: str, lengths: tuple[int, int], dtype: torch.dtype, dim: int, valid: str) -> Operands:
    """Random operands, two batch elements; ``valid``: "none", "shared" (one row of memory for both), "some"."""
    generator = torch.Generator().manual_seed(1000 * lengths[0] + lengths[1])
    q_len, k_len = lengths
    q, k, v = (
        torch.randn(2, length, heads, dim, generator=generator).to("cuda", dtype).transpose(1, 2)
        for heads, length in ((4, q_len), (2, k_len), (2, k_len))
    )
    exists = {
        "none": None,
        "shared": (torch.arange(k_len) >= 37)[None].expand(2, -1),
        "some": torch.rand(2, k_len, generator=generator) < 0.5,
    }[valid]
    return Operands(q, k, v, mask_of(mask), dim**-0.5, None if exists is None else exists.to("cuda"))


def attend(operands: Operands, live: Tensor, shape: BlockShape) -> Tensor:
    """The kernel over live blocks; memory that it does not write is NaN."""
    call = SparseCall.uniform(operands.heads, 0.5, shape=shape)
    assert Hopper().refusal(operands, call) is None
    out = empty_output(operands.q, operands.v).fill_(math.nan)
    launch.attend(operands, call, lists_of(live, sight_of(operands, shape).whole), out)
    return out


def some_of(operands: Operands, shape: BlockShape, share: float) -> Tensor:
    """Some of the visible blocks; query blocks may be left without any."""
    visible = sight_of(operands, shape).visible
    generator = torch.Generator("cuda").manual_seed(1)
    grid = operands.grid(shape)
    size = (operands.q.shape[0], operands.heads, grid.count_q, grid.count_k)
    return visible & (torch.rand(size, generator=generator, device="cuda") < share)


@pytest.mark.parametrize("valid", ["none", "shared", "some"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_any_lists_are_the_specification(mask: str, shape: BlockShape, valid: str) -> None:
    for place, lengths in enumerate(LENGTHS):
        dtype, dim = (torch.float16, torch.bfloat16)[place % 2], (64, 128)[(place + len(mask)) % 2]
        operands = call_of(mask, lengths, dtype, dim, valid)
        # Plain kernels would wait forever for a step of an empty list, and are given none: every row sees a key.
        for share in (1.0,) if seen_by_blocks(operands, shape) else (0.3, 1.0):
            live = some_of(operands, shape, share)
            out, exact = attend(operands, live, shape), in_float64(operands, live, shape)
            torch.testing.assert_close(out.cpu().double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", ["causal_end", "window(130)", "chunk(100)"])
def test_query_blocks_without_any_block_are_zero_though_their_rows_see_keys(mask: str, shape: BlockShape) -> None:
    operands = call_of(mask, (700, 777), torch.bfloat16, 128, "none")
    live = some_of(operands, shape, 1.0)
    everything = attend(operands, live, shape)
    for blind in ((0,), (2, 3), (5,), tuple(range(6))):
        fewer = live.clone()
        fewer[:, 1:3, blind] = False
        out, expected = attend(operands, fewer, shape), everything.clone()
        for block in blind:
            expected[:, 1:3, block * shape.q : (block + 1) * shape.q] = 0.0
        assert torch.equal(out, expected)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e4], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_what_no_row_sees_changes_no_bit(mask: str, shape: BlockShape, poison: float) -> None:
    for lengths in LENGTHS:
        for valid in ("none", "shared", "some"):
            operands = call_of(mask, lengths, torch.bfloat16, 64, valid)
            live = sight_of(operands, shape).visible.expand(2, 4, -1, -1)
            out = attend(operands, live, shape)
            assert out.isfinite().all()
            assert torch.equal(attend(poisoned(operands, poison), live, shape), out), (lengths, valid)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", ["causal_end", "window(130)", "chunk(100)"])
def test_a_query_block_keeps_its_bits_whatever_keys_that_it_does_not_see_hold(mask: str, shape: BlockShape) -> None:
    operands = call_of(mask, (600, 777), torch.float16, 128, "shared")
    live = sight_of(operands, shape).visible.expand(2, 4, -1, -1)
    out = attend(operands, live, shape)
    seen = operands.mask.matrix(600, 777, operands.device)
    for key in (776, 700, 500, 300):
        k, v = operands.k.clone(), operands.v.clone()
        k[:, :, key] = v[:, :, key] = math.nan
        other = attend(replace(operands, k=k, v=v), live, shape)
        for first in range(0, 600, shape.q):
            rows = slice(first, first + shape.q)
            if seen[rows, key].any():
                assert not torch.equal(other[:, :, rows], out[:, :, rows]), (key, first)
            else:
                assert torch.equal(other[:, :, rows], out[:, :, rows]), (key, first)
