"""FP8 on the chip: every configuration that can be chosen, against the specification and the truth in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.attend.hopper.engine import HEAD_DIMS, Hopper
from afbs_compile.kernels.attend.hopper_fp8 import launch, rounding
from afbs_compile.kernels.attend.hopper_fp8.engine import HopperFp8
from afbs_compile.kernels.attend.portable import engine as portable
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockLists
from afbs_compile.kernels.call import PRECISIONS
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.kernels.spec import fp8
from afbs_compile.kernels.spec.fp8 import Fp8Constants
from tests.kernels.helpers import (
    MASKS,
    NO_SKIP,
    TRITON,
    Shape,
    all_blocks,
    every_block,
    exact,
    inputs,
    listed,
    operands_of,
    some_blocks,
    sparse_call,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

CONFIGURATIONS = [
    Shape(1, dim, heads=6, kv_heads=2, batch=2, dtype=dtype, mask=mask, blocks=(128, 128), layout="bnhd")
    for dtype, dim, mask in itertools.product((torch.bfloat16, torch.float16), HEAD_DIMS, MASKS)
]
PLAIN = Shape(1500, 128, heads=4, kv_heads=2, dtype=torch.bfloat16, blocks=(128, 128))

OF_THE_SPECIFICATION = 6e-3
"""Relative L1: the output's own rounding, weights that fall on the other side of a tie, 14-bit sums within a step."""
OF_THE_TRUTH = 4e-2
"""Relative L1 of FP8 itself on these inputs."""


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that no kernel wrote reads as NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def relative_l1(out: Tensor, truth: Tensor) -> float:
    """Of all elements together; infinite if anything is NaN."""
    off = (out.double() - truth.double()).abs().sum() / truth.double().abs().sum()
    return float(off.nan_to_num(torch.inf))


def attend(operands: Operands, live: Tensor, shape: Shape, constants: tuple[float, ...] = ()) -> Tensor:
    """The kernels over live blocks."""
    return attend_lists(operands, listed(live, operands, shape.blocks), shape, constants)


def attend_lists(operands: Operands, lists: BlockLists, shape: Shape, constants: tuple[float, ...] = ()) -> Tensor:
    """The kernels over lists."""
    out = empty_output(operands.q, operands.v)
    launch.attend(operands, replace(every_block(shape), fp8_constants=constants), lists, out)
    return out


