"""Launch shapes of the portable kernel: they fit, they compile for every family of GPUs, and one of them is chosen."""

from __future__ import annotations

import itertools

import pytest
import torch

from afbs_compile.kernels import block_sparse, predict, tiling
from afbs_compile.kernels.tiling import Kind, LaunchShape, candidates, launch_shape
from tests.kernels.helpers import TRITON_DEVICE, Shape, all_blocks, inputs
from tests.kernels.targets import TARGETS, TOLERATED_SPILLS, Job, compile_in_own_process

BLOCKS = [(128, 128), (128, 64), (64, 64)]
KIND = Kind(torch.device("cuda", 0), 128, 128, 128, 2, causal=True, whole=False)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dim_pad", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4], ids=["half", "fp32"])
def test_tiles_divide_the_blocks_and_fit(name: str, dim_pad: int, itemsize: int) -> None:
    chip = TARGETS[name].chip
    for (block_q, block_k), whole in itertools.product(BLOCKS, (True, False)):
        shapes = candidates(block_q, block_k, dim_pad, itemsize, chip, whole=whole)
        assert shapes[0] == launch_shape(block_q, block_k, dim_pad, itemsize, chip)
        assert len(set(shapes)) == len(shapes) <= 5
        for shape in shapes:
            assert block_q % shape.tile_q == 0
            assert block_k % shape.tile_k == 0
            assert min(shape.tile_q, shape.tile_k) >= 16
            assert (shape.tile_q + 2 * shape.stages * shape.tile_k) * dim_pad * itemsize <= chip.shared_memory
            assert not whole or shape[:2] == shapes[0][:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_first_choices_compile_and_hold_their_tiles_in_registers(name: str) -> None:
    chip = TARGETS[name].chip
    kinds = ((128, 128, "bf16"), (64, 128, "bf16"), (64, 64, "fp32"))
    shapes = [launch_shape(block, block, dim, 4 if dtype == "fp32" else 2, chip) for block, dim, dtype in kinds]
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
        self.shapes = candidates(128, 128, 128, 2, TARGETS["Ampere sm_80"].chip)
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
    assert tiling.choose(KIND._replace(causal=False), 100, nothing) == clock.shapes[0], "another kind"


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
    shape = Shape(300, 64, block_q=128, block_k=128)
    q, k, v = inputs(shape, TRITON_DEVICE)
    lists = predict.mask_to_lists(all_blocks(shape, TRITON_DEVICE))
    outs = []
    for launch in candidates(128, 128, 64, 2, TARGETS["AMD gfx942"].chip):
        monkeypatch.setattr(tiling, "_shapes", lambda _, launch=launch: (launch,))
        outs.append(block_sparse.attend(q, k, v, lists, [-1000.0] * 2, **shape.call))
    assert len(outs) > 1
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)


def test_the_choice_can_be_read() -> None:
    text = block_sparse.launch_choice(torch.device("cpu"), torch.bfloat16, 96, causal=True, block_q=128, block_k=64)
    assert text == "portable 128x64 tiles, 4 warps, 1 stage"
