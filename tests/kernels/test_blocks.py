"""Grids, and block lists from masks and back."""

from __future__ import annotations

import pytest
import torch

from afbs_compile.kernels.blocks import BlockLists, BlockShape, Grid, chunks, lists_of, live_of
from tests.kernels.helpers import Shape, some_blocks


def test_a_grid_covers_both_lengths() -> None:
    grid = Grid(130, 257, BlockShape(128, 64))
    assert (grid.count_q, grid.count_k) == (2, 5)
    assert str(grid.shape) == "128x64"


def test_lists_and_masks_convert_into_each_other() -> None:
    live = some_blocks(Shape(length=1000, heads=3, batch=2, blocks=(64, 32), mask="full"))
    live[0, 0, 0] = False
    lists = lists_of(live, torch.ones_like(live))
    assert torch.equal(live_of(lists), live)
    assert lists.indices[1, 2, 3, : lists.counts[1, 2, 3]].tolist() == live[1, 2, 3].nonzero().flatten().tolist()
    assert not lists.partial.any()


def test_whole_blocks_come_first() -> None:
    live = torch.tensor([[[[True, False, True, True, False, True], [False] * 6]]])
    whole = torch.tensor([[False, True, True, False, False, True], [True] * 6])
    lists = lists_of(live, whole)
    assert (lists.whole.tolist(), lists.partial.tolist()) == ([[[2, 0]]], [[[2, 0]]])
    assert lists.indices[0, 0, 0, :4].tolist() == [2, 5, 0, 3]
    assert all(x.dtype == torch.int32 for x in (*lists, lists.counts))
    assert torch.equal(live_of(lists), live)
    assert lists.indices.is_contiguous()


@pytest.mark.parametrize("seed", range(3))
def test_any_lists_convert(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    live, whole = (torch.rand(2, 3, 5, 7, generator=generator) < 0.5 for _ in range(2))
    lists = lists_of(live, whole)
    assert torch.equal(live_of(lists), live)
    assert torch.equal(live_of(BlockLists(lists.whole, torch.zeros_like(lists.partial), lists.indices)), live & whole)


def test_chunks_cover_a_range() -> None:
    assert [list(range(10))[some] for some in chunks(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(chunks(0, 4)) == []
