"""FP8 without a GPU: what its specification promises, the kernel that rounds, what the compiler makes of the other."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.attend.engines import precision_refusal
from afbs_compile.kernels.attend.flex.engine import Flex
from afbs_compile.kernels.attend.hopper import engine as hopper
from afbs_compile.kernels.attend.hopper_fp8 import rounding
from afbs_compile.kernels.attend.hopper_fp8.engine import HopperFp8
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockLists, live_of
from afbs_compile.kernels.call import SparseCall, fp8_constant_count
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec import fp8
from afbs_compile.kernels.spec.attention import masked_attention
from afbs_compile.kernels.spec.fp8 import Fp8Constants
from tests.kernels.helpers import (
    MASKS,
    NO_SKIP,
    Shape,
    exact,
    inputs,
    listed,
    operands_of,
    some_blocks,
    sparse_call,
)
from tests.kernels.hopper_compiler import compiled_on_hopper

PLAIN = Shape(300, 64, heads=4, kv_heads=2, dtype=torch.bfloat16, blocks=(128, 128))


def attend(operands: Operands, live: Tensor, constants: tuple[float, ...] = ()) -> Tensor:
    seen = operands.mask.matrix(operands.q_len, operands.k_len, operands.device)
    return fp8.attend(fp8.quantise(operands, constants), live, seen)


def relative_l1(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).abs().sum() / truth.abs().sum())


def as_bytes(x: Tensor) -> Tensor:
    """Bit for bit, but for the bits of a NaN."""
    return torch.where(x.float().isnan(), math.nan, x.float()).contiguous().view(torch.uint8)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dim", [64, 128])
def test_it_is_attention_up_to_rounding(dim: int, mask: str) -> None:
    for length, scale in ((1, None), (129, 0.3), (300, -0.1), (300, 0.0)):
        shape = replace(PLAIN, length=length, head_dim=dim, mask=mask, batch=2, scale=scale)
        operands, live = operands_of(shape), some_blocks(shape)
        assert relative_l1(attend(operands, live), exact(operands, live, shape.blocks)) <= 4e-2


def test_rounding_is_what_the_weights_are_worth() -> None:
    """Keys that all score alike: the row sum is of weights before rounding, so values come out as they were rounded."""
    q, k, v = inputs(PLAIN)
    live = some_blocks(PLAIN)
    out = attend(PLAIN.of(torch.zeros_like(q), k, torch.ones_like(v) * 1.5), live)
    assert torch.equal(out, torch.full_like(out, 1.5))


def test_the_mean_of_the_keys_cancels_and_takes_error_with_it() -> None:
    q, k, v = inputs(PLAIN)
    k = (k + 4 * torch.randn(2, 1, 64)).bfloat16()
    constants = Fp8Constants.of([(k, v)])
    torch.testing.assert_close(constants.key_mean, k.float().mean((0, 2)))
    live = some_blocks(PLAIN)
    operands = PLAIN.of(q, k, v)
    truth = exact(operands, live, PLAIN.blocks)
    smoothed, plain = (relative_l1(attend(operands, live, c), truth) for c in (constants.packed(), ()))
    assert smoothed < 0.8 * plain


def test_constants_are_of_all_samples_and_of_what_is_finite() -> None:
    (_, k, v), (_, k2, v2) = inputs(PLAIN), inputs(replace(PLAIN, length=130), seed=1)
    k[0, 1, 5, 3] = math.inf
    v2[0, 0, 7, 1] = math.nan
    found = Fp8Constants.of([(k, v), (k2, v2)])
    both = torch.cat([k, k2], 2).float()
    both[0, 1, 5, 3] = 0
    torch.testing.assert_close(found.key_mean, both.mean((0, 2)))
    peaks = torch.cat([v, v2], 2).float().nan_to_num(0.0).abs().amax((0, 2, 3))
    torch.testing.assert_close(found.value_peak, peaks)
    back = Fp8Constants.unpacked(found.packed(), 2, 64)
    for mine, theirs in zip(found, back, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    assert len(found.packed()) == fp8_constant_count(2, 64)


def test_scales_are_powers_of_two_that_fit() -> None:
    shape = replace(PLAIN, length=600)
    q, k, v = inputs(shape)
    k[:, :, 128:256] *= 2**10
    v[:, :, 256:384] *= 2**-10
    found = fp8.quantise(PLAIN.of(q, k, v), ())
    for scale in (found.q_scale, found.k_scale, found.v_scale):
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert ((found.q.float().abs().amax(-1) >= 2.0**7) & (found.q.float().abs().amax(-1) <= 2.0**8)).all()
    first_rows = found.k.float()[:, :, ::128].abs().amax(-1)
    assert ((first_rows >= 1) & (first_rows <= 2)).all()
    # Values 2^10 smaller than the others have the smallest peak for theirs.
    assert (found.v_scale[:, :, 2] == fp8.SMALLEST_PEAK).all()
    assert (found.k_scale[:, :, 1] > 2**8 * found.k_scale[:, :, 0]).all()


@pytest.mark.parametrize("poison", [None, math.nan, math.inf, -math.inf], ids=str)
def test_no_row_knows_of_later_ones(poison: float | None) -> None:
    for token in (0, 127, 128, 200):
        q, k, v = inputs(PLAIN)
        constants = Fp8Constants.of([(k, v)]).packed()
        live = some_blocks(PLAIN)
        before = attend(PLAIN.of(q, k, v), live, constants)
        for x in (q, k, v):
            # Values of a row's own block are multiplied by zero, as in every engine: those of later blocks are not.
            first = token + 1 if x is not v or poison is None else (token // 128 + 1) * 128
            x[:, :, first:] = 1e4 * torch.randn(x[:, :, first:].shape) if poison is None else poison
        after = attend(PLAIN.of(q, k, v), live, constants)
        assert torch.equal(before[:, :, : token + 1], after[:, :, : token + 1])


def test_what_is_not_finite_is_seen_and_alters_no_scale() -> None:
    q, k, v = inputs(PLAIN)
    clean = fp8.quantise(PLAIN.of(q, k, v), ())
    for x in (q, k, v):
        x[0, 1, 128, 5] = math.inf
    found = fp8.quantise(PLAIN.of(q, k, v), ())
    for name in ("k_scale", "v_scale"):
        old, new = getattr(clean, name), getattr(found, name)
        assert ((new == old) | (new == old / 2)).all()  # of the other entries of that row
    assert found.q[0, 1, 128].float().isnan().sum() == 1
    out = attend(PLAIN.of(q, k, v), some_blocks(PLAIN, share=1.0))
    assert out[0, 1, 128].isnan().all()
    assert out[0, 2:, 128:].isnan().any(-1).all()  # the heads that share the keys and values
    assert out[0, 0].isfinite().all()


def test_large_values_are_clamped_not_lost() -> None:
    q, k, v = inputs(PLAIN)
    v[:, :, 0] = 0.01
    v[0, 0, 50, 3] = 3000.0
    found = fp8.quantise(PLAIN.of(q, k, v), ())
    assert found.v.float().isfinite().all()
    assert found.v.float().max() == fp8.LARGEST


def test_the_order_of_keys_is_that_of_the_tensor_cores() -> None:
    order = fp8.key_order()
    assert order.sort().values.tolist() == list(range(128))
    # Thread t of a quad holds scores of columns 2t, 2t + 1, 2t + 8, 2t + 9 and gives four weights in a row.
    for t in range(4):
        assert order[4 * t : 4 * t + 4].tolist() == [2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9]
    assert torch.equal(order.view(8, 16) - order.view(8, 16)[:, :1], order[:16].expand(8, 16))


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "gaps", "strided"])
def test_the_kernel_rounds_as_specified(layout: str) -> None:
    for length, dim, dtype in ((1, 64, torch.float16), (129, 128, torch.bfloat16), (300, 64, torch.bfloat16)):
        shape = replace(PLAIN, length=length, head_dim=dim, dtype=dtype, batch=2, layout=layout)
        q, k, v = inputs(shape)
        for x in (q, k, v):
            x[:, :, length // 2, 3] = torch.tensor([math.nan, math.inf], dtype=dtype)[:, None]
            x[:, :, length // 3] *= 300
        operands = replace(shape, scale=0.2).of(q, k, v)
        for constants in ((), Fp8Constants.of([(k, v)]).packed()):
            expected, found = fp8.quantise(operands, constants), rounding.quantise(operands, constants)
            for name, x, y in zip(expected._fields, found, expected, strict=True):
                cut = length if name == "q_scale" else None
                assert torch.equal(as_bytes(x[:, :, :cut]), as_bytes(y[:, :, :cut])), name


@pytest.mark.parametrize(
    ("names", "constants", "message"),
    [
        (["int8"] * 4, None, "precision is 'int8'; accepted: own, fp8"),
        (["fp8"] * 3, None, "precision has 3 names; accepted: one for each of the 4 query heads"),
        (None, [0.0], "fp8_constants came without precision"),
        (
            ["fp8"] * 4,
            [0.0] * 7,
            "fp8_constants has 7 numbers; accepted: 132, 64 means and two peaks for each of the 2 key",
        ),
        (["fp8"] * 4, [math.nan] * 132, "fp8_constants has a number that is not finite"),
        (["fp8"] * 4, None, "precision is fp8, and cpu is no NVIDIA GPU of compute capability 9.x"),
    ],
)
def test_what_the_operator_refuses(names: Any, constants: Any, message: str) -> None:
    q, k, v = inputs(PLAIN)
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.afbs.sparse_attention(
            q, k, v, [0.9] * 4, [-1.0] * 4, [NO_SKIP] * 4, "causal", None, *PLAIN.blocks, precision=names,
            fp8_constants=constants,
        )  # fmt: skip


def test_heads_of_their_own_precision_are_as_ever() -> None:
    operands, q = operands_of(PLAIN), inputs(PLAIN)
    named = run(operands, sparse_call(PLAIN, 0.9, precision=("own",) * 4))
    for mine, theirs in zip(named, run(operands, sparse_call(PLAIN, 0.9)), strict=True):
        assert torch.equal(mine, theirs)
    constants = [0.9] * 4, [-1.0] * 4, [NO_SKIP] * 4, "causal", None, *PLAIN.blocks
    for names in (["own"] * 4, None):
        assert torch.equal(torch.ops.afbs.sparse_attention(*q, *constants, precision=names), named[0])


def test_other_calls_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "processors", lambda device: 132)

    def refusal(dtype: torch.dtype = torch.bfloat16, dim: int = 128, lam: float = NO_SKIP, block_k: int = 128) -> Any:
        shape = Shape(130, dim, heads=1, kv_heads=1, dtype=dtype, blocks=(128, block_k))
        return precision_refusal(operands_of(shape), sparse_call(shape, 0.5, lam=lam), "fp8")

    assert refusal() is None
    assert "dtype is torch.float32; accepted: float16, bfloat16" in refusal(dtype=torch.float32)
    assert "head_dim is 96, of v 96; accepted" in refusal(dim=96)
    assert "blocks are 128x64; accepted: 128x128" in refusal(block_k=64)
    assert "lam is [-8.0]; accepted" in refusal(lam=-8.0)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_each_head_is_attended_in_its_precision(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(PLAIN, kv_heads=kv_heads)
    operands, live = operands_of(shape), some_blocks(shape)
    table = Fp8Constants.of([(operands.k, operands.v)]).packed()

    def own(_: Flex, operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
        out.copy_(masked_attention(operands, live_of(lists), call.lam, call.shape))

    def rounded(_: HopperFp8, operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
        out.copy_(attend(operands, live_of(lists), call.fp8_constants))

    monkeypatch.setattr(HopperFp8, "refusal", lambda *_: None)
    for engine, attends in ((HopperFp8, rounded), (Flex, own)):
        monkeypatch.setattr(engine, "attend", attends)
        monkeypatch.setattr(engine, "select", lambda _, operands, call: listed(live, operands, call.shape))
    whole = []
    for names in (("own",) * 4, ("fp8",) * 4, ("fp8", "own", "own", "fp8")):
        call = sparse_call(shape, 0.5, precision=names, fp8_constants=table)
        whole.append(run(operands, call)[0])
    assert torch.equal(whole[2][:, [0, 3]], whole[1][:, [0, 3]])
    assert torch.equal(whole[2][:, [1, 2]], whole[0][:, [1, 2]])
    assert not torch.equal(whole[0], whole[1])


COMPILE = """
only_compile(rounding._quantise_kernel, fp8_kernel.forward_kernel)
common = dict(heads=4, kv_heads=2, batch=2, blocks=(128, 128), layout="bnhd")
for shape in (
    Shape(300, 128, dtype=torch.bfloat16, **common),
    Shape(9000, 64, dtype=torch.float16, mask="full", **common),
):
    attend_by(fp8_launch)
"""


@pytest.mark.slow
def test_the_compiled_kernels_keep_their_promises() -> None:
    cases = compiled_on_hopper(COMPILE)
    grids = [title.split(" grid ")[1].split(" shared")[0] for title, _ in cases]
    assert grids == ["(96,)", "(24,)", "(2272,)", "(132,)"]
    for title, sass in cases:
        assert int(title.split()[-1]) <= 227 << 10, title
        # Registers spilt to memory cost more than the whole design gains.
        assert not re.search(r"\b(LDL|STL)\b", sass), title
        if "forward" not in title:
            assert re.search(r"LDG\.E\.128", sass), title
            continue
        assert "QGMMA" in sass, title
        # Weights become an operand where they are: two conversions for four of them, and no byte moved after.
        assert "MERGE_C" in sass, title
        assert "PRMT" not in sass, title
        # A product with V is added up in fp32: it starts from nothing, as every product does.
        first = re.findall(r"QGMMA[^\n]*RZ, !UPT", sass)
        assert len(first) == 10, title
