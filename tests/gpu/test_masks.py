"""Every kind of mask on a GPU: the Hopper and the portable kernel against float64, and nothing of what is not seen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from afbs_compile.kernels.attend.engines import engines_on, kernel_of
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape, live_of
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.measure import one_pass
from afbs_compile.kernels.measure.one_pass import PassPlan
from afbs_compile.kernels.measure.one_pass import one_pass as measured
from afbs_compile.kernels.measure.pass_plain import plain_pass
from afbs_compile.kernels.operands import Operands
from tests.any_mask import hidden, in_float64, poisoned, random_call, random_operands

pytestmark = pytest.mark.gpu

HOPPER_SHAPES = (BlockShape(128, 128), BlockShape(128, 64))


def moved(operands: Operands, dtype: torch.dtype) -> Operands:
    """The same call on the GPU."""
    mask, there = operands.attn_mask, {"device": "cuda"}
    if mask is not None:
        mask = mask.to(**there) if mask.dtype == torch.bool else mask.to(dtype=torch.float32, **there)
    return replace(
        operands,
        q=operands.q.to(dtype=dtype, **there),
        k=operands.k.to(dtype=dtype, **there),
        v=operands.v.to(dtype=dtype, **there),
        valid=None if operands.valid is None else operands.valid.to(**there),
        attn_mask=mask,
        sinks=None if operands.sinks is None else operands.sinks.to(**there),
    )


def for_hopper(seed: int) -> tuple[Operands, torch.dtype]:
    """A call of the shapes that the Hopper kernel takes, with a formula and valid keys."""
    dim, dtype = (64, 128)[seed % 2], (torch.bfloat16, torch.float16)[seed // 2 % 2]
    operands = random_operands(seed, largest=700, plain=True)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*x.shape[:3], dim, generator=generator) for x in (operands.q, operands.k, operands.v))
    return moved(replace(operands, q=q, k=k, v=v, attn_mask=None, scale=dim**-0.5), dtype), dtype


def close(out: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.cpu().double(), exact, rtol=tolerance, atol=tolerance)


def of_width(operands: Operands, dim: int, seed: int) -> Operands:
    """The same call with heads of another width: every width is a compilation."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*x.shape[:3], dim, generator=generator) for x in (operands.q, operands.k, operands.v))
    return replace(operands, q=q, k=k, v=v)


@pytest.mark.parametrize("part", range(12))
def test_random_calls(part: int) -> None:
    dtype, dim = (torch.float32, torch.bfloat16, torch.float16)[part % 3], (64, 32, 128, 16)[part // 3]
    shape = (BlockShape(64, 64), BlockShape(128, 64), BlockShape(32, 16), BlockShape(128, 128))[part // 3]
    kernels = set()
    for seed in range(part * 84, (part + 1) * 84):
        operands = moved(of_width(random_operands(seed), dim, seed), dtype)
        call = replace(random_call(seed, operands.heads), shape=shape)
        live = live_of(engines_on(operands.device)[0].select(operands, call))
        out = run(operands, call)[0]
        try:
            close(out, in_float64(operands, live, call.shape), dtype)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {kernel_of(operands, call).name}: {error}") from error
        kernels.add(kernel_of(operands, call).name.split()[0])
    assert "portable" in kernels


@pytest.mark.parametrize("part", range(8))
def test_random_calls_on_hopper(part: int) -> None:
    for seed in range(part, 1000, 8):
        operands, dtype = for_hopper(seed)
        call = replace(random_call(seed, operands.heads), shape=HOPPER_SHAPES[seed // 4 % 2])
        kernel = kernel_of(operands, call)
        if torch.cuda.get_device_capability()[0] == 9 and operands.k_len > 1:
            assert kernel.name.startswith("hopper"), kernel
        lists = engines_on(operands.device)[0].select(operands, call)
        try:
            close(run(operands, call)[0], in_float64(operands, live_of(lists), call.shape), dtype)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {kernel.name} {operands.mask}: {error}") from error


@pytest.mark.parametrize("on_hopper", [False, True])
def test_what_no_row_sees_has_no_effect_on_a_bit(on_hopper: bool) -> None:
    for seed in range(60):
        if on_hopper:
            operands, _ = for_hopper(seed)
            call = replace(random_call(seed, operands.heads), shape=HOPPER_SHAPES[seed // 4 % 2])
        else:
            operands = moved(of_width(random_operands(seed), 32, seed), torch.float32)
            call = replace(random_call(seed, operands.heads), shape=BlockShape(64, 64))
        out, counts = run(operands, call)
        for value in (math.nan, math.inf, 3e4):
            other, others = run(poisoned(operands, value), call)
            assert torch.equal(others, counts), seed
            assert torch.equal(other, out), f"seed {seed}: {kernel_of(operands, call).name} {operands.mask} {value}"


@pytest.mark.parametrize("mask", ["causal", "causal_end", "window(200)", "chunk(300)"])
@pytest.mark.parametrize("shape", HOPPER_SHAPES)
def test_no_query_block_knows_what_comes_later(mask: str, shape: BlockShape) -> None:
    q_len, k_len = (600, 600) if mask == "causal" else (600, 917)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 4, n, 64, device="cuda", generator=generator).half() for n in (q_len, k_len, k_len))
    operands = Operands(q, k, v, mask_of(mask), 0.125)
    call = replace(random_call(3, 4), shape=shape, kept=random_call(3, 4).kept)
    away = hidden(operands)
    for key in (k_len - 1, k_len - 70, k_len // 2 + 1):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, :, key], other_v[:, :, key] = math.nan, math.nan
        out, other = run(operands, call)[0], run(replace(operands, k=other_k, v=other_v), call)[0]
        blind = away[..., key].split(shape.q, 2)
        for place, rows in enumerate(blind):
            if rows.all():
                mine = slice(place * shape.q, place * shape.q + rows.shape[2])
                assert torch.equal(out[:, :, mine], other[:, :, mine]), (key, place)


def test_a_pass_measures_what_the_plain_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(40):
        operands = moved(of_width(random_operands(seed), 32, seed), torch.float32).element(0)
        call = replace(random_call(seed, operands.heads), shape=BlockShape(64, 64))
        tau = torch.tensor([0.0, 0.5, 0.9, 1.0]).expand(operands.heads, -1).contiguous()
        given = operands, dense_attention(operands), tau, torch.full((operands.heads,), -1.0)
        plan = PassPlan(call.policy[0], call.shape, call.kept)
        found = measured(*given, plan)
        with monkeypatch.context() as patch:
            patch.setattr(one_pass, "triton_pass", plain_pass, raising=False)
            patch.setattr(one_pass, "band_refusal", lambda operands: "by the plain one")
            expected = measured(*given, plan)
        torch.testing.assert_close(found.magnitude, expected.magnitude, rtol=2e-3, atol=5e-2)
        torch.testing.assert_close(found.difference, expected.difference, rtol=5e-3, atol=5e-2)
