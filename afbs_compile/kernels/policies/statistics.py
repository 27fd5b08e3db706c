"""Statistics of blocks of rows, in plain PyTorch, fp32: what policies score blocks by."""

from __future__ import annotations

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import block_count


def block_means(x: Tensor, block: int) -> Tensor:
    """Mean row of each block, fp32 ``[B, H, n, D]``; rows missing from the last block do not count."""
    count = x.shape[2] // block
    whole = count * block
    means: Tensor = x[:, :, :whole].unflatten(2, (count, block)).sum(3, dtype=torch.float32) / block
    if whole == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], 2)


def self_similarity(x: Tensor, block: int) -> Tensor:
    """Mean pairwise cosine of the rows of each block, fp32 ``[B, H, n]`` in [0, 1].

    Zero rows have no direction and add nothing; a block with an entry that is infinite or NaN has NaN.
    """
    batch, heads, length, dim = x.shape
    count = block_count(length, block)
    rows = torch.nn.functional.pad(x.float(), (0, 0, 0, count * block - length)).view(batch, heads, count, block, dim)
    sizes = torch.full((count, 1), block, device=x.device)
    sizes[-1] = length - (count - 1) * block
    # unit = (x / max|x|) / ||x / max|x|||: dividing by the largest entry first keeps the squares finite.
    scaled = rows / rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    unit = scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    # 1/n^2 sum_ab cos(x_a, x_b) = ||mean of unit rows||^2
    similarity: Tensor = (unit.sum(-2) / sizes).square().sum(-1)
    return similarity
