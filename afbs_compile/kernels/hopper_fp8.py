"""Block-sparse attention forward on FP8 operands on Hopper GPUs: when it may be used, and its launches.

The rule is :mod:`afbs_compile.kernels.fp8`; the kernels are in :mod:`afbs_compile.kernels.fp8_triton`, which rounds
the operands, and :mod:`afbs_compile.kernels.hopper_fp8_kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from afbs_compile.kernels import hopper
from afbs_compile.kernels.fp8 import BLOCK, Quantised
from afbs_compile.kernels.fp8_triton import quantise
from afbs_compile.kernels.hopper_fp8_kernel import forward_kernel
from afbs_compile.kernels.predict import BlockLists
from afbs_compile.kernels.reference import block_count

STAGES = 4
"""Steps whose keys and values are kept."""


def refusal(
    device: torch.device, dtype: torch.dtype, head_dim: int, lam: Sequence[float], block_q: int, block_k: int
) -> str | None:
    """Why :func:`attend` does not take a call, or ``None`` if it does.

    Args:
        device, dtype, head_dim: of the operands.
        lam, block_q, block_k: as in :func:`attend`.

    Returns:
        A sentence that names what came and what is accepted.
    """
    return hopper.unsuited(device, dtype, head_dim, lam, (block_q, block_k), ((BLOCK, BLOCK),))


@functools.cache
def _copy_layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """How a copy of bytes lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], gl.float8e4nv)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy engine knows of ``x``: it fills what lies past the end with zeros."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, columns], _copy_layout(rows, columns))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    lam: Sequence[float],
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = BLOCK,
    block_k: int = BLOCK,
    constants: tuple[float, ...] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention over the live blocks of ``lists``, its operands rounded to FP8.

    Two kernels and memory for q, k and v at a byte an element. No host synchronisation once the constants are on the
    device; may be captured into a CUDA graph; the same inputs give the same bits.

    Args:
        q: ``[B, H, N, D]`` fp16 or bf16, D 64 or 128; k, v: ``[B, H_kv, N, D]`` of the same dtype; any strides.
        lists: as in :func:`afbs_compile.kernels.hopper.attend`.
        lam: one number per query head, all of them :data:`~afbs_compile.kernels.reference.LAMBDA_OFF` or less.
        causal: whether row r attends keys 0..r only.
        scale: softmax scale; ``None`` means ``D ** -0.5``.
        block_q, block_k: rows per block, 128.
        constants: as in :meth:`afbs_compile.kernels.fp8.Constants.unpacked`.
        out: ``[B, H, N, D]`` to write into, its last dimension contiguous; by default a new tensor, in memory
            ``[B, N, H, D]``.

    Returns:
        ``out``, in the dtype of ``q``.

    Raises:
        ValueError: the call is one that :func:`refusal` refuses.
    """
    batch, heads, length, dim = q.shape
    if out is None:
        out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    if out.numel() == 0:
        return out
    reason = refusal(q.device, q.dtype, dim, lam, block_q, block_k)
    if reason is not None:
        raise ValueError(reason)
    with torch.cuda.device_of(q):  # Triton launches on the current device.
        _launch(quantise(q, k, v, constants, scale), lists, out, causal)
    return out


def _launch(operands: Quantised, lists: BlockLists, out: Tensor, causal: bool) -> None:
    batch, heads, length, dim = out.shape
    count_q, kv_heads = block_count(length, BLOCK), operands.k.shape[1]
    groups, planes = heads // kv_heads, batch * heads
    forward_kernel[(min(hopper._processors(out.device), planes * count_q),)](
        _descriptor(operands.q, BLOCK // 2, dim),
        _descriptor(operands.k, BLOCK, dim),
        _descriptor(operands.v, dim, BLOCK // 2),
        operands.q_scale,
        operands.k_scale.view(torch.int32),
        operands.v_scale.view(torch.int32),
        out,
        lists.counts,
        lists.indices,
        torch.zeros(1, dtype=torch.int32, device=out.device),
        length,
        heads,
        groups,
        planes,
        hopper.section(length, dim, groups, operands.k.element_size()),
        count_q,
        lists.indices.shape[-1],
        *out.stride()[:3],
        HEAD_DIM=dim,
        STAGES=STAGES,
        CAUSAL=causal,
        CONSUMER_REGISTERS=hopper.CONSUMER_REGISTERS,
        PRODUCER_REGISTERS=hopper.PRODUCER_REGISTERS,
        num_warps=4,
    )
