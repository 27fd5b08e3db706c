"""Small calls of every kernel, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck  python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py

Odd lengths, grouped heads, gaps between rows, both masks, every block shape, every dtype; results are compared with
the reference too, so that a run that launches nothing fails. On a Hopper GPU its own kernels, bf16's and FP8's, run as
well. Run the file by itself first: Triton then has its kernels compiled, and the tools only watch them run. PyTorch's
allocator would hide an access past the end of a tensor inside its own pool: it is switched off.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from torch import Tensor

from afbs_compile.kernels.attend.engine import Engine
from afbs_compile.kernels.attend.hopper.engine import Hopper
from afbs_compile.kernels.attend.hopper_fp8.engine import HopperFp8
from afbs_compile.kernels.attend.portable.engine import Portable
from afbs_compile.kernels.blocks import BlockLists, BlockShape, lists_of, live_of
from afbs_compile.kernels.call import LAMBDA_OFF, THETA_OFF, SparseCall
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.kernels.select import triton
from afbs_compile.kernels.sight import sight_of
from afbs_compile.kernels.spec.attention import masked_attention
from afbs_compile.kernels.spec.fp8 import BLOCK
from afbs_compile.kernels.spec.selection import near_blocks

HEADS, KV_HEADS = 4, 2
TAU, OFF = (0.4, 0.7, 0.9, 1.0), (THETA_OFF,) * HEADS
THETA, LAM = (THETA_OFF, 0.1, 0.2, THETA_OFF), (LAMBDA_OFF, -8.0, 0.0, -2.0)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CALLS = (
    # length, head_dim, dtype, mask, blocks, lambda on
    (300, 128, torch.bfloat16, "causal", BlockShape(128, 128), False),
    (300, 64, torch.float16, "full", BlockShape(128, 64), True),
    (257, 128, torch.bfloat16, "causal", BlockShape(64, 64), True),
    (200, 80, torch.float16, "causal", BlockShape(128, 64), False),
    (200, 64, torch.float32, "causal", BlockShape(64, 64), False),
)
HOPPER_CALLS = tuple(
    (length, dim, dtype, mask, BlockShape(128, block_k))
    for dim in (64, 128)
    for block_k in (128, 64)
    for length, dtype, mask in ((513, torch.bfloat16, "causal"), (300, torch.float16, "full"))
)
"""Every kernel that Hopper's can become: head_dim, block shape and mask; each compiles for some seconds."""

FP8_TOLERANCE = 4e-2
"""Mean absolute error: the operands' three bits of mantissa."""


def main() -> None:
    torch.manual_seed(0)
    for length, dim, dtype, mask, shape, uses_lambda in CALLS:
        operands = _operands(length, dim, dtype, mask)
        for theta in (THETA, OFF):
            call = _call(shape, theta, LAM if uses_lambda else (LAMBDA_OFF,) * HEADS)
            lists = triton.select(operands, call)
        _compare(Portable(), operands, call, lists)
    if torch.cuda.get_device_capability()[0] != 9:
        print("no Hopper GPU: its kernel was not run")
        return
    for length, dim, dtype, mask, shape in HOPPER_CALLS:
        operands, call = _operands(length, dim, dtype, mask), _call(shape, OFF, (LAMBDA_OFF,) * HEADS)
        lists = _half(operands, shape)
        _compare(Hopper(), operands, call, lists)
        if shape.k == BLOCK:
            _compare(HopperFp8(), operands, call, lists)


def _call(shape: BlockShape, theta: tuple[float, ...], lam: tuple[float, ...]) -> SparseCall:
    return SparseCall(TAU, theta, lam, ("meansim",) * HEADS, shape)


def _compare(engine: Engine, operands: Operands, call: SparseCall, lists: BlockLists) -> None:
    """Run one kernel against the reference over the same blocks.

    Raises:
        AssertionError: they differ by more than rounding, or the engine does not take the call.
    """
    reason = engine.refusal(operands, call)
    assert reason is None, reason
    q, out = operands.q, empty_output(operands.q, operands.v)
    engine.attend(operands, call, lists, out)
    off = float((out - masked_attention(operands, live_of(lists), call.lam, call.shape)).float().abs().mean())
    print(f"{engine.name:9} {q.shape[2]} x {q.shape[3]} {q.dtype} {operands.mask} {call.shape}: {off:.1e}", flush=True)
    assert off <= (FP8_TOLERANCE if engine.precision == "fp8" else TOLERANCE[q.dtype])


def _half(operands: Operands, shape: BlockShape) -> BlockLists:
    """Random blocks of every head and those on the diagonal: lists without the predictor and its compilation."""
    grid = operands.grid(shape)
    live = torch.rand(1, HEADS, grid.count_q, grid.count_k, device="cuda") < 0.5
    sight = sight_of(operands, shape)
    live |= near_blocks(operands, shape, sight)
    return lists_of(live & sight.visible, sight.whole)


def _operands(length: int, dim: int, dtype: torch.dtype, mask: str) -> Operands:
    q, k, v = (_with_gaps(heads, length, dim, dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return Operands(q, k, v, mask_of(mask), dim**-0.5)


def _with_gaps(heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """``[1, heads, length, dim]`` with memory of others between its rows."""
    wide = torch.randn(1, length, heads, dim + 16, device="cuda").to(dtype)
    return wide[..., :dim].transpose(1, 2)


if __name__ == "__main__":
    main()
