"""The operands of one attention call in canonical form, and dense attention on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape, Grid
from afbs_compile.kernels.masks.base import Mask

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(16, 257)


@dataclass(frozen=True, eq=False)
class Operands:
    """``softmax(scale * Q K^T + mask) V``.

    Attributes:
        q: ``[B, H, q_len, D]``; k, v: ``[B, H_kv, k_len, D]`` of the same dtype, any strides; query head ``h`` reads
            key head ``h // (H // H_kv)``.
        mask: what a row sees.
        scale: softmax scale.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float

    @property
    def heads(self) -> int:
        """H, query heads."""
        return self.q.shape[1]

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def q_len(self) -> int:
        """Query rows."""
        return self.q.shape[2]

    @property
    def k_len(self) -> int:
        """Keys."""
        return self.k.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the operands are."""
        return self.q.device

    @property
    def work(self) -> int:
        """(row, key) pairs that a head of one batch element computes."""
        return self.mask.work(self.q_len, self.k_len)

    def grid(self, shape: BlockShape) -> Grid:
        """The call's blocks."""
        return Grid(self.q_len, self.k_len, shape)

    def key_heads(self, heads: Sequence[int]) -> list[int]:
        """The key head that each of some query heads reads."""
        return [head // self.groups for head in heads]

    def taken(self, heads: Sequence[int]) -> Operands:
        """Some query heads: as they are if those are all, else a copy with a key head for each."""
        if list(heads) == list(range(self.heads)):
            return self
        keys = self.key_heads(heads)
        return replace(self, q=taken(self.q, heads), k=taken(self.k, keys), v=taken(self.v, keys))

    def grouped(self, first: int, last: int) -> Operands:
        """Views of the query heads ``first..last``, whole groups."""
        keys = slice(first // self.groups, last // self.groups)
        return replace(self, q=self.q[:, first:last], k=self.k[:, keys], v=self.v[:, keys])

    def element(self, index: int) -> Operands:
        """One batch element, batch size 1."""
        one = slice(index, index + 1)
        return replace(self, q=self.q[one], k=self.k[one], v=self.v[one])

    def first_tokens(self, length: int) -> Operands:
        """The first rows and keys; an input of its own where the mask is ``local``."""
        return replace(self, q=self.q[:, :, :length], k=self.k[:, :, :length], v=self.v[:, :, :length])

    def with_positive_scale(self) -> Operands:
        """The same attention with a scale above 0: kernels take a row's maximum before they multiply by it."""
        if self.scale > 0:
            return self
        if self.scale < 0:
            return replace(self, q=-self.q, scale=-self.scale)
        return replace(self, q=torch.zeros_like(self.q), scale=1.0)


def taken(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of ``[B, H, ...]``, by slices: an index would have to be copied to a GPU, and waited for."""
    return torch.cat([x[:, head : head + 1] for head in heads], 1)


def empty_output(q: Tensor) -> Tensor:
    """``[B, H, N, D]`` that lies in memory as ``[B, N, H, D]``: the transpose and reshape that follow copy nothing."""
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim).transpose(1, 2)


def dense_attention(operands: Operands) -> Tensor:
    """``F.scaled_dot_product_attention`` on the operands, ``[B, H, q_len, D]`` in their dtype."""
    # PyTorch's CPU kernels return NaN for is_causal=True with a scale of 0 or less.
    call = operands.with_positive_scale()
    mask = call.mask.sdpa_arguments(call.q_len, call.k_len, call.device)
    return F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale, enable_gqa=call.groups > 1, **mask)


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors that no engine takes; only shapes, dtypes and devices are read.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has {x.dim()} dimensions; accepted: 4, [batch, heads, length, head_dim]")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; accepted: {', '.join(map(str, DTYPES))}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; accepted: the same")
    (batch, heads, length, dim), kv_heads = q.shape, k.shape[1]
    if not HEAD_DIMS[0] <= dim <= HEAD_DIMS[-1]:
        raise ValueError(f"q has head_dim {dim}; accepted: {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}; accepted: a multiple of k's heads")
    if {type(batch), type(length), type(dim)} == {int} and (batch, kv_heads, length, dim) == k.shape == v.shape:
        return  # the checks below also take symbolic sizes, and time
    for name, x, shape in (("k", k, (batch, kv_heads, length, dim)), ("v", v, k.shape)):
        for axis, (came, wanted) in enumerate(zip(x.shape, shape, strict=True)):
            torch._check_value(
                came == wanted,
                lambda name=name, came=came, wanted=wanted, axis=axis: (
                    f"{name} has size {came} in dimension {axis}; accepted: {wanted}, as the other operands have "
                    "(query and key lengths must be equal)"
                ),
            )
