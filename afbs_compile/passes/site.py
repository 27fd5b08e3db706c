"""One attention call of a graph, in canonical form: what ``find`` hands to every later step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.effects import value_of


@dataclass(frozen=True)
class Refusal:
    """An attention call that stays dense.

    Attributes:
        name: where it stands in the model, as in :class:`AttentionSite`.
        reason: one sentence for the user; its first words are the kind of refusal.
        node: the call or, where an operator hides it, that operator.
    """

    name: str
    reason: str
    node: fx.Node = field(compare=False)


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """A scaled-dot-product-attention call that may be rewritten.

    In canonical form the call is that of :class:`afbs_compile.kernels.operands.Operands`; :meth:`canonical` brings a
    tensor of the graph into that form.

    Attributes:
        name: path of the module that makes the call, e.g. ``model.layers.3.self_attn``; unique in the graph.
        node: the call itself.
        q, k, v: nodes of its operands, in the graph's own rank; k and v before any repetition of their heads.
        mask: what a row sees by formula; valid, attn_mask: nodes of what else hides keys, ``None`` for nothing.
        scale: softmax scale; a node where the graph computes it.
        softcap: 0 for none; sinks: node of one more logit per head, ``None`` for none.
        batch, q_len, k_len: sizes, symbolic where the graph is dynamic.
        heads, kv_heads, head_dim, value_dim: sizes; the last one is v's.
        rank: number of dimensions of q, k and v in the graph.
        dtype: that the call computes in, which under autocast need not be that of q, k and v; device: of q, k and v.
    """

    name: str
    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: Mask
    valid: fx.Node | None
    attn_mask: fx.Node | None
    scale: float | fx.Node
    softcap: float
    sinks: fx.Node | None
    batch: int | torch.SymInt
    q_len: int | torch.SymInt
    k_len: int | torch.SymInt
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rank: int
    dtype: torch.dtype
    device: torch.device

    def shapes(self) -> OperandShapes:
        """Sizes and strides of this call's operands; the graph and its fake values may go."""
        q, k, v = (_layout(value_of(node))._replace(dtype=self.dtype) for node in (self.q, self.k, self.v))
        valid, attn_mask, sinks = (
            None if node is None else _layout(value_of(node)) for node in (self.valid, self.attn_mask, self.sinks)
        )
        return OperandShapes(q, k, v, self.rank, self.mask, valid, attn_mask, self.softcap, sinks)

    @property
    def extras(self) -> tuple[fx.Node, ...]:
        """Nodes of what the call reads beside q, k and v."""
        found = (self.valid, self.attn_mask, self.sinks, self.scale)
        return tuple(node for node in found if isinstance(node, fx.Node))

    def operands(self, value: Callable[[fx.Node], Tensor]) -> Operands:
        """The call's operands in canonical form.

        Args:
            value: of a node of the graph.
        """
        q, k, v = (canonical(value(node).to(self.dtype), self.rank) for node in (self.q, self.k, self.v))
        return Operands(
            q,
            k,
            v,
            self.mask,
            float(value(self.scale)) if isinstance(self.scale, fx.Node) else self.scale,
            None if self.valid is None else as_valid(value(self.valid)).expand(q.shape[0], -1),
            None if self.attn_mask is None else as_attn_mask(value(self.attn_mask), self.rank, k.shape[2], self.dtype),
            self.softcap,
            None if self.sinks is None else value(self.sinks),
        )


class Layout(NamedTuple):
    """How one tensor lies in memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    def fake(self) -> Tensor:
        """A tensor without data that lies so."""
        end = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) + 1
        with FakeTensorMode():
            flat = torch.empty(end, dtype=self.dtype, device=self.device)
            return flat.as_strided(self.size, self.stride, self.offset)


class OperandShapes(NamedTuple):
    """Operands without data: what decides which kernel computes a call, for as long as somebody may ask."""

    q: Layout
    k: Layout
    v: Layout
    rank: int
    mask: Mask
    valid: Layout | None = None
    attn_mask: Layout | None = None
    softcap: float = 0.0
    sinks: Layout | None = None

    def operands(self) -> Operands:
        """Fake tensors in canonical form; their scale says nothing."""
        q, k, v = (canonical(layout.fake(), self.rank) for layout in (self.q, self.k, self.v))
        valid, attn_mask, sinks = (
            None if layout is None else layout.fake() for layout in (self.valid, self.attn_mask, self.sinks)
        )
        if valid is not None:
            valid = as_valid(valid).expand(q.shape[0], -1)
        if attn_mask is not None:
            attn_mask = as_attn_mask(attn_mask, self.rank, k.shape[2], q.dtype)
        return Operands(q, k, v, self.mask, 1.0, valid, attn_mask, self.softcap, sinks)


def as_valid(tensor: Tensor) -> Tensor:
    """``[batch or 1, keys]`` of a tensor that has one row for all queries and heads."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]


def as_attn_mask(tensor: Tensor, rank: int, k_len: int, dtype: torch.dtype) -> Tensor:
    """A mask as ``[batch or 1, heads or 1, q_len or 1, k_len]``, as :func:`canonical` brings q into this form."""
    if tensor.dtype != torch.bool:
        tensor = tensor.to(dtype)
    missing = rank - tensor.dim()
    tensor = tensor[(None,) * missing] if missing > 0 else tensor
    if rank < 4:
        tensor = tensor.flatten(0, -3)[:, None] if tensor.dim() > 2 else tensor[None, None]
    elif rank > 4:
        tensor = tensor.flatten(0, rank - 4)
    return tensor if tensor.shape[3] == k_len else tensor.expand(-1, -1, -1, k_len)


def canonical(tensor: Tensor, rank: int) -> Tensor:
    """View a q, k or v of the graph as ``[batch, heads, length, head_dim]``.

    A missing head dimension becomes one head; dimensions before the head dimension are flattened into the batch.
    """
    if rank < 4:
        return tensor.reshape(-1, 1, *tensor.shape[-2:])
    return tensor.reshape(-1, *tensor.shape[-3:])


def _layout(value: Tensor) -> Layout:
    """Of a recorded tensor, whose sizes may be symbolic; reading their hints adds no guard."""
    size, stride, (offset,) = (
        tuple(number.node.hint if isinstance(number, torch.SymInt) else number for number in numbers)
        for numbers in (value.shape, value.stride(), (value.storage_offset(),))
    )
    return Layout(size, stride, offset, value.dtype, value.device)
