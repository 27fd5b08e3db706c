"""Which engine computes a sparse call: what is told is what is launched, and who refuses says why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from afbs_compile.kernels.attend import engines
from afbs_compile.kernels.attend.engine import Engine
from afbs_compile.kernels.attend.engines import Kernel, engine_of, kernel_of
from afbs_compile.kernels.attend.flex import engine as flex
from afbs_compile.kernels.attend.hopper import engine as hopper
from afbs_compile.kernels.attend.hopper import launch as hopper_launch
from afbs_compile.kernels.attend.hopper_fp8.engine import HopperFp8
from afbs_compile.kernels.attend.portable import engine as portable
from afbs_compile.kernels.attend.portable import launch as portable_launch
from afbs_compile.kernels.attend.portable import tiling
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.kernels.select import plain
from tests.kernels.helpers import NO_SKIP, TRITON_DEVICE, Shape, all_blocks, listed, operands_of, sparse_call
from tests.kernels.targets import TARGETS

SHAPE = Shape(300, 64, heads=4, kv_heads=2, dtype=torch.bfloat16, blocks=(128, 64))


def fake(shape: Shape, columns: slice = slice(None)) -> Operands:
    """Operands without data; ``columns`` of a wider tensor."""
    width = shape.head_dim if columns == slice(None) else 2 * shape.head_dim
    with FakeTensorMode():
        q, k, v = (
            torch.empty(1, heads, shape.length, width, dtype=shape.dtype)[..., columns]
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
    return shape.of(q, k, v)


def kernel(shape: Shape = SHAPE, lam: float = NO_SKIP, columns: slice = slice(None)) -> Kernel:
    """What computes a call."""
    return kernel_of(fake(shape, columns), sparse_call(shape, 0.5, lam=lam))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU: a build without CUDA makes no fake CUDA tensors either."""
    monkeypatch.setattr(portable, "runs_triton", lambda device: True)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch, on_gpu: None) -> None:
    monkeypatch.setattr(hopper, "processors", lambda device: 132)
    chip = TARGETS["Hopper sm_90"].chip
    monkeypatch.setattr(tiling, "_shapes", lambda kind: (tiling._hopper_shape(kind, chip),))


@pytest.mark.usefixtures("on_hopper")
def test_on_hopper_it_is_the_hopper_kernel_or_the_reason_why_not() -> None:
    assert kernel() == Kernel("hopper 128x64", None)
    assert kernel(replace(SHAPE, blocks=(128, 128))) == Kernel("hopper 128x128", None)
    for other, tiles, reason in (
        (
            kernel(replace(SHAPE, head_dim=96)),
            "64x64 tiles, 4 warps, 2 stages",
            "head_dim is 96, of v 96; accepted: (64, 128)",
        ),
        (kernel(replace(SHAPE, blocks=(64, 64))), "64x64 tiles, 4 warps, 2 stages", "blocks are 64x64"),
        (kernel(replace(SHAPE, dtype=torch.float32)), "64x64 tiles, 4 warps, 2 stages", "dtype is torch.float32"),
        (kernel(lam=-8.0), "128x64 tiles, 4 warps, 2 stages", "lam is [-8.0, -8.0, -8.0, -8.0]"),
        (kernel(columns=slice(1, 65)), "64x64 tiles, 4 warps, 2 stages", "q starts at address 0x2 with strides"),
        (
            kernel(columns=slice(None, None, 2)),
            "64x64 tiles, 4 warps, 2 stages",
            "q starts at address 0x0 with strides",
        ),
    ):
        name, why = other
        assert name == f"portable {tiles}"
        assert why is not None
        assert why.startswith(f"not the Hopper kernel: {reason}")


