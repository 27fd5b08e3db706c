"""Small calls of every kernel, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck  python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py

Odd lengths, grouped heads, gaps between rows, both masks, every block shape, every dtype; results are compared with
the reference too, so that a run that launches nothing fails. PyTorch's allocator would hide an access past the end of
a tensor inside its own pool: it is switched off.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from kernel_sections import engines
from torch import Tensor

from afbs_compile.kernels import reference
from afbs_compile.kernels.predict import lists_to_mask
from afbs_compile.kernels.predict_triton import predict_blocks

HEADS, KV_HEADS = 4, 2
TAU, THETA, LAM = [0.4, 0.7, 0.9, 1.0], [reference.THETA_OFF, 0.1, 0.2, reference.THETA_OFF], [-1000.0, -8.0, 0.0, -2.0]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CALLS = (
    # length, head_dim, dtype, causal, block_q, block_k, lambda on
    (300, 128, torch.bfloat16, True, 128, 128, False),
    (300, 64, torch.float16, False, 128, 64, True),
    (257, 128, torch.bfloat16, True, 64, 64, True),
    (200, 80, torch.float16, True, 128, 64, False),
    (200, 64, torch.float32, True, 64, 64, False),
)


def main() -> None:
    torch.manual_seed(0)
    for length, dim, dtype, causal, block_q, block_k, uses_lambda in CALLS:
        q, k, v = (_with_gaps(h, length, dim, dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
        call = {"causal": causal, "block_q": block_q, "block_k": block_k}
        lam = LAM if uses_lambda else [reference.LAMBDA_OFF] * HEADS
        for theta in (THETA, [reference.THETA_OFF] * HEADS):
            lists = predict_blocks(q, k, TAU, theta, **call)
        live = lists_to_mask(lists, lists.indices.shape[-1])
        truth = reference.masked_attention(q, k, v, live, lam, **call)
        for name, attend in engines(q.device).items():
            off = float((attend(q, k, v, lists, lam, **call) - truth).float().abs().mean())
            print(f"{name:9} {length} x {dim} {dtype} causal={causal} {block_q}x{block_k}: {off:.1e}", flush=True)
            assert off <= TOLERANCE[dtype]
    torch.cuda.synchronize()


def _with_gaps(heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """``[1, heads, length, dim]`` with memory of others between its rows."""
    wide = torch.randn(1, length, heads, dim + 16, device="cuda").to(dtype)
    return wide[..., :dim].transpose(1, 2)


if __name__ == "__main__":
    main()
