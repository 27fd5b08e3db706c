"""The operands of one attention call in canonical form."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape, Grid
from afbs_compile.kernels.masks.base import Mask

LARGEST_SCORE = torch.finfo(torch.float32).max / 4
"""Up to here an fp32 score is taken for what it is, with room for the sums on its way and the change to log2 units."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(1, 513)

SMALLEST_HEAD_DIM = 16
"""Kernels multiply tiles of at least so many columns; operands of narrower heads are padded with zeros."""


@dataclass(frozen=True, eq=False)
class Operands:
    """``softmax(cap(scale * Q K^T) + bias) V`` over the keys that a row sees.

        row r of batch b sees key c   <=>   mask  and  valid(b, c)  and  attn_mask(b, h, r, c)
        cap(s) = softcap * tanh(s / softcap), s itself where softcap is 0

    A row that sees nothing is 0.

    Attributes:
        q: ``[B, H, q_len, D]``; k: ``[B, H_kv, k_len, D]``; v: ``[B, H_kv, k_len, D_v]``; of one dtype, any strides;
            query head ``h`` reads key head ``h // (H // H_kv)``.
        mask: what a row sees, by formula.
        scale: softmax scale.
        valid: bool ``[B, k_len]``, the keys that exist for any row; ``None`` for all.
        attn_mask: ``[B or 1, H or 1, q_len or 1, k_len]``; bool: true is seen; floating: added to the scores, -inf
            hides, and so does the dtype's lowest number in rows that have anything larger; ``None`` for nothing.
        softcap: 0 for none.
        sinks: floating ``[H]``, one more logit in the denominator of each row; ``None`` for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    valid: Tensor | None = None
    attn_mask: Tensor | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None

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
        """(row, key) pairs that a head of one batch element computes, by the formula."""
        return self.mask.work(self.q_len, self.k_len)

    @property
    def offset(self) -> int:
        """Position of row 0 among the keys."""
        return self.mask.offset(self.q_len, self.k_len)

    @property
    def by_formula(self) -> bool:
        """Whether the mask is all that hides keys."""
        return self.valid is None and self.attn_mask is None

    @property
    def has_bias(self) -> bool:
        """Whether numbers are added to scores."""
        return self.attn_mask is not None and self.attn_mask.dtype != torch.bool

    @property
    def is_plain(self) -> bool:
        """Whether a weight is the exponential of a score and nothing else: no bias, no cap, no sinks."""
        return not self.has_bias and self.softcap == 0.0 and self.sinks is None

    @functools.cached_property
    def derived(self) -> dict[Any, Any]:
        """What others found out about these operands, kept for as long as they are."""
        return {}

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
        mask, sinks = self.attn_mask, self.sinks
        return replace(
            self,
            q=taken(self.q, heads),
            k=taken(self.k, keys),
            v=taken(self.v, keys),
            attn_mask=mask if mask is None or mask.shape[1] == 1 else taken(mask, heads),
            sinks=None if sinks is None else taken(sinks[None], heads)[0],
        )

    def grouped(self, first: int, last: int) -> Operands:
        """Views of the query heads ``first..last``, whole groups."""
        keys = slice(first // self.groups, last // self.groups)
        mask, sinks = self.attn_mask, self.sinks
        return replace(
            self,
            q=self.q[:, first:last],
            k=self.k[:, keys],
            v=self.v[:, keys],
            attn_mask=mask if mask is None or mask.shape[1] == 1 else mask[:, first:last],
            sinks=None if sinks is None else sinks[first:last],
        )

    def element(self, index: int) -> Operands:
        """One batch element, batch size 1."""
        one, mask = slice(index, index + 1), self.attn_mask
        return replace(
            self,
            q=self.q[one],
            k=self.k[one],
            v=self.v[one],
            valid=None if self.valid is None else self.valid[one],
            attn_mask=mask if mask is None or mask.shape[0] == 1 else mask[one],
        )

    def first_rows(self, rows: int) -> Operands:
        """The first rows, and as many keys as keep them in their place among the keys.

        Where the mask is ``local`` these are all keys that the rows see: the rows are an input of their own.
        """
        keys = rows + self.offset if self.mask.local else max(1, self.k_len * rows // self.q_len)
        keys = min(keys, self.k_len)
        mask = self.attn_mask
        return replace(
            self,
            q=self.q[:, :, :rows],
            k=self.k[:, :, :keys],
            v=self.v[:, :, :keys],
            valid=None if self.valid is None else self.valid[:, :keys],
            attn_mask=None if mask is None else mask[:, :, :rows, :keys],
        )

    @functools.cached_property
    def padded(self) -> Operands:
        """The same attention, of which some columns of the output are more, with a head_dim that kernels have.

        Zeros are appended to q, k and v: they add nothing to a score, and the output's further columns are 0.
        """
        dim, value_dim = self.q.shape[3], self.v.shape[3]
        wide = max(dim, value_dim, SMALLEST_HEAD_DIM)
        if dim == value_dim == wide:
            return self
        q, k, v = (F.pad(x, (0, wide - x.shape[3])) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)

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


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """``[B, H, q_len, D_v]`` that lies in memory as ``[B, q_len, H, D_v]``: what follows it copies nothing."""
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)


def check_operands(operands: Operands) -> None:
    """Refuse operands that no engine takes; only shapes, dtypes and devices are read.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """
    q, k, v = operands.q, operands.k, operands.v
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has {x.dim()} dimensions; accepted: 4, [batch, heads, length, head_dim]")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; accepted: {', '.join(map(str, DTYPES))}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; accepted: the same")
        if not HEAD_DIMS[0] <= x.shape[3] <= HEAD_DIMS[-1]:
            raise ValueError(f"{name} has head_dim {x.shape[3]}; accepted: {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}; accepted: a multiple of k's heads")
    if not math.isfinite(operands.softcap) or operands.softcap < 0:
        raise ValueError(f"softcap is {operands.softcap}; accepted: 0 for none, or a number above it")
    batch, _, length, dim = q.shape
    k_len = k.shape[2]
    _check_sizes("k", k, (batch, kv_heads, k_len, dim))
    _check_sizes("v", v, (batch, kv_heads, k_len, v.shape[3]))
    if operands.valid is not None:
        _check_extra("valid", operands.valid, (torch.bool,), q)
        _check_sizes("valid", operands.valid, (batch, k_len))
    if operands.sinks is not None:
        _check_extra("sinks", operands.sinks, (torch.float64, *DTYPES), q)
        _check_sizes("sinks", operands.sinks, (heads,))
    if operands.attn_mask is not None:
        _check_extra("attn_mask", operands.attn_mask, (torch.bool, torch.float64, *DTYPES), q)
        _check_sizes("attn_mask", operands.attn_mask, (batch, heads, length, k_len), broadcast=True)


def _check_extra(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], q: Tensor) -> None:
    if x.dtype not in dtypes or x.device != q.device:
        accepted = ", ".join(map(str, dtypes))
        raise ValueError(f"{name} is {x.dtype} on {x.device}; accepted: {accepted}, on {q.device} as q is")


def _check_sizes(name: str, x: Tensor, wanted: Sequence[Any], *, broadcast: bool = False) -> None:
    """Sizes may be symbolic; where ``broadcast``, all but the last may be 1."""
    if x.dim() != len(wanted):
        raise ValueError(f"{name} has {x.dim()} dimensions; accepted: {len(wanted)}")
    if {type(size) for size in (*x.shape, *wanted)} == {int} and tuple(x.shape) == tuple(wanted):
        return  # the checks below also take symbolic sizes, and time
    for axis, (came, size) in enumerate(zip(x.shape, wanted, strict=True)):
        if broadcast and axis < len(wanted) - 1 and isinstance(came, int) and came == 1:
            continue
        torch._check_value(
            came == size,
            lambda came=came, size=size, axis=axis: (
                f"{name} has size {came} in dimension {axis}; accepted: {size}, as the other operands have"
            ),
        )
