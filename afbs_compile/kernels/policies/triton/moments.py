# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""The features of ``cumulant`` on the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from afbs_compile.kernels.blocks import block_count
from afbs_compile.kernels.launcher import Launcher, layout, padded
from afbs_compile.kernels.policies.features import GROUP


@triton.jit(do_not_specialize=["length", "heads", "groups"])
def _moment_kernel(
    x, out, scale, length, heads, groups, stride_batch, stride_head, stride_row, stride_dim,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, GROUP: tl.constexpr, OF_QUERIES: tl.constexpr,
):  # fmt: skip
    """The row of one group: its mean times ``scale``, then half the square of that (queries) or the variance (keys)."""
    program = tl.program_id(0)
    group = program % groups
    plane = program // groups
    first = group * GROUP
    size = tl.minimum(GROUP, length - first)
    rows = tl.arange(0, GROUP)
    dims = tl.arange(0, DIM_PAD)
    inside = (rows < size)[:, None] & (dims < HEAD_DIM)[None, :]
    base = x + (plane // heads).to(tl.int64) * stride_batch + (plane % heads).to(tl.int64) * stride_head
    offsets = (first + rows).to(tl.int64)[:, None] * stride_row + dims.to(tl.int64)[None, :] * stride_dim
    tile = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tile, 0) / size
    if OF_QUERIES:
        mean = mean * scale
        second = mean * mean / 2
    else:
        apart = tl.where(inside, tile - mean[None, :], 0.0)
        second = tl.sum(apart * apart, 0) / size
    place = out + program.to(tl.int64) * 2 * HEAD_DIM + dims
    tl.store(place, mean, mask=dims < HEAD_DIM)
    tl.store(place + HEAD_DIM, second, mask=dims < HEAD_DIM)


_moments = Launcher(_moment_kernel)


def moment_rows(x: Tensor, scale: float, *, of_queries: bool) -> Tensor:
    """The features of ``cumulant``.

    Args:
        x: ``[B, H, N, D]``, any strides.
        scale: factor of the means.
        of_queries: whether the second half of a row is half the square of the first, else the variance.

    Returns:
        ``[B, H, ceil(N / GROUP), 2 D]``: fp32, or bfloat16 where x is in half precision.
    """
    batch, heads, length, dim = x.shape
    groups = block_count(length, GROUP)
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    out = x.new_empty(batch, heads, groups, 2 * dim, dtype=dtype)
    with torch.cuda.device_of(x):
        _moments(
            (layout(x), scale, of_queries),
            batch * heads * groups,
            *(x, out, scale, length, heads, groups),
            *x.stride(),
            *(dim, padded(dim), GROUP, of_queries),
            warps=1,
        )
    return out
