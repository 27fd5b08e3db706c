# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Block-sparse attention forward on FP8 operands: :mod:`afbs_compile.kernels.attend.hopper.kernel` but for this.

Q and K are E4M3, with a power of two beside every row of Q and every block of K: scores times both are log2 units.
V is E4M3, transposed, for FP8 products take both operands along their sum; a block has a power of two as well.
P becomes E4M3 in registers. A step is one block of 128 keys, and its product with V is added up in fp32.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from afbs_compile.kernels.attend.hopper.common import NOTE, QUERY_STAGES, STEP, ring
from afbs_compile.kernels.attend.hopper_fp8.consumer import consumer
from afbs_compile.kernels.attend.hopper_fp8.producer import producer


# One compilation for all sizes; strides stay apart, for stores are wide only where they are multiples of 16.
@gluon.jit(do_not_specialize=["q_len", "k_len", "upper", "heads", "groups", "planes", "section", "count_q", "count_k"])
def forward_kernel(
    query_desc, key_desc, value_desc, query_scales, key_scales, value_scales, out, whole, partial, indices, counter,
    stride_out_batch, stride_out_head, stride_out_row, q_len, k_len, upper, heads, groups, planes, section, count_q,
    count_k,
    BOUNDED: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Tiles drawn from ``counter``, which starts at zero, until there are none."""
    FP8: gl.constexpr = query_desc.dtype
    query_smem = gl.allocate_shared_memory(FP8, [2 * QUERY_STAGES, 1, 1, STEP // 2, HEAD_DIM], query_desc.layout)
    key_smem = gl.allocate_shared_memory(FP8, [STAGES, 1, 1, STEP, HEAD_DIM], key_desc.layout)
    value_smem = gl.allocate_shared_memory(FP8, [2 * STAGES, 1, 1, HEAD_DIM, STEP // 2], value_desc.layout)
    numbers = gl.allocate_shared_memory(gl.int32, [NOTE * QUERY_STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    step_scales = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    notes = (numbers, step_scales, ring(QUERY_STAGES, 1))
    rings = (
        (query_smem, ring(QUERY_STAGES, 1), ring(QUERY_STAGES, 2)),
        (key_smem, ring(STAGES, 1)),
        (value_smem, ring(STAGES, 1)),
        ring(STAGES, 2),
    )
    sizes = (q_len, k_len, upper, heads, groups, planes, section, count_q, count_k)
    strides = (stride_out_batch, stride_out_head, stride_out_row)
    gl.warp_specialize(
        [
            (consumer, (out, strides, query_scales, rings, notes, sizes, 0, HEAD_DIM, STAGES, BOUNDED)),
            (consumer, (out, strides, query_scales, rings, notes, sizes, 1, HEAD_DIM, STAGES, BOUNDED)),
            (
                producer,
                (
                    (query_desc, key_desc, value_desc), (whole, partial, indices), (key_scales, value_scales),
                    counter, rings, notes, sizes, HEAD_DIM, STAGES, BOUNDED,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
