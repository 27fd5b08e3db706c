"""The Hopper kernel on the chip: every configuration that can be chosen, against the specification in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.attend.hopper import launch
from afbs_compile.kernels.attend.hopper.engine import HEAD_DIMS, Hopper
from afbs_compile.kernels.attend.portable import launch as portable_launch
from afbs_compile.kernels.attend.portable.engine import Portable
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockLists, BlockShape, live_of
from afbs_compile.kernels.call import Kept
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.kernels.select import triton
from afbs_compile.kernels.spec.attention import masked_attention
from tests.kernels.helpers import (
    MASKS,
    NO_SKIP,
    Shape,
    all_blocks,
    diagonal_blocks,
    error,
    every_block,
    exact,
    inputs,
    listed,
    operands_of,
    some_blocks,
    sparse_call,
    tolerance,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

CONFIGURATIONS = [
    Shape(1, dim, heads=6, kv_heads=2, batch=2, dtype=dtype, mask=mask, blocks=(128, block_k), layout="bnhd")
    for dtype, dim, block_k, mask in itertools.product((torch.bfloat16, torch.float16), HEAD_DIMS, (128, 64), MASKS)
]
CONFIGURATIONS += [
    Shape(1, dim, heads=4, kv_heads=1, batch=2, dtype=dtype, mask=mask, blocks=(64, 64, 2), layout="bnhd")
    for dtype, dim, mask in itertools.product((torch.bfloat16, torch.float16), HEAD_DIMS, MASKS)
]
EVERY_BLOCKS = pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (64, 64, 2)], ids=str)
PLAIN = Shape(1500, 128, heads=4, kv_heads=2, dtype=torch.bfloat16, blocks=(128, 128))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that no kernel wrote reads as NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def attend(operands: Operands, live: Tensor, shape: Shape) -> Tensor:
    """The Hopper kernel over live blocks."""
    return attend_lists(operands, listed(live, operands, shape.blocks), shape)


def attend_lists(operands: Operands, lists: BlockLists, shape: Shape) -> Tensor:
    """The Hopper kernel over lists."""
    out = empty_output(operands.q, operands.v)
    launch.attend(operands, every_block(shape), lists, out)
    return out


def is_the_specification(operands: Operands, live: Tensor, shape: Shape) -> bool:
    """Whether the kernel is as near to float64 as the contract says."""
    off = error(attend(operands, live, shape), exact(operands, live, shape.blocks))
    return off <= tolerance(operands, live, shape.blocks)


@pytest.mark.parametrize("shape", CONFIGURATIONS, ids=str)
def test_every_configuration_is_the_specification(shape: Shape) -> None:
    for length, share in itertools.product((1, 63, 127, 129, 1000, 2177), (0.0, 0.4, 1.0)):
        case = replace(shape, length=length)
        operands = operands_of(case, "cuda")
        live = some_blocks(case, "cuda", seed=length, share=share)
        out = attend(operands, live, case)
        allowed = tolerance(operands, live, case.blocks)
        assert error(out, exact(operands, live, case.blocks)) <= allowed, (length, share)
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("mask", MASKS)
def test_groups_and_layouts(groups: int, mask: str) -> None:
    for layout in ("bhnd", "bnhd"):
        shape = replace(PLAIN, length=4097, heads=8, kv_heads=8 // groups, batch=2, mask=mask, layout=layout)
        q, k, v = inputs(shape, "cuda")
        live = some_blocks(shape, "cuda", share=0.2)
        # In fp32: float64 at this size is slow, and fp32 is a thousand times finer than bf16.
        single = shape.of(q.float(), k.float(), v.float())
        expected = masked_attention(single, live, [NO_SKIP] * 8, shape.block_shape)
        assert error(attend(shape.of(q, k, v), live, shape), expected) <= 2e-2


@EVERY_BLOCKS
@pytest.mark.parametrize("mask", MASKS)
def test_heads_of_very_different_work_in_one_launch(blocks: tuple[int, ...], mask: str) -> None:
    shape = replace(PLAIN, length=3001, heads=8, kv_heads=8 // BlockShape(*blocks).heads, blocks=blocks, mask=mask)
    q, k, v = inputs(shape, "cuda")
    live = some_blocks(shape, "cuda", share=0.05)
    live[:, 4:6] = all_blocks(shape, "cuda")[:, 4:6]
    live[:, 6:] = some_blocks(shape, "cuda", share=0.0)[:, 6:]
    assert is_the_specification(shape.of(q, k, v), live, shape)


@EVERY_BLOCKS
def test_last_rows_are_whole_whatever_the_order_of_tiles(
    blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CACHED_BYTES", 1)  # key heads take turns one by one
    shape = replace(PLAIN, length=1070, blocks=blocks)  # the last 64 rows lie in two blocks
    operands, call = operands_of(shape, "cuda"), sparse_call(shape, 0.3, kept=Kept(last_rows=64))
    live, visible = live_of(triton.select(operands, call)), all_blocks(shape, "cuda")
    assert torch.equal(live[:, :, -2:], visible[:, :, -2:])
    assert not torch.equal(live[:, :, :-2], visible[:, :, :-2])
    out, _ = run(operands, call)
    assert error(out, exact(operands, live, shape.blocks)) <= tolerance(operands, live, shape.blocks)


def test_a_row_needs_no_block_on_the_diagonal() -> None:
    for blocks in ((128, 128), (128, 64), (64, 64, 2)):
        shape = replace(PLAIN, blocks=blocks)
        q, k, v = inputs(shape, "cuda")
        live = some_blocks(shape, "cuda", share=0.3)
        live[..., 0] = True
        live[:, :, 2:] &= ~diagonal_blocks(shape, "cuda")[2:]
        assert is_the_specification(shape.of(q, k, v), live, shape)


@EVERY_BLOCKS
def test_nothing_else_is_read(blocks: tuple[int, ...]) -> None:
    shape, block_k = replace(PLAIN, length=1000, mask="full", blocks=blocks), blocks[1]
    tensors = inputs(shape, "cuda")
    live = some_blocks(shape, "cuda")[:, :1].expand(1, shape.heads, -1, -1).clone()
    live[..., 5] = False
    expected = attend(shape.of(*tensors), live, shape)
    # NaN in a block that no list names, and past the end of the sequence.
    padded = [torch.full((*x.shape[:2], 1300, 128), torch.nan, dtype=x.dtype, device="cuda") for x in tensors]
    for x, wide in zip(tensors, padded, strict=True):
        wide[:, :, :1000] = x
    q, k, v = (wide[:, :, :1000] for wide in padded)
    k[:, :, 5 * block_k : 6 * block_k] = v[:, :, 5 * block_k : 6 * block_k] = torch.nan
    assert torch.equal(attend(shape.of(q, k, v), live, shape), expected)


@EVERY_BLOCKS
def test_future_tokens_change_nothing_under_a_given_mask(blocks: tuple[int, ...]) -> None:
    shape = replace(PLAIN, blocks=blocks)
    for token in (0, 127, 128, 700):
        q, k, v = inputs(shape, "cuda")
        live = some_blocks(shape, "cuda", share=0.6)
        before = attend(shape.of(q, k, v), live, shape)
        for x, seed in ((q, 11), (k, 12), (v, 13)):
            x[:, :, token + 1 :] = 100 * inputs(shape, "cuda", seed)[0][:, : x.shape[1], token + 1 :]
        after = attend(shape.of(q, k, v), live, shape)
        assert torch.equal(before[:, :, : token + 1], after[:, :, : token + 1])
        assert not torch.equal(before[:, :, token + 1 :], after[:, :, token + 1 :])


@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_poison_stays_in_its_head_and_batch(poisoned: str, poison: float) -> None:
    shape = replace(PLAIN, length=300, kv_heads=4, batch=2)
    q, k, v = inputs(shape, "cuda")
    live = all_blocks(shape, "cuda")
    clean = attend(shape.of(q, k, v), live, shape)
    {"q": q, "k": k, "v": v}[poisoned][1, 2, 200] = poison
    out = attend(shape.of(q, k, v), live, shape)
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[1, 2] = True
    assert torch.equal(out[~touched], clean[~touched])
    assert torch.equal(out[1, 2, :128], clean[1, 2, :128])
    assert not out[1, 2, 200].isfinite().any()
    if poisoned == "q":
        assert torch.equal(out[1, 2, 201:], clean[1, 2, 201:])


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e4, 6e4, -6e4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_constant_inputs_are_the_mean_of_the_values(fill: float, dtype: torch.dtype) -> None:
    shape = replace(PLAIN, dtype=dtype)
    q, k, v = inputs(shape, "cuda")
    live = some_blocks(shape, "cuda")
    out = attend(shape.of(q.fill_(fill), k.fill_(abs(fill)), v), live, shape)
    assert error(out, exact(shape.of(torch.zeros_like(q), k, v), live, shape.blocks)) <= 1e-2


def test_scores_of_any_size_are_the_specification() -> None:
    shape = replace(PLAIN, dtype=torch.float16)
    q, k, v = inputs(shape, "cuda")
    live = some_blocks(shape, "cuda")
    for factor in (1e-4, 10.0, 300.0, 1e4):
        # Powers of two, so that fp32 sums are exact in any order and both know which key wins.
        big_q, big_k = (torch.exp2((x.float() * 2).round().clamp(-3, 3)) * x.sign() for x in (q, k))
        big_q, big_k = big_q * 2.0 ** round(torch.tensor(factor).log2().item()), big_k
        big = [x.clamp(-6e4, 6e4).half() for x in (big_q, big_k)]
        operands = shape.of(*big, v)
        assert error(attend(operands, live, shape), exact(operands, live, shape.blocks)) <= 4e-3, factor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rise", [0.0, 0.4, 3.0, 5.0, 40.0, -3.0], ids=str)
def test_maxima_that_rise_from_block_to_block(rise: float, dtype: torch.dtype) -> None:
    # By some log2 units a block, in the kernel's order (from the end) or against it: less than what it lets pass, more,
    # and so much that earlier blocks vanish. One row in three sees none of it.
    shape = replace(PLAIN, length=1500, dtype=dtype)
    q, k, v = inputs(shape, "cuda")
    block = torch.arange(1500, device="cuda") // 128
    q[..., 0], k[..., 0] = 8.0, ((11 - block) * rise * 128**0.5 / 8 * 0.6931).to(dtype)
    q[:, :, ::3, 0] = 0.0
    live = some_blocks(shape, "cuda", share=0.7)
    assert is_the_specification(shape.of(q, k, v), live, shape)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.3])
def test_any_scale(scale: float) -> None:
    shape = replace(PLAIN, scale=scale)
    q, k, v = inputs(shape, "cuda")
    live = some_blocks(shape, "cuda")
    assert is_the_specification(shape.of(q, k, v), live, shape)


def test_offsets_past_32_bits() -> None:
    shape = replace(PLAIN, length=130_000, heads=2, kv_heads=2, mask="full", batch=2)
    wide = torch.empty(2, shape.length, 66, 128, dtype=torch.bfloat16, device="cuda")
    assert wide.numel() > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (wide[:, :, i : i + 2].transpose(1, 2) for i in (0, 2, 64))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
    live = some_blocks(shape, "cuda", share=0.05)
    out = attend(shape.of(q, k, v), live, shape)
    assert torch.equal(out, attend(shape.of(q.contiguous(), k.contiguous(), v.contiguous()), live, shape))
    expected = empty_output(q, v)
    portable_launch.attend(
        shape.of(q, k, v), every_block(shape), listed(live, shape.of(q, k, v), shape.blocks), expected
    )
    assert error(out, expected) <= 1e-2


def test_some_heads_are_written_into_the_output_of_all() -> None:
    q, k, v = inputs(PLAIN, "cuda")
    live = some_blocks(PLAIN, "cuda")
    expected = attend(PLAIN.of(q, k, v), live, PLAIN)
    out = torch.full((1, PLAIN.length, 4, 128), torch.nan, dtype=q.dtype, device="cuda").transpose(1, 2)
    operands, half = PLAIN.of(q, k, v).grouped(2, 4), slice(2, 4)
    call = every_block(replace(PLAIN, heads=2))
    launch.attend(operands, call, listed(live[:, 2:], operands, PLAIN.blocks), out[:, half])
    assert torch.equal(out[:, half], expected[:, half])
    assert out[:, :2].isnan().all()


def test_same_bits_every_time_and_in_a_graph() -> None:
    shape = replace(PLAIN, length=5000, heads=8, kv_heads=2)
    operands = operands_of(shape, "cuda")
    lists = listed(some_blocks(shape, "cuda"), operands, shape.blocks)
    outputs = [attend_lists(operands, lists, shape) for _ in range(10)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend_lists(operands, lists, shape)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        outputs.append(captured.clone())
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_the_operator_takes_it_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for engine in (Hopper, Portable):
        plain = engine.attend
        monkeypatch.setattr(engine, "attend", lambda self, *a, plain=plain: taken.append(self.name) or plain(self, *a))
    for shape, lam in (
        (PLAIN, NO_SKIP),
        (replace(PLAIN, blocks=(64, 64, 2)), NO_SKIP),
        (replace(PLAIN, blocks=(64, 64)), NO_SKIP),
        (PLAIN, -8.0),
        (replace(PLAIN, head_dim=96), NO_SKIP),
        (replace(PLAIN, layout="gaps"), NO_SKIP),
    ):
        run(operands_of(shape, "cuda"), sparse_call(shape, 0.9, lam=lam))
    assert taken == ["hopper"] * 2 + ["portable"] * 4


def test_what_it_does_not_take_is_refused() -> None:
    shape = replace(PLAIN, head_dim=96)
    reason = Hopper().refusal(operands_of(shape, "cuda"), every_block(shape))
    assert reason is not None
    assert reason.startswith("head_dim is 96, of v 96; accepted")


@EVERY_BLOCKS
@pytest.mark.parametrize("mask", MASKS)
def test_lists_of_every_length_and_every_part_of_partial_blocks(mask: str, blocks: tuple[int, ...]) -> None:
    # One step or several, odd or even, of which none, one or two blocks need a mask.
    shape = replace(PLAIN, length=1070, blocks=blocks, mask=mask)
    operands = operands_of(shape, "cuda")
    everything, diagonal = all_blocks(shape, "cuda"), diagonal_blocks(shape, "cuda")
    places = torch.arange(shape.counts[1], device="cuda")
    for count in (1, 2, 3, 4, 5):
        for without in (None, 0, 1):
            live = everything & (diagonal | (places < count))
            if without is not None and blocks == (
                128,
                64,
            ):  # one of the two blocks on the diagonal; block 0 is seen by all
                live = live & ~((places % 2 == without) & diagonal) | (everything & (places == 0))
            assert is_the_specification(operands, live, shape), (count, without)
