"""Statistics of blocks of rows, in plain PyTorch, fp32: what policies score blocks by."""

from __future__ import annotations

import torch
from torch import Tensor


def in_blocks(x: Tensor, block: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows by blocks, and which of them exist and are valid.

    Args:
        x: ``[B, H, N, D]``; valid: bool ``[B, N]``, ``None`` for all.

    Returns:
        ``[B, H, n, block, D]``, zeros in place of the others, and bool ``[B or 1, 1, n, block]``.
    """
    missing = -x.shape[2] % block
    there = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device) if valid is None else valid
    if valid is not None:
        x = x.masked_fill(~valid[:, None, :, None], 0.0)
    rows = torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block))
    return rows, torch.nn.functional.pad(there, (0, missing)).view(there.shape[0], 1, -1, block)


def block_means(x: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """Mean row of each block, fp32 ``[B, H, n, D]``; missing and invalid rows do not count, of none it is 0.

    Args:
        x: ``[B, H, N, D]``; block: rows per block; valid: bool ``[B, N]``, ``None`` for all.
    """
    if valid is not None:
        rows, there = in_blocks(x, block, valid)
        return rows.sum(3, dtype=torch.float32) / there.sum(3).clamp_min(1)[..., None]
    count = x.shape[2] // block
    whole = count * block
    means: Tensor = x[:, :, :whole].unflatten(2, (count, block)).sum(3, dtype=torch.float32) / block
    if whole == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], 2)


def self_similarity(x: Tensor, block: int, valid: Tensor | None = None) -> Tensor:
    """Mean pairwise cosine of the valid rows of each block, fp32 ``[B, H, n]`` in [0, 1].

    Zero rows have no direction and add nothing; a block with an entry that is infinite or NaN has NaN.

    Args:
        x: ``[B, H, N, D]``; block: rows per block; valid: bool ``[B, N]``, ``None`` for all.
    """
    rows, there = in_blocks(x.float(), block, valid)
    sizes = there.sum(3).clamp_min(1)[..., None]
    # unit = (x / max|x|) / ||x / max|x|||: dividing by the largest entry first keeps the squares finite.
    scaled = rows / rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    unit = scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    # 1/n^2 sum_ab cos(x_a, x_b) = ||mean of unit rows||^2
    similarity: Tensor = (unit.sum(-2) / sizes).square().sum(-1)
    return similarity
