"""How a block shape is laid on a GPU by the portable kernel: tiles, warps and pipeline depth.

A rule from the chip's shared memory and registers gives the first choice. Its figures were measured on Hopper, and
there the rule decides. On every other GPU a handful of neighbours are timed on the first call of a kind that is long
enough to tell them apart, on that call's own operands; the quickest serves from then on. Results of two choices differ
by rounding alone; for a call that uses lambda tiles are cut no further than they must be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from afbs_compile.kernels.attend.machine import capability, runs_triton
from afbs_compile.kernels.blocks import BlockShape

WARP = 32
WARPS = (4, 8)
HALF_BYTES = 2

SHORTEST_TIMED = 2048
"""Tokens below which a call says little about a launch shape."""

REPEATS = 3


class LaunchShape(NamedTuple):
    """How a block shape is laid on the machine.

    Attributes:
        tile_q, tile_k: rows of queries and keys that a program holds; they divide the block.
        warps: warps per program.
        stages: depth of the software pipeline over key blocks.
    """

    tile_q: int
    tile_k: int
    warps: int
    stages: int


class Chip(NamedTuple):
    """What the rule asks of a GPU.

    Attributes:
        shared_memory: bytes that one program may use.
        hopper: whether matrix products read their operands from shared memory alone, which leaves registers free.
    """

    shared_memory: int
    hopper: bool

    def registers(self, itemsize: int) -> int:
        """Accumulator and scores that a thread may hold; of its 255 registers some hold operands and addresses.

        Above these the compiler reports spills (``benchmarks/spills.py``). Products of fp32 operands are three
        products of parts of them, which a thread holds too.
        """
        if self.hopper:
            return 160 if itemsize <= HALF_BYTES else 72
        return 112 if itemsize <= HALF_BYTES else 28


class Kind(NamedTuple):
    """Calls that share a launch shape.

    Attributes:
        device: where it runs.
        shape: rows per block.
        dim_pad: columns that a tile holds.
        itemsize: bytes per element.
        masked: whether there may be partial blocks.
        whole: whether tiles must be whole blocks, as lambda asks, where these fit the machine.
    """

    device: torch.device
    shape: BlockShape
    dim_pad: int
    itemsize: int
    masked: bool
    whole: bool


def launch_shape(shape: BlockShape, dim_pad: int, itemsize: int, chip: Chip) -> LaunchShape:
    """The largest tiles that divide the blocks and fit the chip, with the deepest pipeline that still fits.

    Args:
        shape: rows per block.
        dim_pad: columns that a tile holds.
        itemsize: bytes per element.
        chip: where it runs.
    """
    # Measured on an H200: a program is best left one block, cut only where its registers spill. fp32 operands are twice
    # as wide and multiplied three times.
    widest_q, widest_k = 128, 128
    if itemsize > HALF_BYTES:
        widest_q = widest_k = 64 if dim_pad <= 64 else 32
    tile_q, tile_k = min(shape.q, widest_q), min(shape.k, widest_k)
    while not any(_fits(tile_q, tile_k, warps, dim_pad, itemsize, chip) for warps in WARPS):
        if tile_k > 16 and (tile_k >= tile_q or tile_q <= 64):
            tile_k //= 2
        elif tile_q > 16:
            tile_q //= 2
        else:
            break
    # The fewest warps that hold the tile: each then reuses more of what it loads. A wide head's accumulator fills four.
    order = WARPS[::-1] if dim_pad > 128 and itemsize <= HALF_BYTES else WARPS
    warps = next((warps for warps in order if _fits(tile_q, tile_k, warps, dim_pad, itemsize, chip)), WARPS[0])
    return _shape(tile_q, tile_k, warps, dim_pad, itemsize, chip)


def candidates(
    shape: BlockShape, dim_pad: int, itemsize: int, chip: Chip, *, whole: bool = False
) -> tuple[LaunchShape, ...]:
    """:func:`launch_shape` first, then its neighbours that fit: half the keys, half the queries, fewer warps.

    Args:
        shape, dim_pad, itemsize, chip: as in :func:`launch_shape`.
        whole: leave the tiles of :func:`launch_shape` as they are.

    Returns:
        At most five.
    """
    first = launch_shape(shape, dim_pad, itemsize, chip)
    tile_q, tile_k = first.tile_q, first.tile_k
    tiles = [(tile_q, tile_k)]
    if not whole:
        tiles += [(tile_q, tile_k // 2), (tile_q // 2, tile_k), (tile_q // 2, tile_k // 2)]
    found = [first]
    for rows, keys in tiles:
        for warps in WARPS:
            # A warp multiplies sixteen rows at a time.
            useful = rows >= 16 * warps and keys >= 32
            if useful and _fits(rows, keys, warps, dim_pad, itemsize, chip):
                tile = _shape(rows, keys, warps, dim_pad, itemsize, chip)
                found += [] if tile in found else [tile]
    return tuple(found[:5])


def _shape(tile_q: int, tile_k: int, warps: int, dim_pad: int, itemsize: int, chip: Chip) -> LaunchShape:
    stages = 2 if _bytes(tile_q, tile_k, 2, dim_pad, itemsize) <= chip.shared_memory else 1
    return LaunchShape(tile_q, tile_k, warps, stages)


def _fits(tile_q: int, tile_k: int, warps: int, dim_pad: int, itemsize: int, chip: Chip) -> bool:
    """Whether tiles, without a pipeline, fit shared memory and registers."""
    held = tile_q * (dim_pad + tile_k) <= chip.registers(itemsize) * WARP * warps
    return held and tile_q >= 4 * warps and _bytes(tile_q, tile_k, 1, dim_pad, itemsize) <= chip.shared_memory


def _bytes(tile_q: int, tile_k: int, stages: int, dim_pad: int, itemsize: int) -> int:
    """Shared memory for the query tile and a pipeline of key and value tiles; for fp32 also the weights' tile."""
    weights = tile_q * tile_k * itemsize if itemsize > HALF_BYTES else 0
    return dim_pad * itemsize * (tile_q + 2 * stages * tile_k) + weights


