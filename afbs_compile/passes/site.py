"""One attention call of a graph, in canonical form: what ``find`` hands to every later step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

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

    In canonical form the call is ``softmax(scale * Q K^T + causal mask) V`` with ``Q [batch, heads, length,
    head_dim]`` and ``K, V [batch, kv_heads, length, head_dim]``, query head ``h`` reading key head
    ``h // (heads // kv_heads)``. :meth:`canonical` brings a tensor of the graph into that form.

    Attributes:
        name: path of the module that makes the call, e.g. ``model.layers.3.self_attn``; unique in the graph.
        node: the call itself.
        q, k, v: nodes of its operands, in the graph's own rank; k and v before any repetition of their heads.
        causal: whether row r attends keys 0..r only.
        scale: softmax scale; a node where the graph computes it.
        batch, length: sizes, symbolic where the graph is dynamic.
        heads, kv_heads, head_dim: sizes.
        rank: number of dimensions of q, k and v in the graph.
        dtype, device: of q, k and v.
    """

    name: str
    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    causal: bool
    scale: float | fx.Node
    batch: int | torch.SymInt
    length: int | torch.SymInt
    heads: int
    kv_heads: int
    head_dim: int
    rank: int
    dtype: torch.dtype
    device: torch.device

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V in canonical form without data: fake tensors with the sizes and strides of this call."""
        q, k, v = (self.canonical(_as_called(value_of(node))) for node in (self.q, self.k, self.v))
        return q, k, v

    def canonical(self, tensor: Tensor) -> Tensor:
        """View a q, k or v of the graph as ``[batch, heads, length, head_dim]``.

        A missing head dimension becomes one head; dimensions before the head dimension are flattened into the batch.
        """
        if self.rank < 4:
            return tensor.reshape(-1, 1, *tensor.shape[-2:])
        return tensor.reshape(-1, *tensor.shape[-3:])


def _as_called(value: Tensor) -> Tensor:
    """A fake tensor like a recorded one whose sizes may be symbolic; reading their hints adds no guard."""
    size, stride, (offset,) = (
        [number.node.hint if isinstance(number, torch.SymInt) else number for number in numbers]
        for numbers in (value.shape, value.stride(), (value.storage_offset(),))
    )
    end = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) + 1
    with FakeTensorMode():
        return torch.empty(end, dtype=value.dtype, device=value.device).as_strided(size, stride, offset)
