"""The Hopper kernel on the chip: every configuration that can be chosen, against the specification in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels import block_sparse, hopper, op, predict, reference
from tests.kernels.helpers import NO_SKIP, Shape, all_blocks, error, exact, inputs, some_blocks, tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

CONFIGURATIONS = [
    Shape(1, dim, heads=6, kv_heads=2, batch=2, dtype=dtype, causal=causal, block_q=128, block_k=block_k, layout="bnhd")
    for dtype, dim, block_k, causal in itertools.product(
        (torch.bfloat16, torch.float16), hopper.HEAD_DIMS, (128, 64), (True, False)
    )
]
PLAIN = Shape(1500, 128, heads=4, kv_heads=2, dtype=torch.bfloat16, block_q=128, block_k=128)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that no kernel wrote reads as NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def attend(q: Tensor, k: Tensor, v: Tensor, live: Tensor, shape: Shape) -> Tensor:
    """The Hopper kernel over a mask."""
    return hopper.attend(q, k, v, predict.mask_to_lists(live), [NO_SKIP] * shape.heads, **shape.call)


@pytest.mark.parametrize("shape", CONFIGURATIONS, ids=str)
def test_every_configuration_is_the_specification(shape: Shape) -> None:
    for length, share in itertools.product((1, 63, 127, 129, 1000, 2177), (0.0, 0.4, 1.0)):
        case = replace(shape, length=length)
        q, k, v = inputs(case, "cuda")
        live = some_blocks(case, "cuda", seed=length, share=share)
        out = attend(q, k, v, live, case)
        assert error(out, exact(q, k, v, live, case)) <= tolerance(q, k, v, case, live), (length, share)
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_groups_and_layouts(groups: int, causal: bool) -> None:
    for layout in ("bhnd", "bnhd"):
        shape = replace(PLAIN, length=4097, heads=8, kv_heads=8 // groups, batch=2, causal=causal, layout=layout)
        q, k, v = inputs(shape, "cuda")
        live = some_blocks(shape, "cuda", share=0.2)
        # In fp32: float64 at this size is slow, and fp32 is a thousand times finer than bf16.
        expected = reference.masked_attention(q.float(), k.float(), v.float(), live, [NO_SKIP] * 8, **shape.call)
        assert error(attend(q, k, v, live, shape), expected) <= 2e-2


@pytest.mark.parametrize("block_k", [128, 64])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_heads_of_very_different_work_in_one_launch(block_k: int, causal: bool) -> None:
    shape = replace(PLAIN, length=3001, heads=8, kv_heads=8, block_k=block_k, causal=causal)
    q, k, v = inputs(shape, "cuda")
    live = some_blocks(shape, "cuda", share=0.05)
    live[:, 5] = all_blocks(shape, "cuda")[:, 5]
    live[:, 6] = some_blocks(shape, "cuda", share=0.0)[:, 6]
    assert error(attend(q, k, v, live, shape), exact(q, k, v, live, shape)) <= tolerance(q, k, v, shape, live)


@pytest.mark.parametrize("block_k", [128, 64])
def test_last_rows_are_whole_whatever_the_order_of_tiles(block_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "CACHED_BYTES", 1)  # key heads take turns one by one
    shape = replace(PLAIN, length=1070, block_k=block_k)  # the last 64 rows lie in two blocks
    q, k, v = inputs(shape, "cuda")
    constants = [0.3] * 4, [reference.THETA_OFF] * 4
    lists = predict.predict_blocks(q, k, *constants, **shape.call, kept=reference.Kept(last_rows=64))
    live, visible = predict.lists_to_mask(lists, shape.counts[1]), all_blocks(shape, "cuda")
    assert torch.equal(live[:, :, -2:], visible[:, :, -2:])
    assert not torch.equal(live[:, :, :-2], visible[:, :, :-2])
    out, _ = op.sparse_attention_with_counts(q, k, v, *constants, [NO_SKIP] * 4, **shape.call, last_rows=64)
    assert error(out, exact(q, k, v, live, shape)) <= tolerance(q, k, v, shape, live)


def test_a_row_needs_no_block_on_the_diagonal() -> None:
    for block_k in (128, 64):
        shape = replace(PLAIN, block_k=block_k)
        q, k, v = inputs(shape, "cuda")
        live = some_blocks(shape, "cuda", share=0.3)
        live[..., 0] = True
        live[:, :, 2:] &= ~reference.diagonal_blocks(*shape.counts, 128, block_k, torch.device("cuda")).expand_as(live)[
            :, :, 2:
        ]
        assert error(attend(q, k, v, live, shape), exact(q, k, v, live, shape)) <= tolerance(q, k, v, shape, live)


@pytest.mark.parametrize("block_k", [128, 64])
def test_nothing_else_is_read(block_k: int) -> None:
    shape = replace(PLAIN, length=1000, causal=False, block_k=block_k)
    tensors = inputs(shape, "cuda")
    live = some_blocks(replace(shape, heads=1), "cuda").expand(1, shape.heads, -1, -1).clone()
    live[..., 5] = False
    expected = attend(*tensors, live, shape)
    # NaN in a block that no list names, and past the end of the sequence.
    padded = [torch.full((*x.shape[:2], 1300, 128), torch.nan, dtype=x.dtype, device="cuda") for x in tensors]
    for x, wide in zip(tensors, padded, strict=True):
        wide[:, :, :1000] = x
    q, k, v = (wide[:, :, :1000] for wide in padded)
    k[:, :, 5 * block_k : 6 * block_k] = v[:, :, 5 * block_k : 6 * block_k] = torch.nan
    assert torch.equal(attend(q, k, v, live, shape), expected)


@pytest.mark.parametrize("block_k", [128, 64])
def test_future_tokens_change_nothing_under_a_given_mask(block_k: int) -> None:
    shape = replace(PLAIN, block_k=block_k)
    for token in (0, 127, 128, 700):
        q, k, v = inputs(shape, "cuda")
        live = some_blocks(shape, "cuda", share=0.6)
        before = attend(q, k, v, live, shape)
        for x, seed in ((q, 11), (k, 12), (v, 13)):
            x[:, :, token + 1 :] = 100 * inputs(shape, "cuda", seed)[0][:, : x.shape[1], token + 1 :]
        after = attend(q, k, v, live, shape)
        assert torch.equal(before[:, :, : token + 1], after[:, :, : token + 1])
        assert not torch.equal(before[:, :, token + 1 :], after[:, :, token + 1 :])


@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_poison_stays_in_its_head_and_batch(poisoned: str, poison: float) -> None:
    shape = replace(PLAIN, length=300, kv_heads=4, batch=2)
    q, k, v = inputs(shape, "cuda")
    live = all_blocks(shape, "cuda")
    clean = attend(q, k, v, live, shape)
    {"q": q, "k": k, "v": v}[poisoned][1, 2, 200] = poison
    out = attend(q, k, v, live, shape)
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
    out = attend(q.fill_(fill), k.fill_(abs(fill)), v, live, shape)
    assert error(out, exact(torch.zeros_like(q), k, v, live, shape)) <= 1e-2


def test_scores_of_any_size_are_the_specification() -> None:
    shape = replace(PLAIN, dtype=torch.float16)
    q, k, v = inputs(shape, "cuda")
    live = some_blocks(shape, "cuda")
    for factor in (1e-4, 10.0, 300.0, 1e4):
        # Powers of two, so that fp32 sums are exact in any order and both know which key wins.
        big_q, big_k = (torch.exp2((x.float() * 2).round().clamp(-3, 3)) * x.sign() for x in (q, k))
        big_q, big_k = big_q * 2.0 ** round(torch.tensor(factor).log2().item()), big_k
        big = [x.clamp(-6e4, 6e4).half() for x in (big_q, big_k)]
        assert error(attend(*big, v, live, shape), exact(*big, v, live, shape)) <= 4e-3, factor


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
    assert error(attend(q, k, v, live, shape), exact(q, k, v, live, shape)) <= tolerance(q, k, v, shape, live)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.3])
def test_any_scale(scale: float) -> None:
    shape = replace(PLAIN, scale=scale)
    q, k, v = inputs(shape, "cuda")
    live = some_blocks(shape, "cuda")
    assert error(attend(q, k, v, live, shape), exact(q, k, v, live, shape)) <= tolerance(q, k, v, shape, live)


def test_offsets_past_32_bits() -> None:
    shape = replace(PLAIN, length=130_000, heads=2, kv_heads=2, causal=False, batch=2)
    wide = torch.empty(2, shape.length, 66, 128, dtype=torch.bfloat16, device="cuda")
    assert wide.numel() > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (wide[:, :, i : i + 2].transpose(1, 2) for i in (0, 2, 64))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
    live = some_blocks(shape, "cuda", share=0.05)
    out = attend(q, k, v, live, shape)
    assert torch.equal(out, attend(q.contiguous(), k.contiguous(), v.contiguous(), live, shape))
    lists = predict.mask_to_lists(live)
    expected = block_sparse.attend(q, k, v, lists, [NO_SKIP] * 2, **shape.call)
    assert error(out, expected) <= 1e-2


def test_some_heads_are_written_into_the_output_of_all() -> None:
    q, k, v = inputs(PLAIN, "cuda")
    live = some_blocks(PLAIN, "cuda")
    expected = attend(q, k, v, live, PLAIN)
    out = torch.full((1, PLAIN.length, 4, 128), torch.nan, dtype=q.dtype, device="cuda").transpose(1, 2)
    lists, half = predict.mask_to_lists(live[:, 2:]), slice(2, 4)
    hopper.attend(q[:, half], k[:, 1:], v[:, 1:], lists, [NO_SKIP] * 2, out=out[:, half], **PLAIN.call)
    assert torch.equal(out[:, half], expected[:, half])
    assert out[:, :2].isnan().all()


def test_same_bits_every_time_and_in_a_graph() -> None:
    shape = replace(PLAIN, length=5000, heads=8, kv_heads=2)
    q, k, v = inputs(shape, "cuda")
    lists, lam = predict.mask_to_lists(some_blocks(shape, "cuda")), [NO_SKIP] * 8
    outputs = [hopper.attend(q, k, v, lists, lam, **shape.call) for _ in range(10)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hopper.attend(q, k, v, lists, lam, **shape.call)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        outputs.append(captured.clone())
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_the_operator_takes_it_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for engine in (hopper, block_sparse):
        plain = engine.attend
        monkeypatch.setattr(
            engine, "attend", lambda *a, plain=plain, name=engine.__name__, **k: taken.append(name) or plain(*a, **k)
        )
    constants = ([0.9] * 4, [reference.THETA_OFF] * 4)
    for shape, lam in (
        (PLAIN, NO_SKIP),
        (replace(PLAIN, block_q=64, block_k=64), NO_SKIP),
        (PLAIN, -8.0),
        (replace(PLAIN, head_dim=96), NO_SKIP),
        (replace(PLAIN, layout="gaps"), NO_SKIP),
    ):
        op.sparse_attention_with_counts(*inputs(shape, "cuda"), *constants, [lam] * 4, **shape.call)
    assert [name.rsplit(".", 1)[1] for name in taken] == ["hopper"] + ["block_sparse"] * 4


def test_what_it_does_not_take_is_refused() -> None:
    shape = replace(PLAIN, head_dim=96)
    q, k, v = inputs(shape, "cuda")
    with pytest.raises(ValueError, match="head_dim is 96; accepted"):
        attend(q, k, v, all_blocks(shape, "cuda"), shape)
