"""The launch of the portable kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from afbs_compile.kernels.attend.machine import fp32_products
from afbs_compile.kernels.attend.portable.extras import Extras
from afbs_compile.kernels.attend.portable.kernel import forward_kernel
from afbs_compile.kernels.attend.portable.tiling import Kind, LaunchShape, choose, describe
from afbs_compile.kernels.blocks import BlockLists
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.launcher import Launcher, device_constants, layout, padded
from afbs_compile.kernels.masks.band import as_band
from afbs_compile.kernels.operands import Operands

LARGEST_ROW_STRIDE = 2**31 // 256
"""Offsets inside a tile of at most 256 rows are 32 bits wide; the start of a tile is 64 bits wide."""

_forward = Launcher(forward_kernel)


def attend(operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
    """:meth:`afbs_compile.kernels.attend.portable.engine.Portable.attend`, whatever the device, for the interpreter."""
    operands = operands.with_positive_scale()
    q, k, v = (_addressable(x) for x in (operands.q, operands.k, operands.v))
    extras = Extras.of(operands, lists.whole)
    kind, grid = _kind(operands, call), operands.grid(call.shape)
    (batch, heads, _, dim), shape = q.shape, call.shape
    layouts = tuple(map(layout, (q, k, v, out, *lists, *extras[:3])))

    def launch(tiles: LaunchShape) -> None:
        has_lambda = call.uses_lambda and tiles[:2] == shape.rows
        _forward(
            (layouts, shape, extras[3:], has_lambda, tiles),
            batch * heads * grid.count_q * (shape.q // tiles.tile_q),
            *(q, k, v, out, *lists),
            device_constants(call.lam, q.device) if has_lambda else lists.whole,
            *extras[:3],
            *(extras.scale, grid.q_len, grid.k_len, extras.upper, extras.width, extras.natural, extras.softcap),
            *(heads, operands.groups, grid.count_q, grid.count_k),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *extras.strides),
            *(dim, kind.dim_pad, *shape.rows, tiles.tile_q, tiles.tile_k),
            *(extras.form, kind.masked, has_lambda, fp32_products(q.device)),
            *(extras.has_valid, extras.has_mask, extras.capped, extras.has_sinks, extras.changed, extras.blind),
            warps=tiles.warps,
            stages=tiles.stages,
        )

    with torch.cuda.device_of(q):  # Triton launches on the current device.
        launch(choose(kind, grid.k_len, launch))


def _addressable(x: Tensor) -> Tensor:
    """``x`` itself if the kernel can walk it, else a contiguous copy: the last dimension must have stride 1."""
    return x if x.stride(3) == 1 and x.stride(2) < LARGEST_ROW_STRIDE else x.contiguous()


def described(operands: Operands, call: SparseCall) -> str:
    """What :func:`attend` launches for a call, e.g. ``"portable 128x64 tiles, 4 warps, 2 stages"``."""
    return describe(_kind(operands, call))


def _kind(operands: Operands, call: SparseCall) -> Kind:
    masked = as_band(operands).bounded or operands.k_len % call.shape.k != 0 or not operands.by_formula
    q = operands.q
    return Kind(q.device, call.shape, padded(q.shape[3]), q.dtype.itemsize, masked, call.uses_lambda)
