"""Block-sparse attention forward on Hopper GPUs: when it may be used, and its launch.

The rule is :func:`afbs_compile.kernels.reference.masked_attention`; the kernel is in
:mod:`afbs_compile.kernels.hopper_kernel`. What :func:`refusal` refuses runs on
:mod:`afbs_compile.kernels.block_sparse`, which takes everything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from afbs_compile.kernels.hopper_common import CHUNK
from afbs_compile.kernels.hopper_kernel import forward_kernel
from afbs_compile.kernels.predict import BlockLists
from afbs_compile.kernels.reference import LAMBDA_OFF, LOG2_E, block_count

BLOCKS = ((128, 128), (128, 64))
"""Block shapes (queries, keys) that the kernel takes."""

HEAD_DIMS = (64, 128)

CACHED_BYTES = 24 << 20
"""Keys and values that are read at the same time: half of the 50 MB cache, for each half of it keeps its own copy."""

ALIGNMENT = 16
"""Bytes: the copy engine's tensors start, and step from row to row, at multiples of this."""

CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
"""Registers a thread of the second consumer and of the producer; the first consumer has what they leave of 504."""


@functools.cache  # the driver takes its time to answer
def _processors(device: torch.device) -> int:
    """Multiprocessors of a Hopper GPU; 0 on every other device."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _misplaced(x: Tensor) -> bool:
    """Whether the copy engine cannot walk ``x``."""
    unit = ALIGNMENT // x.element_size()
    steps = (stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1)
    return x.stride(3) != 1 or _address(x) % ALIGNMENT != 0 or any(s <= 0 or s % unit != 0 for s in steps)


def _address(x: Tensor) -> int:
    """Where ``x`` starts; a fake one in its own memory, which starts at a multiple of :data:`ALIGNMENT`."""
    return int(x.storage_offset()) * x.element_size() if isinstance(x, FakeTensor) else x.data_ptr()


def unsuited(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    lam: Sequence[float],
    blocks: tuple[int, int],
    accepted: Sequence[tuple[int, int]],
) -> str | None:
    """What of a call but its layout no Hopper kernel takes, or ``None``.

    Args:
        device, dtype, head_dim: of the operands; lam: one number per query head.
        blocks: rows per block of queries and of keys; accepted: those that the kernel takes.
    """
    if _processors(device) == 0:
        return f"{device.type} is no NVIDIA GPU of compute capability 9.x"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype is {dtype}; accepted: float16, bfloat16"
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}; accepted: {HEAD_DIMS}"
    if blocks not in accepted:
        shown = ", ".join(f"{rows}x{keys}" for rows, keys in accepted)
        return f"blocks are {blocks[0]}x{blocks[1]}; accepted: {shown}"
    if any(value > LAMBDA_OFF for value in lam):
        return f"lam is {list(lam)}; accepted: at most {LAMBDA_OFF} for every head, which skips nothing"
    return None


def refusal(q: Tensor, k: Tensor, v: Tensor, lam: Sequence[float], block_q: int, block_k: int) -> str | None:
    """Why :func:`attend` does not take a call, or ``None`` if it does.

    Args:
        q, k, v, lam, block_q, block_k: as in :func:`attend`.

    Returns:
        A sentence that names what came and what is accepted.
    """
    reason = unsuited(q.device, q.dtype, q.shape[3], lam, (block_q, block_k), BLOCKS)
    if reason is not None:
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        if _misplaced(x):
            return (
                f"{name} starts at address {_address(x):#x} with strides {x.stride()}; accepted: the last stride 1, "
                f"the others positive, all of them and the address multiples of {ALIGNMENT} bytes"
            )
    return None


def stages(head_dim: int) -> int:
    """Steps of keys and values that fit the 227 KB of shared memory beside a tile of queries; four are enough."""
    return 3 if head_dim == 128 else 4


def section(length: int, head_dim: int, groups: int, element_bytes: int) -> int:
    """Query heads whose keys and values fit :data:`CACHED_BYTES` together.

    They are worked on in turns. Heads that share keys and values stay together.
    """
    return groups * max(1, CACHED_BYTES // (2 * element_bytes * length * head_dim))


@functools.cache
def _copy_layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """How a copy of two-byte elements lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], gl.bfloat16)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy engine knows of ``x``: it fills rows past the end with zeros."""
    # A dimension of one element is never stepped along, and its stride may be anything.
    strides = [s if size > 1 else ALIGNMENT for size, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns], _copy_layout(rows, columns))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    lam: Sequence[float],
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = 128,
    block_k: int = 128,
    out: Tensor | None = None,
) -> Tensor:
    """Attention over the live blocks of ``lists``; nothing else of k and v is read.

    The contract of :func:`afbs_compile.kernels.block_sparse.attend`, for calls that :func:`refusal` does not refuse.
    Lists are walked from their ends, so sums are rounded in another order than there. No host synchronisation; may be
    captured into a CUDA graph; the same inputs give the same bits.

    Args:
        q: ``[B, H, N, D]`` fp16 or bf16, D 64 or 128; k, v: ``[B, H_kv, N, D]`` of the same dtype.
        lists: as :func:`afbs_compile.kernels.predict.predict_blocks` makes them: ascending, no block that is
            invisible under ``causal``, and at least one visible key for every row.
        lam: one number per query head, all of them :data:`~afbs_compile.kernels.reference.LAMBDA_OFF` or less.
        causal: whether row r attends keys 0..r only.
        scale: softmax scale; ``None`` means ``D ** -0.5``.
        block_q, block_k: rows per block, one of :data:`BLOCKS`.

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
    reason = refusal(q, k, v, lam, block_q, block_k)
    if reason is not None:
        raise ValueError(reason)
    scale = dim**-0.5 if scale is None else scale
    if scale <= 0:
        # The kernel takes the row maximum before it multiplies by the scale.
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    scale *= LOG2_E
    groups, planes, count_q = heads // k.shape[1], batch * heads, block_count(length, block_q)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device.
        forward_kernel[(min(_processors(q.device), planes * count_q),)](
            _descriptor(q, block_q // 2, dim),
            _descriptor(k, block_k, CHUNK.value),
            _descriptor(v, block_k, CHUNK.value),
            out,
            lists.counts,
            lists.indices,
            counter,
            scale,
            2.0 ** math.ceil(math.log2(scale)),
            length,
            heads,
            groups,
            planes,
            section(length, dim, groups, k.element_size()),
            count_q,
            lists.indices.shape[-1],
            *out.stride()[:3],
            HEAD_DIM=dim,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            STAGES=stages(dim),
            CAUSAL=causal,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS,
            PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4,
        )
    return out
