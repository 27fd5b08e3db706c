"""Which kernel computes a sparse call: what is told is what is launched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from afbs_compile.kernels import block_sparse, flex, hopper, op, predict, tiling
from afbs_compile.kernels.serving import Kernel, SparseCall
from tests.kernels.helpers import NO_SKIP, TRITON_DEVICE, Shape, all_blocks, inputs
from tests.kernels.targets import TARGETS

SHAPE = Shape(300, 64, heads=4, kv_heads=2, dtype=torch.bfloat16, block_q=128, block_k=64)


def call(shape: Shape = SHAPE, lam: float = NO_SKIP, columns: slice = slice(None)) -> SparseCall:
    """A call whose operands have no data; ``columns`` of a wider tensor."""
    width = shape.head_dim if columns == slice(None) else 2 * shape.head_dim
    with FakeTensorMode():
        q, k, v = (
            torch.empty(1, heads, shape.length, width, dtype=shape.dtype)[..., columns]
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
    return SparseCall(q, k, v, [lam] * shape.heads, shape.causal, shape.block_q, shape.block_k)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU: a build without CUDA makes no fake CUDA tensors either."""
    monkeypatch.setattr(op, "engine_name", lambda device: "triton")


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch, on_gpu: None) -> None:
    monkeypatch.setattr(hopper, "_processors", lambda device: 132)
    chip = TARGETS["Hopper sm_90"].chip
    monkeypatch.setattr(tiling, "_shapes", lambda kind: (tiling._hopper_shape(kind, chip),))


@pytest.mark.usefixtures("on_hopper")
def test_on_hopper_it_is_the_hopper_kernel_or_the_reason_why_not() -> None:
    assert call().kernel() == Kernel("hopper 128x64", None)
    assert call(replace(SHAPE, block_k=128)).kernel() == Kernel("hopper 128x128", None)
    for other, tiles, reason in (
        (call(replace(SHAPE, head_dim=96)), "64x64 tiles, 4 warps, 2 stages", "head_dim is 96; accepted: (64, 128)"),
        (call(replace(SHAPE, block_q=64)), "64x64 tiles, 4 warps, 2 stages", "blocks are 64x64"),
        (call(replace(SHAPE, dtype=torch.float32)), "64x64 tiles, 4 warps, 2 stages", "dtype is torch.float32"),
        (call(lam=-8.0), "128x64 tiles, 4 warps, 2 stages", "lam is [-8.0, -8.0, -8.0, -8.0]"),
        (call(columns=slice(1, 65)), "64x64 tiles, 4 warps, 2 stages", "q starts at address 0x2 with strides"),
        (call(columns=slice(None, None, 2)), "64x64 tiles, 4 warps, 2 stages", "q starts at address 0x0 with strides"),
    ):
        name, why = other.kernel()
        assert name == f"portable {tiles}"
        assert why is not None
        assert why.startswith(f"not the Hopper kernel: {reason}")


@pytest.mark.usefixtures("on_gpu")
def test_elsewhere_the_launch_shape_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = tiling.candidates(128, 64, 64, 2, TARGETS["Ampere sm_80"].chip)
    monkeypatch.setattr(tiling, "_shapes", lambda _: shapes)
    monkeypatch.setattr(tiling, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tiling, "_milliseconds", lambda shape, _: float(shape != shapes[1]))
    first = call().kernel()
    assert first.reason == "not the Hopper kernel: cpu is no NVIDIA GPU of compute capability 9.x"
    kind = tiling.Kind(torch.device("cpu"), 128, 64, 64, 2, causal=True, whole=False)
    tiling.choose(kind, tiling.SHORTEST_TIMED, lambda _: None)
    for shape, (name, _) in ((shapes[0], first), (shapes[1], call().kernel())):
        assert name == f"portable {shape.tile_q}x{shape.tile_k} tiles, {shape.warps} warps, {shape.stages} stages"


def test_on_the_cpu_the_tiles_that_flex_attention_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(SHAPE, block_q=128, block_k=128)
    assert call(large).kernel() == Kernel("flex 64x64 tiles", None)
    assert call(replace(large, dtype=torch.float32)).kernel() == Kernel("flex 128x128 tiles", None)
    monkeypatch.setattr(flex, "_uncompilable", lambda: {("cpu", torch.bfloat16, 64): "no C++ compiler"})
    expected = Kernel("masked dense attention", "FlexAttention cannot be compiled: no C++ compiler")
    assert call(large).kernel() == expected


@pytest.mark.parametrize("dim", [64, 32])
def test_what_is_told_is_what_is_launched(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    shape = replace(SHAPE, head_dim=dim)
    q, k, v = inputs(shape, TRITON_DEVICE)
    launched: list[str] = []
    monkeypatch.setattr(op, "engine_name", lambda device: "triton")
    monkeypatch.setattr(hopper, "_processors", lambda device: 132)
    monkeypatch.setattr(hopper, "attend", lambda *_, **__: launched.append("hopper"))
    monkeypatch.setattr(block_sparse, "attend", lambda *_, **__: launched.append("portable"))
    lists, lam = predict.mask_to_lists(all_blocks(shape, TRITON_DEVICE)), [NO_SKIP] * shape.heads
    op._attend_on_triton(q, k, v, lists, lam, out=torch.empty_like(q), **shape.call)
    assert launched == ["hopper" if dim == 64 else "portable"]
    told = SparseCall(q, k, v, lam, shape.causal, shape.block_q, shape.block_k).kernel()
    assert told.name.split()[0] == launched[0]
