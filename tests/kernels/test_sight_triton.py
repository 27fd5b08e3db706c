"""What a dense mask makes of blocks: the kernel sees what the specification says."""

from __future__ import annotations

import os

import pytest
import torch

from afbs_compile.kernels import sight
from afbs_compile.kernels.sight import resolved, sight_of
from tests.any_mask import SHAPES, random_operands
from tests.sweeps import slow_after

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="interpreted kernels only")

SEEDS = [
    seed
    for seed in range(160)
    if (mask := random_operands(seed, largest=150).attn_mask) is not None
    and mask.dtype == torch.bool
    and max(mask.shape[1:3]) > 1
]


@pytest.mark.parametrize("seed", slow_after(8, SEEDS))
def test_blocks_of_a_dense_mask(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[seed % len(SHAPES)]
    plain = resolved(random_operands(seed, largest=150), shape)
    expected = sight_of(plain, shape)
    monkeypatch.setattr(sight, "runs_triton", lambda device: True)
    by_kernel = resolved(random_operands(seed, largest=150), shape)
    found = sight_of(by_kernel, shape)
    assert torch.equal(by_kernel.valid.expand_as(plain.valid), plain.valid)
    for name in ("visible", "whole", "blurred", "ends"):
        one, other = torch.broadcast_tensors(getattr(found, name), getattr(expected, name))
        assert torch.equal(one, other), name
