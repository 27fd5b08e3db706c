"""``afbs::shared_attention``: the operator of graphs that several blocks of a model share.

What is constant in a graph of one block differs from block to block here. The operator names a call of the graph; who
runs the graph has said for which block (:func:`attending`), and computes the call or leaves it dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from afbs_compile.kernels.attend.machine import without_autocast
from afbs_compile.kernels.op import densely, operands_of, refuse_gradient
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.kernels.sight import without_idle_parts

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, int call, str mask, float? scale=None, Tensor? valid=None, "
    "Tensor? attn_mask=None, float softcap=0.0, Tensor? sinks=None) -> Tensor"
)

Attend = Callable[[int, Operands], Tensor | None]
"""Computes a call of the graph, given its number and operands: ``[B, H, q_len, D_v]``, or ``None``: dense."""

_attend: ContextVar[Attend | None] = ContextVar("afbs_attend", default=None)

# What it computes depends on more than its operands: no recording of its kernels holds for another block.
TAGS = (torch.Tag.cudagraph_unsafe,)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Have the calls of graphs that run inside computed so."""
    before = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(before)


@torch.library.custom_op("afbs::shared_attention", mutates_args=(), schema=SCHEMA, tags=TAGS)
def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: int,
    mask: str,
    scale: float | None = None,
    valid: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with the constants of the block that is running; dense where nobody said which one that is.

    Args:
        q, k, v, mask, scale, valid, attn_mask, softcap, sinks: as of
            :func:`afbs_compile.kernels.op.sparse_attention`.
        call: number of the call in its graph.

    Returns:
        ``[B, H, q_len, D_v]`` in the dtype of ``q``; in memory ``[B, q_len, H, D_v]``.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
        RuntimeError: a gradient is asked for.
    """
    given = locals()
    operands = operands_of(q, k, v, given)
    if q.numel() == 0 or k.numel() == 0:
        return empty_output(q, v).zero_()
    operands = without_idle_parts(operands)
    attend = _attend.get()
    with without_autocast(operands.device):
        out = None if attend is None else attend(call, operands)
    return densely(operands) if out is None else out


@shared_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: int,
    mask: str,
    scale: float | None = None,
    valid: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Shape, dtype and strides of the result; the same checks as the real thing."""
    operands_of(q, k, v, locals())
    return empty_output(q, v)


shared_attention.register_autograd(refuse_gradient, setup_context=refuse_gradient)
