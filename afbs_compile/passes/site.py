"""One attention call of a graph, in canonical form: what ``find`` hands to every later step."""

from __future__ import annotations

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
        mask: what a row sees.
        scale: softmax scale; a node where the graph computes it.
        batch, q_len, k_len: sizes, symbolic where the graph is dynamic.
        heads, kv_heads, head_dim: sizes.
        rank: number of dimensions of q, k and v in the graph.
        dtype, device: of q, k and v.
    """

    name: str
    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: Mask
    scale: float | fx.Node
    batch: int | torch.SymInt
    q_len: int | torch.SymInt
    k_len: int | torch.SymInt
    heads: int
    kv_heads: int
    head_dim: int
    rank: int
    dtype: torch.dtype
    device: torch.device

    def shapes(self) -> OperandShapes:
        """Sizes and strides of this call's operands; the graph and its fake values may go."""
        q, k, v = (_layout(value_of(node)) for node in (self.q, self.k, self.v))
        return OperandShapes(q, k, v, self.rank, self.mask)

    def canonical(self, tensor: Tensor) -> Tensor:
        """View a q, k or v of the graph as ``[batch, heads, length, head_dim]``.

        A missing head dimension becomes one head; dimensions before the head dimension are flattened into the batch.
        """
        return _canonical(tensor, self.rank)


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

    def operands(self) -> Operands:
        """Fake tensors in canonical form; their scale says nothing."""
        q, k, v = (_canonical(layout.fake(), self.rank) for layout in self[:3])
        return Operands(q, k, v, self.mask, scale=1.0)


def _canonical(tensor: Tensor, rank: int) -> Tensor:
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