@pytest.mark.usefixtures("on_gpu")
def test_elsewhere_the_launch_shape_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = tiling.candidates(BlockShape(128, 64), 64, 2, TARGETS["Ampere sm_80"].chip)
    monkeypatch.setattr(tiling, "_shapes", lambda _: shapes)
    monkeypatch.setattr(tiling, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tiling, "_milliseconds", lambda shape, _: float(shape != shapes[1]))
    first = kernel()
    assert first.reason == "not the Hopper kernel: cpu is no NVIDIA GPU of compute capability 9.x"
    kind = tiling.Kind(torch.device("cpu"), BlockShape(128, 64), 64, 2, masked=True, whole=False)
    tiling.choose(kind, tiling.SHORTEST_TIMED, lambda _: None)
    for shape, (name, _) in ((shapes[0], first), (shapes[1], kernel())):
        assert name == f"portable {shape.tile_q}x{shape.tile_k} tiles, {shape.warps} warps, {shape.stages} stages"


def test_on_the_cpu_the_tiles_that_flex_attention_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(SHAPE, blocks=(128, 128))
    assert kernel(large) == Kernel("flex 64x64 tiles", None)
    assert kernel(replace(large, dtype=torch.float32)) == Kernel("flex 128x128 tiles", None)
    monkeypatch.setattr(flex, "_uncompilable", {("cpu", torch.bfloat16, 64): "no C++ compiler"})
    expected = Kernel("masked dense attention", "FlexAttention cannot be compiled: no C++ compiler")
    assert kernel(large) == expected


