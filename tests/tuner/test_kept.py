"""Which blocks a site always keeps: what pays for itself, and rows that nothing after them could make up for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import Kept
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.recipe import KeptTrial
from afbs_compile.tuner.kept import LOCAL_KEYS, choose_kept, chosen, row_errors
from afbs_compile.tuner.measure import LOCAL_KEPT

SHAPE = BlockShape(64, 64)


def trials(errors: list[float], lives: list[float], worst: float = 1.0) -> list[KeptTrial]:
    return [KeptTrial(n, live, error, worst) for n, live, error in zip(LOCAL_KEYS, lives, errors, strict=True)]


# Twice the threshold saves a tenth of the blocks and adds 0.01 to the squared error: a block costs 0.1.
DEARER = KeptTrial(128, 0.2, math.sqrt(0.02), 1.0)


@pytest.mark.parametrize(
    ("errors", "lives", "local_keys"),
    [
        ([0.2, 0.1, 0.1, 0.1], [0.28, 0.29, 0.3, 0.31], 64),  # what more keys add buys nothing
        ([0.2, 0.15, 0.1, 0.1], [0.28, 0.29, 0.3, 0.31], 128),
        ([0.2, 0.15, 0.1, 0.05], [0.28, 0.29, 0.3, 0.31], 256),
        ([0.1, 0.1, 0.1, 0.1], [0.28, 0.29, 0.3, 0.31], 0),
        ([0.1, 0.1, 0.1, 0.1], [0.2999, 0.3, 0.3, 0.3], 128),  # next to nothing is saved: as usual
        ([0.1, 0.1, 0.1, 0.1], [0.2999, 0.3, 0.31, 0.31], 64),  # nor by leaving these out
        ([0.2, 0.15, 0.1, 0.05], [0.28, 0.29, 0.3, 0.4], 128),  # the same error is cheaper by the threshold
    ],
)
def test_keys_that_pay_for_themselves(errors: list[float], lives: list[float], local_keys: int) -> None:
    assert chosen(LOCAL_KEPT, trials(errors, lives), DEARER) == Kept(64, local_keys)


def test_where_the_threshold_saves_nothing_only_errors_count() -> None:
    same = KeptTrial(128, 0.3, 0.2, 1.0)
    assert chosen(LOCAL_KEPT, trials([0.2, 0.15, 0.1, 0.05], [0.28, 0.29, 0.3, 0.31]), same).local_keys == 256


@pytest.mark.parametrize(("worst", "rows"), [(0.4, 0), (0.6, 64)])
def test_last_rows_are_whole_where_any_row_loses_much(worst: float, rows: int) -> None:
    assert chosen(LOCAL_KEPT, trials([0.1] * 4, [0.3] * 4, worst), DEARER).last_rows == rows


def looking_back(distance: int, length: int = 1024) -> Operands:
    """Every row looks for the key ``distance`` before it, of a random direction, and for nothing else."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, length, 64, generator=generator) for _ in range(2))
    return Operands(8 * k.roll(distance, 2), k, v, mask_of("causal"), 1 / 8)


def test_heads_that_look_back_far_get_more_keys() -> None:
    near, far = (choose_kept(looking_back(distance), LOCAL_KEPT, SHAPE, 0.9) for distance in (2, 150))
    assert near.kept.local_keys <= 64 < far.kept.local_keys
    assert [trial.local_keys for trial in near.tried] == list(LOCAL_KEYS)
    assert far.tried[0].error > 5 * far.tried[-1].error
    assert far.tried[0].worst_row > 0.5


def test_nothing_is_tried_where_rows_do_not_look_back_or_nothing_can_be_skipped() -> None:
    sample = looking_back(2)
    assert choose_kept(sample, Kept(), SHAPE, 0.02) == choose_kept(sample.first_rows(64), Kept(), SHAPE, 0.02)
    assert choose_kept(sample, Kept(), SHAPE, 0.02).tried == ()
    assert choose_kept(sample.first_rows(128), LOCAL_KEPT, SHAPE, 0.02).kept == LOCAL_KEPT


def test_what_is_not_finite_chooses_nothing() -> None:
    sample = looking_back(2)
    v = sample.v.clone()
    v[:, :, 200] = math.nan
    choice = choose_kept(replace(sample, v=v), LOCAL_KEPT, SHAPE, 0.02)
    assert (choice.kept, choice.tried) == (LOCAL_KEPT, ())


def test_errors_of_rows() -> None:
    dense = torch.tensor([[[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]]])
    out = torch.tensor([[[[3.0, 1.0], [0.0, 0.0], [1.0, 2.0]]]])
    assert row_errors(out, dense).flatten().tolist() == pytest.approx([9 / 25, 0.0, 4.0])
