# A kernel's arguments have Triton's own types:
# mypy: disable-error-code="no-untyped-def"
"""Block-sparse attention forward for Hopper, in Gluon: three warp groups that run at the same time.

    producer (one warp)      TMA: the next tile's queries, then keys and values along its list, into rings
    consumers 0 and 1        64 rows each: wgmma and softmax

A tile is one block of 128 query rows of one head, or a block of 64 rows of each of two heads that share a selection,
one to a consumer: small blocks, for the price that tensor cores have for large ones. Programs stay on their
multiprocessor and draw tiles from a counter.
A step is 128 keys: one block, or two blocks of 64 that need not be neighbours.

A consumer issues the product of step s with K and, at once, that of step s - 1 with V, so that its softmax runs while
the tensor cores still work; across tiles, the first product of the next one runs while the last one is stored. A list
is walked from its end, the partial blocks first: how many they are says which steps need a mask.

What bounds a consumer is the chain of its own instructions, so nothing stands between the scores and the next product
that need not: see :mod:`afbs_compile.kernels.attend.hopper.softmax`. One arrival a step frees its keys and the values
of the step before.

Every wait is on an mbarrier's phase, a bit: a ring's reader waits for its own phase, and its writer for the opposite
one, which a fresh barrier has behind it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from afbs_compile.kernels.attend.hopper.common import CHUNK, NOTE, ROWS, STEP, ring
from afbs_compile.kernels.attend.hopper.consumer import consumer
from afbs_compile.kernels.attend.hopper.producer import producer


# One compilation for all sizes; strides stay apart, for stores are wide only where they are multiples of 16. What only
# some masks need comes last: k_len and upper are read together where they lie so that they can be.
@gluon.jit(
    do_not_specialize=[
        "q_len", "k_len", "upper", "heads", "groups", "planes", "section", "count_q", "count_k", "stride_valid", "width"
    ]
)  # fmt: skip
def forward_kernel(
    query_desc, key_desc, value_desc, out, whole, partial, indices, counter, scale, steep, stride_out_batch,
    stride_out_head, stride_out_row, q_len, k_len, upper, heads, groups, planes, section, count_q, count_k, valid,
    stride_valid, width, FORM: gl.constexpr, HEAD_DIM: gl.constexpr, HEADS: gl.constexpr, BLOCK_K: gl.constexpr,
    MORE_MASKS: gl.constexpr, VALID: gl.constexpr, CLEAN: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Tiles drawn from ``counter``, which starts at zero, until there are none."""
    DTYPE: gl.constexpr = query_desc.dtype
    PIECES: gl.constexpr = STAGES * (STEP // BLOCK_K) * (HEAD_DIM // CHUNK)
    query_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, ROWS, HEAD_DIM], query_desc.layout)
    key_smem = gl.allocate_shared_memory(DTYPE, [PIECES, 1, 1, BLOCK_K, CHUNK], key_desc.layout)
    value_smem = gl.allocate_shared_memory(DTYPE, [PIECES, 1, 1, BLOCK_K, CHUNK], value_desc.layout)
    numbers = gl.allocate_shared_memory(gl.int32, [NOTE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    notes = (numbers, ring(1, 1))
    rings = (
        (query_smem, ring(1, 1), ring(1, 2)),
        (key_smem, ring(STAGES, 1)),
        (value_smem, ring(STAGES, 1)),
        ring(STAGES, 2),
    )
    sizes = (q_len, k_len, upper, width, heads, groups, planes, section, count_q, count_k)
    strides = (stride_out_batch, stride_out_head, stride_out_row)
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    out, strides, indices, valid, stride_valid, rings, notes, scale, steep, sizes,
                    0, DTYPE, HEAD_DIM, HEADS, BLOCK_K, STAGES, FORM, MORE_MASKS, VALID, CLEAN,
                ),
            ),
            (
                consumer,
                (
                    out, strides, indices, valid, stride_valid, rings, notes, scale, steep, sizes,
                    1, DTYPE, HEAD_DIM, HEADS, BLOCK_K, STAGES, FORM, MORE_MASKS, VALID, CLEAN,
                ),
            ),
            (
                producer,
                (
                    (query_desc, key_desc, value_desc), (whole, partial, indices), counter, rings, notes, sizes,
                    HEAD_DIM, HEADS, BLOCK_K, STAGES, FORM > 0, CLEAN,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