@functools.cache  # the driver takes a millisecond to answer
def _shapes(kind: Kind) -> tuple[LaunchShape, ...]:
    """What a kind of call chooses from; whole blocks where Triton only interprets."""
    sizes = (kind.shape, kind.dim_pad, kind.itemsize)
    if not runs_triton(kind.device):
        return (LaunchShape(*kind.shape.rows, 4, 1),)
    properties = triton.runtime.driver.active.utils.get_device_properties(kind.device.index)
    shared = int(properties["max_shared_mem"])
    if capability(kind.device) == 9:
        return (_hopper_shape(kind, Chip(shared, hopper=True)),)
    return candidates(*sizes, Chip(shared, hopper=False), whole=kind.whole)


def _hopper_shape(kind: Kind, chip: Chip) -> LaunchShape:
    """What ``benchmarks/portable.py`` found quickest on an H200.

    Of half precisions 128 x 128 blocks of head_dim 128 gain from tiles above 64 x 64: 404 TFLOP/s against 328. Smaller
    blocks lose 13 % by them, and head_dim 64 loses 9 to 15 %.
    """
    first = launch_shape(kind.shape, kind.dim_pad, kind.itemsize, chip)
    large = (first[:2] == (128, 128) and kind.dim_pad == 128) or kind.dim_pad > 128
    if kind.whole or kind.itemsize > HALF_BYTES or large:
        return first
    smaller = BlockShape(min(kind.shape.q, 64), min(kind.shape.k, 64))
    return launch_shape(smaller, kind.dim_pad, kind.itemsize, chip)


def by_rule(kind: Kind) -> LaunchShape:
    """The launch shape of a kind of call by the rule alone, without timing."""
    return _shapes(kind)[0]


_chosen: dict[Kind, LaunchShape] = {}


def choose(kind: Kind, length: int, launch: Callable[[LaunchShape], None]) -> LaunchShape:
    """The launch shape of a call; the first long one of its kind times the candidates.

    Timing waits for the device, so it is left out while a CUDA graph is captured.

    Args:
        kind: what decides.
        length: tokens of the call.
        launch: runs the call with a launch shape.
    """
    shapes = _shapes(kind)
    if len(shapes) == 1 or kind in _chosen:
        return _chosen.get(kind, shapes[0])
    if length < SHORTEST_TIMED or torch.cuda.is_current_stream_capturing():
        return shapes[0]
    _chosen[kind] = min(shapes, key=lambda shape: _milliseconds(shape, launch))
    return _chosen[kind]


def _milliseconds(shape: LaunchShape, launch: Callable[[LaunchShape], None]) -> float:
    """The best of a few runs; infinite where the machine has too little for the shape."""
    try:
        launch(shape)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    best = float("inf")
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch(shape)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best


def describe(kind: Kind) -> str:
    """The launch shape that calls of a kind use, for a reader: ``"portable 128x64 tiles, 4 warps, 2 stages"``."""
    shape = _chosen.get(kind, by_rule(kind))
    stages = "1 stage" if shape.stages == 1 else f"{shape.stages} stages"
    return f"portable {shape.tile_q}x{shape.tile_k} tiles, {shape.warps} warps, {stages}"
