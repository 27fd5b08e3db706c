"""Samples in which passages come again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from afbs_compile.passes.capture import SampleRun
from afbs_compile.tuner.recall import MOST_PASSAGES, PASSAGE, SHARE, recalling


def sample(length: int, batch: int = 2, causal: bool = True) -> tuple[SampleRun, torch.Tensor]:
    tokens = torch.arange(batch * length).view(batch, length)
    other = torch.arange(length)
    return SampleRun(None, [SimpleNamespace(causal=True), SimpleNamespace(causal=causal)], [other, tokens, 3]), tokens


@pytest.mark.parametrize("length", [SHARE * PASSAGE, 1000, 1024, 4096, 32768])
def test_the_end_becomes_passages_from_all_over_the_rest(length):
    run, tokens = sample(length)
    found, positions = recalling(run, tokens)
    other, changed, number = found.inputs
    assert other is run.inputs[0]
    assert number == 3
    assert run.inputs[1] is tokens, "the sample itself is left alone"
    assert positions == PASSAGE * min(MOST_PASSAGES, length // (SHARE * PASSAGE)) <= length // SHARE
    assert torch.equal(changed[:, :-positions], tokens[:, :-positions])
    passages = changed[0, -positions:].view(-1, PASSAGE)
    assert (passages.diff(dim=1) == 1).all(), "each is a piece of the sample"
    starts = passages[:, 0].sort().values
    assert starts[-1] + PASSAGE <= length - positions, "of the part that remains"
    assert (starts.diff() >= PASSAGE).all()
    assert starts[0] < length // len(starts)
    assert starts[-1] >= (length - positions) * (len(starts) - 1) // len(starts)
    assert torch.equal(changed[1], changed[0] + length), "every row of the batch alike"


def test_what_is_short_or_sees_the_future_has_none():
    assert recalling(*sample(SHARE * PASSAGE - 1)) is None
    assert recalling(*sample(4096, causal=False)) is None
