"""The Hopper kernel without a GPU: when it may be used, and what the compiler makes of it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from afbs_compile.kernels.attend.hopper import engine
from afbs_compile.kernels.attend.hopper.engine import Hopper
from afbs_compile.kernels.attend.hopper_fp8.engine import HopperFp8
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from tests.kernels.helpers import NO_SKIP, Shape, sparse_call
from tests.kernels.hopper_compiler import compiled_on_hopper
from tests.masks import Dilated


def tensors(length: int = 300, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(2, heads, length, dim, dtype=dtype) for heads in (4, 2, 2)]


def refusal(
    operands: list[Tensor],
    lam: list[float] | float = NO_SKIP,
    blocks: tuple[int, ...] = (128, 128),
    mask: Mask | None = None,
) -> str | None:
    call = sparse_call(Shape(1, heads=4, blocks=blocks), 0.5, lam=lam)
    return Hopper().refusal(Operands(*operands, mask or mask_of("causal"), 0.1), call)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "processors", lambda device: 132)


def test_other_devices_are_refused() -> None:
    assert refusal(tensors()) == "cpu is no NVIDIA GPU of compute capability 9.x"


@pytest.mark.usefixtures("on_hopper")
def test_what_it_takes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for dim in (64, 128):
            for blocks in ((128, 128), (128, 64), (64, 64, 2)):
                assert refusal(tensors(dim=dim, dtype=dtype), blocks=blocks) is None
    as_models_have_it = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors()]
    assert refusal(as_models_have_it) is None
    assert refusal(tensors(length=1)) is None


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("reason", "case"),
    [
        ("dtype is torch.float32; accepted", {"operands": tensors(dtype=torch.float32)}),
        ("head_dim is 96, of v 96; accepted", {"operands": tensors(dim=96)}),
        ("blocks are 64x64; accepted: 128x128, 128x64, 64x64 of 2 heads", {"operands": tensors(), "blocks": (64, 64)}),
        ("2 heads share a selection and 1 a key head", {"operands": [tensors()[0]] * 3, "blocks": (64, 64, 2)}),
        ("lam is .*; accepted: at most -1000", {"operands": tensors(), "lam": [NO_SKIP, -8.0, NO_SKIP, NO_SKIP]}),
        ("k starts at .* multiples of 16 bytes", {"operands": [tensors()[0], tensors(301)[1][:, :, :, 1:], None]}),
        ("q starts at .* the last stride 1", {"operands": [tensors(dim=256)[0][..., ::2], None, None]}),
        ("q starts at .* the others positive", {"operands": [tensors(1)[0].expand(2, 4, 300, 128), None, None]}),
        ("q starts at", {"operands": [torch.zeros(2, 4, 300, 132, dtype=torch.half)[..., :128], None, None]}),
    ],
)
def test_what_it_refuses_and_why(reason: str, case: dict[str, Any]) -> None:
    case["operands"] = [x if x is not None else tensors()[2] for x in case["operands"]]
    if case["operands"][1].shape[3] == 127:  # one column in: the address is no multiple of 16
        case["operands"][1] = torch.zeros(2, 2, 300, 136, dtype=torch.bfloat16)[..., 1:129]
    said = refusal(**case)
    assert said is not None
    assert re.search(reason, said)


@pytest.mark.usefixtures("on_hopper")
def test_what_calibration_compares_is_not_what_a_tile_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hopper, "shapes", (BlockShape(64, 64),))
    said = refusal(tensors(), blocks=(64, 64))
    assert said is not None
    assert said.startswith("blocks are 64x64; accepted: 128x128")


@pytest.mark.usefixtures("on_hopper")
def test_a_mask_that_is_no_band_is_refused() -> None:
    found = refusal(tensors(), mask=Dilated(3))
    assert found == "mask is dilated(3); accepted: masks that are a band about the diagonal"


def given(name: str) -> dict[str, Any]:
    """One more argument of a call over 300 keys."""
    return {
        "attn_mask": {"attn_mask": torch.ones(1, 1, 300, 300, dtype=torch.bool)},
        "softcap": {"softcap": 20.0},
        "sinks": {"sinks": torch.zeros(4)},
        "valid": {"valid": torch.ones(1, 300, dtype=torch.bool).expand(2, -1)},
    }[name]


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", ["attn_mask", "softcap", "sinks", "valid"])
def test_what_else_a_call_has_is_taken_or_refused_by_name(name: str) -> None:
    operands = Operands(*tensors(), mask_of("causal"), 0.1, **given(name))
    call = sparse_call(Shape(1, heads=4, blocks=(128, 128)), 0.5)
    expected = f"{name} given; accepted: calls without"
    assert HopperFp8().refusal(operands, call) == expected
    assert Hopper().refusal(operands, call) == (None if name == "valid" else expected)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("mask", ["window(100)", "chunk(100)", "around(30,20)", "causal_end"])
def test_every_band_over_any_number_of_keys_is_taken_by_all_but_fp8(mask: str) -> None:
    call = sparse_call(Shape(1, heads=4, blocks=(128, 128)), 0.5)
    for q_len, k_len in ((200, 300), (300, 200)):
        q, (_, k, v) = tensors(q_len)[0], tensors(k_len)
        operands = Operands(q, k, v, mask_of(mask), 0.1)
        assert Hopper().refusal(operands, call) is None
        said = HopperFp8().refusal(operands, call)
        assert said is not None
        assert said.startswith(f"mask is {mask}")


@pytest.mark.usefixtures("on_hopper")
def test_values_of_another_width_are_refused() -> None:
    operands = Operands(*tensors(), mask_of("causal"), 0.1)
    narrow = replace(operands, v=operands.v[..., :64])
    call = sparse_call(Shape(1, heads=4, blocks=(128, 128)), 0.5)
    for one in (Hopper(), HopperFp8()):
        assert one.refusal(narrow, call) == "head_dim is 128, of v 64; accepted: (64, 128), the same for both"


COMPILE = """
only_compile(kernel.forward_kernel)
common = dict(heads=4, kv_heads=2, batch=2, layout="bnhd")
for shape in (
    Shape(300, 128, dtype=torch.bfloat16, blocks=(128, 128), mask="full", **common),
    Shape(9000, 128, dtype=torch.float16, blocks=(128, 64), **common),
    Shape(9000, 128, dtype=torch.bfloat16, blocks=(64, 64, 2), **common),
):
    attend_by(launch)
