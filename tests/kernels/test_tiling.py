"""Launch shapes of the portable kernel: they fit, they compile for every family of GPUs, and one of them is chosen."""

from __future__ import annotations

import itertools

import pytest
import torch

from afbs_compile.kernels.attend.portable import launch, tiling
from afbs_compile.kernels.attend.portable.tiling import Kind, LaunchShape, candidates, launch_shape
from afbs_compile.kernels.blocks import BlockShape
from tests.kernels.helpers import TRITON, TRITON_DEVICE, Shape, all_blocks, every_block, operands_of, sparse_call
from tests.kernels.targets import TARGETS, TOLERATED_SPILLS, Job, compile_in_own_process

BLOCKS = [BlockShape(128, 128), BlockShape(128, 64), BlockShape(64, 64)]
LARGE = BLOCKS[0]
KIND = Kind(torch.device("cuda", 0), LARGE, 128, 2, masked=True, whole=False)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dim_pad", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4], ids=["half", "fp32"])
def test_tiles_divide_the_blocks_and_fit(name: str, dim_pad: int, itemsize: int) -> None:
    chip = TARGETS[name].chip
    for blocks, whole in itertools.product(BLOCKS, (True, False)):
        shapes = candidates(blocks, dim_pad, itemsize, chip, whole=whole)
        assert shapes[0] == launch_shape(blocks, dim_pad, itemsize, chip)
        assert len(set(shapes)) == len(shapes) <= 5
        for shape in shapes:
            assert blocks.q % shape.tile_q == 0
            assert blocks.k % shape.tile_k == 0
            assert min(shape.tile_q, shape.tile_k) >= 16
            assert (shape.tile_q + 2 * shape.stages * shape.tile_k) * dim_pad * itemsize <= chip.shared_memory
            assert not whole or shape[:2] == shapes[0][:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_first_choices_compile_and_hold_their_tiles_in_registers(name: str) -> None:
    chip = TARGETS[name].chip
    kinds = ((128, 128, "bf16"), (64, 128, "bf16"), (64, 64, "fp32"))
    shapes = [launch_shape(BlockShape(n, n), dim, 4 if dtype == "fp32" else 2, chip) for n, dim, dtype in kinds]
    jobs = [
        Job(name, block, block, dim, dtype, True, False, *shape)
        for (block, dim, dtype), shape in zip(kinds, shapes, strict=True)
    ]
    for record in compile_in_own_process(jobs):
        assert 0 < record["shared_memory"] <= chip.shared_memory
        assert record["spilled_bytes"] <= TOLERATED_SPILLS, record


class Clock:
    """Stands in for the device: some launch shapes are quick, one does not fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capturing: bool = False) -> None:
        self.timed: list[LaunchShape] = []
        self.shapes = candidates(LARGE, 128, 2, TARGETS["Ampere sm_80"].chip)
        monkeypatch.setattr(tiling, "_shapes", lambda _: self.shapes)
        monkeypatch.setattr(tiling, "_chosen", {})
        monkeypatch.setattr(tiling, "_milliseconds", self.milliseconds)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def milliseconds(self, shape: LaunchShape, _: object) -> float:
        self.timed.append(shape)
        return 1.0 if shape == self.shapes[2] else 2.0


def nothing(_: LaunchShape) -> None:
    """A launch."""


def test_the_quickest_is_found_once_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert tiling.choose(KIND, 100, nothing) == clock.shapes[0]
    assert not clock.timed, "a short call decides nothing"
    assert tiling.describe(KIND) == "portable 128x64 tiles, 8 warps, 2 stages"
    for _ in range(2):
        assert tiling.choose(KIND, 4096, nothing) == clock.shapes[2]
    assert tuple(clock.timed) == clock.shapes
    assert tiling.choose(KIND, 100, nothing) == clock.shapes[2]
    assert tiling.describe(KIND) == "portable {}x{} tiles, {} warps, {} stages".format(*clock.shapes[2])
    assert tiling.choose(KIND._replace(masked=False), 100, nothing) == clock.shapes[0], "another kind"


def test_a_capture_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, capturing=True)
    assert tiling.choose(KIND, 4096, nothing) == clock.shapes[0]
    assert not clock.timed
    assert not tiling._chosen


def test_what_does_not_fit_is_never_chosen() -> None:
    import triton

    def too_large(_: LaunchShape) -> None:
        raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")

    assert tiling._milliseconds(LaunchShape(128, 128, 8, 2), too_large) == float("inf")


def test_every_candidate_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(300, 64, blocks=LARGE)
    operands, live = operands_of(shape, TRITON_DEVICE), all_blocks(shape, TRITON_DEVICE)
    outs = []
    for chosen in candidates(LARGE, 64, 2, TARGETS["AMD gfx942"].chip):
        monkeypatch.setattr(tiling, "_shapes", lambda _, chosen=chosen: (chosen,))
        outs.append(TRITON.attend(operands, live, every_block(shape)))
    assert len(outs) > 1
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)


def test_the_choice_can_be_read() -> None:
    shape = Shape(300, 96, dtype=torch.bfloat16, blocks=(128, 64))
    text = launch.described(operands_of(shape), sparse_call(shape, 0.5))
    assert text == "portable 128x64 tiles, 4 warps, 1 stage"