def specification(operands: Operands, live: Tensor, constants: tuple[float, ...] = ()) -> Tensor:
    seen = operands.mask.matrix(operands.q_len, operands.k_len, operands.device)
    return fp8.attend(fp8.quantise(operands, constants), live, seen)


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, but for the bits of a NaN."""
    x, y = (torch.where(t.float().isnan(), torch.nan, t.float()).contiguous().view(torch.uint8) for t in (x, y))
    return torch.equal(x, y)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "gaps", "strided"])
@pytest.mark.parametrize("shape", CONFIGURATIONS[:4], ids=str)
def test_operands_are_rounded_as_specified(shape: Shape, layout: str) -> None:
    for length in (1, 127, 129, 1000):
        case = replace(shape, length=length, layout=layout)
        q, k, v = inputs(case, "cuda")
        for x in (q, k, v):
            x[:, :, length // 2, 3] = torch.tensor([torch.nan, torch.inf], device="cuda", dtype=x.dtype)[:, None]
            x[:, :, length // 3] *= 300
        operands = case.of(q, k, v)
        for constants in ((), Fp8Constants.of([(k, v)]).packed()):
            expected, found = fp8.quantise(operands, constants), rounding.quantise(operands, constants)
            for name, x, y in zip(expected._fields, found, expected, strict=True):
                cut = length if name == "q_scale" else None
                assert same(x[:, :, :cut], y[:, :, :cut]), (name, length, not constants)


@pytest.mark.parametrize("shape", CONFIGURATIONS, ids=str)
def test_every_configuration_is_the_specification(shape: Shape) -> None:
    for length, share in itertools.product((1, 63, 127, 129, 1000, 2177), (0.0, 0.4, 1.0)):
        case = replace(shape, length=length)
        q, k, v = inputs(case, "cuda")
        live = some_blocks(case, "cuda", seed=length, share=share)
        out = attend(case.of(q, k, v), live, case)
        assert out.transpose(1, 2).is_contiguous()
        assert relative_l1(out, specification(case.of(q, k, v), live)) <= OF_THE_SPECIFICATION, (length, share)
        assert relative_l1(out, exact(case.of(q, k, v), live, case.blocks)) <= OF_THE_TRUTH, (length, share)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("mask", MASKS)
def test_groups_layouts_and_constants(groups: int, mask: str) -> None:
    for layout in ("bhnd", "gaps", "strided"):
        shape = replace(PLAIN, length=1030, heads=8, kv_heads=8 // groups, batch=2, mask=mask, layout=layout)
        q, k, v = inputs(shape, "cuda")
        k += 3 * torch.randn(shape.kv_heads, 1, 128, device="cuda")
        v *= torch.rand(shape.kv_heads, 1, 1, device="cuda") * 50
        live = some_blocks(shape, "cuda", share=0.3)
        constants = Fp8Constants.of([(k, v)]).packed()
        operands = shape.of(q, k, v)
        out, truth = attend(operands, live, shape, constants), exact(operands, live, shape.blocks)
        assert relative_l1(out, specification(operands, live, constants)) <= OF_THE_SPECIFICATION
        smoothed, plain = (relative_l1(x, truth) for x in (out, attend(operands, live, shape)))
        assert smoothed < plain
        assert smoothed <= OF_THE_TRUTH


def test_heads_of_very_different_work_in_one_launch() -> None:
    for mask in MASKS:
        shape = replace(PLAIN, length=3001, heads=8, kv_heads=8, mask=mask)
        q, k, v = inputs(shape, "cuda")
        live = some_blocks(shape, "cuda", share=0.05)
        live[:, 5] = all_blocks(shape, "cuda")[:, 5]
        live[:, 6] = some_blocks(shape, "cuda", share=0.0)[:, 6]
        assert (
            relative_l1(attend(shape.of(q, k, v), live, shape), specification(shape.of(q, k, v), live))
            <= OF_THE_SPECIFICATION
        )


def test_blocks_of_very_different_size() -> None:
    """Scales differ from block to block, both ways: the running sum changes its unit."""
    shape = replace(PLAIN, length=2000, mask="full")
    q, k, v = inputs(shape, "cuda")
    sizes = 2.0 ** torch.randint(-9, 10, (16,), device="cuda").repeat_interleave(128)[:2000, None]
    v = (v * sizes).to(v.dtype)
    live = some_blocks(shape, "cuda", share=0.5)
    assert (
        relative_l1(attend(shape.of(q, k, v), live, shape), specification(shape.of(q, k, v), live))
        <= OF_THE_SPECIFICATION
    )


def test_error_does_not_grow_along_a_row() -> None:
    """Sums of 14 bits over all of 65,536 keys would lose the small ones."""
    shape = replace(PLAIN, length=65536, heads=1, kv_heads=1, mask="full")
    q, k, v = inputs(shape, "cuda")
    v = v + 1  # a mean, or the output is next to nothing
    out = attend(shape.of(q, k, v), all_blocks(shape, "cuda"), shape)
    few = slice(1000, 1256)
    truth = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q[:, :, few], k, v)))
    found = relative_l1(out[:, :, few], truth)
    assert found <= 1e-2, found


def test_nothing_else_is_read() -> None:
    shape = replace(PLAIN, length=1000, mask="full")
    tensors = inputs(shape, "cuda")
    live = some_blocks(replace(shape, heads=1), "cuda").expand(1, shape.heads, -1, -1).clone()
    live[..., 5] = False
    expected = attend(shape.of(*tensors), live, shape)
    padded = [torch.full((*x.shape[:2], 1300, 128), torch.nan, dtype=x.dtype, device="cuda") for x in tensors]
    for x, wide in zip(tensors, padded, strict=True):
        wide[:, :, :1000] = x
    q, k, v = (wide[:, :, :1000] for wide in padded)
    k[:, :, 5 * 128 : 6 * 128] = v[:, :, 5 * 128 : 6 * 128] = torch.nan
    assert torch.equal(attend(shape.of(q, k, v), live, shape), expected)


@pytest.mark.parametrize("constants", [False, True])
def test_future_tokens_change_nothing(constants: bool) -> None:
    for token in (0, 127, 128, 700):
        q, k, v = inputs(PLAIN, "cuda")
        known = Fp8Constants.of([(k, v)]).packed() if constants else ()
        live = some_blocks(PLAIN, "cuda", share=0.6)
        before = attend(PLAIN.of(q, k, v), live, PLAIN, known)
        for x, seed in ((q, 11), (k, 12), (v, 13)):
            x[:, :, token + 1 :] = 1000 * inputs(PLAIN, "cuda", seed)[0][:, : x.shape[1], token + 1 :]
        after = attend(PLAIN.of(q, k, v), live, PLAIN, known)
        assert torch.equal(before[:, :, : token + 1], after[:, :, : token + 1])
        assert not torch.equal(before[:, :, token + 1 :], after[:, :, token + 1 :])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_future_that_is_not_finite_changes_nothing(poison: float) -> None:
    for token in (0, 127, 700):
        q, k, v = inputs(PLAIN, "cuda")
        live = some_blocks(PLAIN, "cuda", share=0.6)
        before = attend(PLAIN.of(q, k, v), live, PLAIN)
        q[:, :, token + 1 :] = k[:, :, token + 1 :] = poison
        # Values of a row's own block are multiplied by zero, as in every engine: those of later blocks are not.
        v[:, :, (token // 128 + 1) * 128 :] = poison
        assert torch.equal(before[:, :, : token + 1], attend(PLAIN.of(q, k, v), live, PLAIN)[:, :, : token + 1])


@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_poison_is_seen_and_stays_in_its_head_and_batch(poisoned: str, poison: float) -> None:
    shape = replace(PLAIN, length=300, kv_heads=4, batch=2)
    q, k, v = inputs(shape, "cuda")
    live = all_blocks(shape, "cuda")
    clean = attend(shape.of(q, k, v), live, shape)
    {"q": q, "k": k, "v": v}[poisoned][1, 2, 200, 7] = poison
    out = attend(shape.of(q, k, v), live, shape)
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[1, 2] = True
    assert torch.equal(out[~touched], clean[~touched])
    assert torch.equal(out[1, 2, :128], clean[1, 2, :128])
    assert out[1, 2, 200:, 7].isnan()[: 1 if poisoned == "q" else None].all()
    if poisoned == "q":
        assert torch.equal(out[1, 2, 201:], clean[1, 2, 201:])
    if poisoned == "v":
        others = torch.arange(128) != 7
        assert torch.equal(out[1, 2][:, others], clean[1, 2][:, others])


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e4, -6e4], ids=str)
def test_constant_inputs_are_the_mean_of_the_values(fill: float) -> None:
    q, k, v = inputs(PLAIN, "cuda")
    live = some_blocks(PLAIN, "cuda")
    out = attend(PLAIN.of(q.fill_(fill), k.fill_(abs(fill)), v), live, PLAIN)
    assert relative_l1(out, exact(PLAIN.of(torch.zeros_like(q), k, v), live, PLAIN.blocks)) <= OF_THE_TRUTH


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.3])
def test_any_scale(scale: float) -> None:
    shape = replace(PLAIN, scale=scale)
    q, k, v = inputs(shape, "cuda")
    live = some_blocks(shape, "cuda")
    out = attend(shape.of(q, k, v), live, shape)
    assert relative_l1(out, specification(shape.of(q, k, v), live)) <= OF_THE_SPECIFICATION


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


def test_the_operator_runs_each_head_in_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("fp8", "own", "own", "fp8")
    for kv_heads in (4, 2):
        shape = replace(PLAIN, kv_heads=kv_heads)
        operands = operands_of(shape, "cuda")
        known = Fp8Constants.of([(operands.k, operands.v)]).packed()
        call = sparse_call(shape, 0.9, precision=names, fp8_constants=known)
        whole = {name: run(operands, replace(call, precision=(name,) * 4)) for name in PRECISIONS}
        out, counts = run(operands, call)
        for head, name in enumerate(names):
            assert torch.equal(out[:, head], whole[name][0][:, head]), (head, name)
        assert torch.equal(counts, whole["own"][1])
        assert not torch.equal(whole["fp8"][0], whole["own"][0])
        # As a few heads at a time, each with its part of the constants.
        monkeypatch.setattr(portable, "LISTS_SHARE", 1e-9)
        assert torch.equal(run(operands, call)[0], out)
        monkeypatch.undo()


def test_the_operator_compiles() -> None:
    q, k, v = inputs(PLAIN, "cuda")
    known = Fp8Constants.of([(k, v)]).packed()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.afbs.sparse_attention(
            q, k, v, [0.9] * 4, [-1.0] * 4, [NO_SKIP] * 4, "causal", None, 128, 128, precision=["fp8"] * 4,
            fp8_constants=list(known),
        )  # fmt: skip

    assert torch.equal(torch.compile(call, fullgraph=True)(q, k, v), call(q, k, v))


def test_what_it_does_not_take_is_refused() -> None:
    shape = replace(PLAIN, blocks=(128, 64))
    with pytest.raises(ValueError, match="precision is fp8, and blocks are 128x64; accepted: 128x128"):
        run(operands_of(shape, "cuda"), sparse_call(shape, 0.9, precision=("fp8",) * 4))


def test_the_portable_kernel_stays_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HopperFp8, "attend", None)
    monkeypatch.setattr(Hopper, "refusal", lambda *_: "not here")
    operands = operands_of(PLAIN, "cuda")
    out, _ = run(operands, every_block(PLAIN))
    assert torch.equal(out, TRITON.attend(operands, all_blocks(PLAIN, "cuda"), every_block(PLAIN)))
