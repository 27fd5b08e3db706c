"""Text in which passages come again: what a model must find far back to predict it.

Ordinary text asks for that rarely. A head that finds a needle costs next to nothing where there is none, so a budget
measured on such text gives the head away, and with it the model's recall: on a Llama of 40 million parameters a budget
of 1 % left 64 of 100 pass keys at the length it was calibrated at (``benchmarks/frontier.py``). So the end of a sample
is replaced by passages from all over it, and the budget holds there as well.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from afbs_compile.passes.capture import SampleRun

PASSAGE = 32
"""Tokens of a passage: the first few say which one it is, the others can be looked up."""

MOST_PASSAGES = 16

SHARE = 8
"""One part in so many of a sample becomes passages at most."""


def recalling(run: SampleRun, tokens: Tensor) -> tuple[SampleRun, int] | None:
    """The sample with passages of its own at its end.

    Args:
        run: the sample.
        tokens: the one of its inputs that holds token numbers, ``[batch, positions]`` or ``[positions]``.

    Returns:
        The changed sample and the number of positions at its end that are passages; ``None`` where the sample is too
        short for one, or where a position may attend later ones, which would see what comes again.
    """
    length = tokens.shape[-1]
    passages = min(MOST_PASSAGES, length // (SHARE * PASSAGE))
    if passages == 0 or not all(site.causal for site in run.sites):
        return None
    end = passages * PASSAGE
    # One from each of equal parts of what remains, in an order that mixes near and far ones.
    part = (length - end) // passages
    order = torch.randperm(passages, generator=torch.Generator().manual_seed(0))
    places = (order[:, None] * part + (part - PASSAGE) // 2 + torch.arange(PASSAGE)).flatten().to(tokens.device)
    changed = torch.cat([tokens[..., : length - end], tokens[..., places]], -1)
    return replace(run, inputs=[changed if value is tokens else value for value in run.inputs]), end