"""


@pytest.mark.slow
def test_the_compiled_kernel_keeps_its_promises() -> None:
    cases = compiled_on_hopper(COMPILE)
    grids = [title.split(" grid ")[1].split(" shared")[0] for title, _ in cases]
    assert grids == ["(24,)", "(132,)", "(132,)"]
    for title, sass in cases:
        assert int(title.split()[-1]) <= 227 << 10, title
        assert "HGMMA" in sass, title
        # Registers spilt to memory cost more than the whole design gains.
        assert not re.search(r"\b(LDL|STL)\b", sass), title
        # Half the softmax of a step runs while the product with V does: 32 exponentials a thread stand between the
        # wait for the scores and the wait for that product, 32 more, between which the weights are packed, after it.
        loops = 2  # one of each consumer
        before = re.findall(r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR\.LE gsb0, 0x0", sass, re.DOTALL)
        assert sum(part.count("MUFU.EX2") >= 32 for part in before) == loops, title
        after = re.findall(r"DEPBAR\.LE gsb0, 0x0(.*?)(?:HGMMA|DEPBAR)", sass, re.DOTALL)
        assert sum(28 <= part.count("MUFU.EX2") <= 40 and part.count("F2FP") >= 32 for part in after) == loops, title
        # Nothing delays the scores: the output is not rescaled between the instructions of the product that makes them.
        products = re.findall(r"HGMMA[^\n]* RZ,(.*?)gsb0", sass, re.DOTALL)
        assert products, title
        assert max(product.count("FMUL") for product in products) < 16, title


MASKED = """
only_compile(kernel.forward_kernel)
common = dict(heads=4, kv_heads=2, batch=2, dtype=torch.bfloat16, layout="bnhd")
shape = Shape(300, 64, blocks=(128, 64), mask="window(100)", **common)
attend_by(launch, k_len=333, valid=True)
shape = Shape(300, 64, blocks=(64, 64, 2), mask="window(100)", **common)
attend_by(launch, k_len=333, valid=True)
shape = Shape(300, 128, blocks=(128, 128), mask="causal_end", **common)
attend_by(launch, k_len=333)
shape = Shape(300, 128, blocks=(128, 64), mask="chunk(100)", **common)
attend_by(launch)
"""


@pytest.mark.slow
def test_masked_kernels_clean_values_before_the_tensor_cores_read_them() -> None:
    for title, sass in compiled_on_hopper(MASKED):
        assert int(title.split()[-1]) <= 227 << 10, title
        # Each consumer cleans before either of its products with V: all threads' writes, a fence in each, a barrier.
        cleaned = re.findall(r"STS.*?\n(?:(?!HGMMA)[^\n]*\n)*?[^\n]*FENCE\.VIEW\.ASYNC(.*?)HGMMA", sass, re.DOTALL)
        assert len(cleaned) >= 4, title
        assert all("BAR.SYNC" in part for part in cleaned), title
        # Registers are spilt where a tile or a mask begins; in the steps over whole blocks there is no memory traffic.
        steps = re.findall(r"DEPBAR\.LE gsb0, 0x0(.*?)HGMMA", sass, re.DOTALL)
        assert sum(part.count("MUFU.EX2") >= 28 and not re.search(r"\b(LDL|STL)\b", part) for part in steps) >= 1, title
