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

from typing import Any

import torch
from kernel_sections import engines
from torch import Tensor

from afbs_compile.kernels import fp8, hopper_fp8, reference
from afbs_compile.kernels.predict import BlockLists, lists_to_mask, mask_to_lists
from afbs_compile.kernels.predict_triton import predict_blocks

HEADS, KV_HEADS = 4, 2
TAU, THETA, LAM = [0.4, 0.7, 0.9, 1.0], [reference.THETA_OFF, 0.1, 0.2, reference.THETA_OFF], [-1000.0, -8.0, 0.0, -2.0]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
OFF = [reference.LAMBDA_OFF] * HEADS
CALLS = (
    # length, head_dim, dtype, causal, block_q, block_k, lambda on
    (300, 128, torch.bfloat16, True, 128, 128, False),
    (300, 64, torch.float16, False, 128, 64, True),
    (257, 128, torch.bfloat16, True, 64, 64, True),
    (200, 80, torch.float16, True, 128, 64, False),
    (200, 64, torch.float32, True, 64, 64, False),
)


HOPPER_CALLS = tuple(
    (length, dim, dtype, causal, block_k)
    for dim in (64, 128)
    for block_k in (128, 64)
    for length, dtype, causal in ((513, torch.bfloat16, True), (300, torch.float16, False))
)
"""Every kernel that Hopper's can become: head_dim, block shape and mask; each compiles for some seconds."""

FP8_TOLERANCE = 4e-2
"""Mean absolute error: the operands' three bits of mantissa."""


def main() -> None:
    torch.manual_seed(0)
    for length, dim, dtype, causal, block_q, block_k, uses_lambda in CALLS:
        q, k, v = (_with_gaps(h, length, dim, dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
        call = {"causal": causal, "block_q": block_q, "block_k": block_k}
        for theta in (THETA, [reference.THETA_OFF] * HEADS):
            lists = predict_blocks(q, k, TAU, theta, **call)
        _compare("portable", q, k, v, lists, LAM if uses_lambda else OFF, **call)
    hopper = engines(torch.device("cuda")).get("hopper")
    if hopper is None or torch.cuda.get_device_capability()[0] != 9:
        print("no Hopper GPU: its kernel was not run")
        return
    for length, dim, dtype, causal, block_k in HOPPER_CALLS:
        q, k, v = (_with_gaps(h, length, dim, dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
        call = {"causal": causal, "block_q": 128, "block_k": block_k}
        lists = mask_to_lists(_half(length, **call))
        _compare("hopper", q, k, v, lists, OFF, **call)
        if block_k == fp8.BLOCK:
            _compare("fp8", q, k, v, lists, OFF, **call)


def _compare(name: str, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, lam: list[float], **call: Any) -> None:
    """Run one kernel against the reference over the same blocks.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    live = lists_to_mask(lists, lists.indices.shape[-1])
    truth = reference.masked_attention(q, k, v, live, lam, **call)
    attend = hopper_fp8.attend if name == "fp8" else engines(q.device)[name]
    off = float((attend(q, k, v, lists, lam, **call) - truth).float().abs().mean())
    kind = "causal={causal} {block_q}x{block_k}".format(**call)
    print(f"{name:9} {q.shape[2]} x {q.shape[3]} {q.dtype} {kind}: {off:.1e}", flush=True)
    assert off <= (FP8_TOLERANCE if name == "fp8" else TOLERANCE[q.dtype])


def _half(length: int, causal: bool, block_q: int, block_k: int) -> Tensor:
    """Random blocks of every head and those on the diagonal: lists without the predictor and its compilation."""
    counts = [reference.block_count(length, block) for block in (block_q, block_k)]
    shape = (*counts, block_q, block_k)
    live = torch.rand(1, HEADS, *counts, device="cuda") < 0.5
    live |= reference.diagonal_blocks(*shape, live.device)
    return live & reference.visible_blocks(*shape, causal, live.device)


def _with_gaps(heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """``[1, heads, length, dim]`` with memory of others between its rows."""
    wide = torch.randn(1, length, heads, dim + 16, device="cuda").to(dtype)
    return wide[..., :dim].transpose(1, 2)


if __name__ == "__main__":
    main()