@pytest.mark.parametrize("dim", [64, 32])
@pytest.mark.usefixtures("on_gpu")
def test_what_is_told_is_what_is_launched(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    shape = replace(SHAPE, head_dim=dim)
    operands, call = operands_of(shape, TRITON_DEVICE), sparse_call(shape, 0.5)
    launched: list[str] = []
    monkeypatch.setattr(hopper, "processors", lambda device: 132)
    monkeypatch.setattr(hopper_launch, "attend", lambda *_: launched.append("hopper"))
    monkeypatch.setattr(portable_launch, "attend", lambda *_: launched.append("portable"))
    lists = listed(all_blocks(shape, TRITON_DEVICE), operands, shape.blocks)
    engine_of(operands, call)[0].attend(operands, call, lists, empty_output(operands.q, operands.v))
    assert launched == ["hopper" if dim == 64 else "portable"]
    run(operands, call)
    assert launched == ["hopper" if dim == 64 else "portable"] * 2
    assert kernel_of(operands, call).name.split()[0] == launched[0]


class Fake(Engine):
    """Says what it is told to."""

    def __init__(
        self,
        name: str,
        refusal: str | None = None,
        *,
        precision: str = "own",
        here: bool = True,
        family: str = "fake",
        note: str | None = None,
        shapes: tuple[BlockShape, ...] = (),
    ) -> None:
        self.name, self.title, self.family = name, f"the {name} kernel", family
        self.precision, self.shapes = precision, shapes
        self._refusal, self._here, self._note = refusal, here, note
        self.attended: list[SparseCall] = []

    def serves(self, device: torch.device) -> bool:
        return self._here

    def refusal(self, operands: Operands, call: SparseCall) -> str | None:
        return self._refusal

    def select(self, operands: Operands, call: SparseCall) -> BlockLists:
        return plain.select(operands, call)

    def attend(self, operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
        self.attended.append(call)
        out.fill_(len(self.name))

    def layout(self, operands: Operands, call: SparseCall) -> str:
        return f"{self.name} {call.shape}"

    def note(self, operands: Operands) -> str | None:
        return self._note


CALL = sparse_call(SHAPE, 0.5)
FP8 = sparse_call(SHAPE, 0.5, precision=("own", "fp8", "fp8", "own"))


def test_the_first_that_does_not_refuse_computes_and_those_before_it_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Fake("first", "blocks are round"), Fake("second", "it rains")
    elsewhere, third, fourth = Fake("far", "cpu is no such chip", here=False), Fake("third"), Fake("fourth")
    monkeypatch.setattr(engines, "ENGINES", [first, elsewhere, second, third, fourth])
    told = kernel_of(fake(SHAPE), CALL)
    assert told == Kernel("third 128x64", "not the first kernel: blocks are round; not the second kernel: it rains")
    engine, refused = engine_of(fake(SHAPE), CALL)
    assert engine is third
    assert refused == [(first, "blocks are round"), (second, "it rains")]
    out, _ = run(operands_of(SHAPE), CALL)
    assert (out == len("third")).all()
    assert third.attended == [CALL]
    assert not fourth.attended


def test_a_note_is_told_after_the_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENGINES", [Fake("first", "it rains"), Fake("second", note="it is slow")])
    assert kernel_of(fake(SHAPE), CALL).reason == "not the first kernel: it rains; it is slow"


def test_where_all_refuse_all_are_heard_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Fake("own")
    rounds = [Fake("a", "it rains", precision="fp8"), Fake("b", "it snows", precision="fp8", here=False)]
    monkeypatch.setattr(engines, "ENGINES", [*rounds, own])
    for call in (kernel_of, run):
        with pytest.raises(ValueError, match="^precision is fp8, and it rains; it snows$"):
            call(operands_of(SHAPE), FP8)
    assert not own.attended
    assert engines.precision_refusal(fake(SHAPE), CALL, "fp8") == "it rains; it snows"
    assert engines.precision_refusal(fake(SHAPE), CALL, "own") is None


def test_each_precision_has_its_engine_and_fp8_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rounding, own = Fake("fp8", precision="fp8"), Fake("own kernel")
    monkeypatch.setattr(engines, "ENGINES", [own, rounding])
    assert kernel_of(fake(SHAPE), FP8) == Kernel("fp8 128x64 and own kernel 128x64", None)
    out, _ = run(operands_of(SHAPE), FP8)
    assert [bool((out[:, head] == 3).all()) for head in range(4)] == [False, True, True, False]
    assert (out[:, [0, 3]] == len("own kernel")).all()
    assert [call.precision for call in (*rounding.attended, *own.attended)] == [("fp8",) * 2, ("own",) * 2]


def test_calibration_compares_the_shapes_of_the_first_engines_family(monkeypatch: pytest.MonkeyPatch) -> None:
    square, wide, small = BlockShape(128, 128), BlockShape(128, 64), BlockShape(64, 64)
    row = [
        Fake("a", precision="fp8", shapes=(BlockShape(16, 16),)),
        Fake("b", here=False, shapes=(BlockShape(32, 32),)),
        Fake("c", shapes=(square, wide)),
        Fake("d", shapes=(wide, small)),
        Fake("e", family="other", shapes=(BlockShape(64, 32),)),
    ]
    monkeypatch.setattr(engines, "ENGINES", row)
    assert engines.shapes_on(torch.device("cpu")) == (square, wide, small)
    assert engines.family_on(torch.device("cpu")) == "fake"
    assert engines.engines_on(torch.device("cpu")) == row[2:]


def test_the_engines_of_the_package() -> None:
    assert [engine.name for engine in engines.ENGINES] == ["fp8", "hopper", "portable", "flex"]
    assert engines.shapes_on(torch.device("cpu")) == (BlockShape(64, 64),)
    cuda = engines.shapes_on(torch.device("cuda"))
    assert cuda == (BlockShape(128, 128), BlockShape(128, 64), BlockShape(64, 64, heads=2), BlockShape(64, 64))


@pytest.mark.usefixtures("on_hopper")
def test_fp8_takes_masks_that_cross_one_block_of_keys_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    square = replace(SHAPE, blocks=(128, 128))
    assert HopperFp8().refusal(fake(square), sparse_call(square, 0.5)) is None
    assert HopperFp8().refusal(fake(replace(square, mask="full")), sparse_call(square, 0.5)) is None
    monkeypatch.setattr(HopperFp8, "shapes", (BlockShape(128, 64),))
    said = HopperFp8().refusal(fake(SHAPE), CALL)
    assert said == "mask is causal; accepted: masks that cross one key block of a query block at most"
    assert HopperFp8().refusal(fake(replace(SHAPE, mask="full")), CALL) is None


def test_an_engine_made_for_another_device_refuses_too() -> None:
    reason = portable.Portable().refusal(fake(SHAPE), CALL)
    assert reason is not None
    assert re.fullmatch("cpu is no GPU that Triton compiles for", reason)
