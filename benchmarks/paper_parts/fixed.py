"""Patterns that no input decides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paper_parts.head import BLOCK, Head, largest, width_for

GLOBAL = 64
"""Tokens that Longformer's rows all see: the first ones, as for a question in front of a text."""

SINKS = 4
"""As StreamingLLM recommends."""


def everything(head: Head, t: float) -> Tensor:
    """Dense attention."""
    return head.visible


def window(head: Head, t: float) -> Tensor:
    """The keys right before a row."""
    return head.distance < width_for(head.length, t)


def longformer(head: Head, t: float) -> Tensor:
    """Window and global tokens (Beltagy et al. 2020); rows of global tokens see all that is before them anyway."""
    return (head.distance < max(1, width_for(head.length, t) - GLOBAL)) | (head.places < GLOBAL)


def streaming(head: Head, t: float) -> Tensor:
    """Sinks and window (StreamingLLM, Xiao et al. 2023)."""
    return (head.distance < max(1, width_for(head.length, t) - SINKS)) | (head.places < SINKS)


def strided(head: Head, t: float) -> Tensor:
    """The last l keys, and every l-th one (Sparse Transformer, Child et al. 2019), for l from sqrt(N) on."""
    stride = _stride_for(head.length, t)
    return (head.distance < stride) | (head.places % stride == stride - 1)


def _stride_for(length: int, t: float) -> int:
    least = math.isqrt(length)
    rows = torch.arange(length)
    for stride in range(least, length):
        kept = (rows + 1).clamp_max(stride) + ((rows + 1).clamp_min(stride) - stride) // stride
        if float(kept.sum()) >= (1 - t) * length * (length + 1) / 2:
            return stride
    return length


def sink_and_random(head: Head, t: float) -> Tensor:
    """Sinks and random keys."""
    kept = torch.rand(head.length, head.length, generator=head.draw, device=head.device) < 1 - t
    return kept | (head.places < SINKS)


def random_blocks(head: Head, t: float) -> Tensor:
    """Random blocks, and each row's own."""
    count = head.length // BLOCK
    scores = torch.rand(count, count, generator=head.draw, device=head.device)
    return largest(scores + 2 * torch.eye(count, device=head.device), t)
