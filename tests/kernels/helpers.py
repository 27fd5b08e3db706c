"""Inputs, masks, engines and the float64 truth that the kernel tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.attend.flex import engine as flex
from afbs_compile.kernels.blocks import BlockLists, BlockShape, Grid, lists_of
from afbs_compile.kernels.call import LAMBDA_OFF, THETA_OFF, SparseCall
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.kernels.policies.registry import UNNAMED
from afbs_compile.kernels.sight import sight_of
from afbs_compile.kernels.spec.attention import masked_attention
from afbs_compile.kernels.spec.selection import near_blocks

NO_SKIP = LAMBDA_OFF
OFF = THETA_OFF
MASKS = ("causal", "full")


@dataclass(frozen=True)
class Shape:
    """One attention call; ``mask`` is a mask's text, ``blocks`` the numbers of a block shape."""

    length: int
    head_dim: int = 64
    heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    dtype: torch.dtype = torch.float32
    mask: str = "causal"
    blocks: tuple[int, ...] = (64, 64)
    layout: str = "bhnd"
    scale: float | None = None

    def __str__(self) -> str:
        """Readable test id."""
        return (
            f"{self.batch}x{self.heads}of{self.kv_heads}x{self.length}x{self.head_dim}-{str(self.dtype)[6:]}-"
            f"{self.mask}-{str(self.block_shape).replace(' ', '_')}-{self.layout}"
        )

    @property
    def block_shape(self) -> BlockShape:
        """Rows per block, as the package has them."""
        return BlockShape(*self.blocks)

    @property
    def grid(self) -> Grid:
        """The call's blocks."""
        return Grid(self.length, self.length, self.block_shape)

    @property
    def counts(self) -> tuple[int, int]:
        """Query and key blocks."""
        return self.grid.count_q, self.grid.count_k

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> Operands:
        """The call's operands; ``q``, ``k`` and ``v`` themselves, not copies."""
        return Operands(q, k, v, mask_of(self.mask), self.head_dim**-0.5 if self.scale is None else self.scale)


def shape_id(value: object) -> str | None:
    """``ids=`` of a parametrisation over shapes."""
    return str(value) if isinstance(value, Shape) else None


def blocks_id(blocks: tuple[int, ...]) -> str:
    """``ids=`` of a parametrisation over block shapes."""
    return str(BlockShape(*blocks))


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x [B, H, N, D]`` in another memory layout; gaps hold NaN."""
    if layout == "bhnd":
        return x.contiguous()
    if layout == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":  # rows, heads and batches all have NaN between them
        wide = x.new_full([size + 3 for size in x.shape], torch.nan)[1:-2, 1:-2, 1:-2, 1:-2]
        return wide.copy_(x)
    if layout == "strided":  # every second column is NaN
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., ::2]
        return wide.copy_(x)
    raise ValueError(layout)


def inputs(shape: Shape, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v of variance 1 that drift along the sequence, so that block probabilities differ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(shape.batch, heads, length, shape.head_dim, generator=generator)

    def draw(heads: int) -> Tensor:
        drift = normal(heads, -(-shape.length // 50)).repeat_interleave(50, 2)[:, :, : shape.length]
        x = 0.55 * normal(heads, shape.length) + 0.835 * drift
        return lay_out(x.to(device, shape.dtype), shape.layout)

    return draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)


def operands_of(shape: Shape, device: str = "cpu", seed: int = 0) -> Operands:
    """The operands of :func:`inputs`."""
    return shape.of(*inputs(shape, device, seed))


def in_double(operands: Operands) -> Operands:
    """The same operands in float64."""
    return replace(operands, q=operands.q.double(), k=operands.k.double(), v=operands.v.double())


def on(operands: Operands, device: str) -> Operands:
    """The same operands on another device."""
    return replace(operands, q=operands.q.to(device), k=operands.k.to(device), v=operands.v.to(device))


def sparse_call(
    shape: Shape,
    tau: float | Sequence[float],
    theta: float | Sequence[float] = THETA_OFF,
    lam: float | Sequence[float] = LAMBDA_OFF,
    policy: str | Sequence[str] = UNNAMED,
    **other: Any,
) -> SparseCall:
    """A call with the blocks of ``shape``; one number or name stands for all heads."""
    numbers = (
        tuple(values) if isinstance(values, Sequence) else (values,) * shape.heads for values in (tau, theta, lam)
    )
    names = (policy,) * shape.heads if isinstance(policy, str) else tuple(policy)
    return SparseCall(*numbers, names, shape.block_shape, **other)


def every_block(shape: Shape) -> SparseCall:
    """A call that keeps and computes everything."""
    return sparse_call(shape, 1.0)


def visible_blocks(shape: Shape, device: str | torch.device = "cpu") -> Tensor:
    """``[n_q, n_k]``: what some row of the query block sees something of."""
    return mask_of(shape.mask).visibility(shape.grid, torch.device(device)).visible


def diagonal_blocks(shape: Shape, device: str | torch.device = "cpu") -> Tensor:
    """``[n_q, n_k]``: what holds positions of the query block."""
    empty = torch.empty(1, 1, shape.length, 1, device=device)
    operands = shape.of(empty, empty, empty)
    return near_blocks(operands, shape.block_shape, sight_of(operands, shape.block_shape))[0, 0]


def all_blocks(shape: Shape, device: str = "cpu") -> Tensor:
    """Every visible block."""
    return visible_blocks(shape, device).expand(shape.batch, shape.heads, -1, -1)


def some_blocks(shape: Shape, device: str = "cpu", seed: int = 1, share: float = 0.4) -> Tensor:
    """A random part of the visible blocks, the diagonal always, alike in heads that share a selection."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(shape.batch, shape.heads, *shape.counts, generator=generator) < share
    live = (chosen | diagonal_blocks(shape)).to(device) & all_blocks(shape, device)
    together = shape.block_shape.heads
    return live[:, ::together].repeat_interleave(together, 1)


def listed(live: Tensor, operands: Operands, blocks: tuple[int, ...]) -> BlockLists:
    """Live blocks as engines take them."""
    return lists_of(live, operands.mask.visibility(operands.grid(BlockShape(*blocks)), live.device).whole)


def dense(operands: Operands) -> Tensor:
    """SDPA in the dtype of the operands."""
    q, k, v = operands.q, operands.k, operands.v
    mask = operands.mask.sdpa_arguments(operands.q_len, operands.k_len, operands.device)
    return F.scaled_dot_product_attention(q, k, v, scale=operands.scale, enable_gqa=True, **mask)


def exact(operands: Operands, live: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """The specification in float64."""
    return masked_attention(in_double(operands), live, [LAMBDA_OFF] * operands.heads, BlockShape(*blocks))


def error(out: Tensor, truth: Tensor) -> float:
    """Largest difference; infinite if anything is NaN."""
    if out.numel() == 0:
        return 0.0
    return float((out.double() - truth.double()).abs().nan_to_num(torch.inf).max())


def masked_dense(operands: Operands, live: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """SDPA in the dtype of the operands over the tokens that ``live`` and the mask leave."""
    q, k, v = operands.q, operands.k, operands.v
    allowed = live.repeat_interleave(blocks[0], 2).repeat_interleave(blocks[1], 3)
    allowed = allowed[..., : operands.q_len, : operands.k_len]
    allowed = allowed & operands.mask.matrix(operands.q_len, operands.k_len, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=operands.scale, enable_gqa=True)


def tolerance(operands: Operands, live: Tensor | None = None, blocks: tuple[int, ...] = (64, 64)) -> float:
    """The contract: fp32 1e-5; half precisions twice what SDPA itself is off on these operands (and blocks)."""
    if operands.q.dtype == torch.float32:
        return 1e-5
    if live is None:
        return 2 * error(dense(operands), dense(in_double(operands)))
    return 2 * error(masked_dense(operands, live, blocks), masked_dense(in_double(operands), live, blocks))


@dataclass(frozen=True)
class Attention:
    """One implementation of attention over given blocks: ``attend(operands, live, call)``."""

    name: str
    device: str
    attend: Callable[[Operands, Tensor, SparseCall], Tensor]

    def __str__(self) -> str:
        """Readable test id."""
        return self.name


def _reference(operands: Operands, live: Tensor, call: SparseCall) -> Tensor:
    return masked_attention(operands, live, call.lam, call.shape)


def _flex(operands: Operands, live: Tensor, call: SparseCall) -> Tensor:
    out = empty_output(operands.q, operands.v)
    flex.Flex().attend(operands, call, listed(live, operands, call.shape), out)
    return out


def _triton(operands: Operands, live: Tensor, call: SparseCall) -> Tensor:
    from afbs_compile.kernels.attend.portable import launch

    out = empty_output(operands.q, operands.v)
    launch.attend(operands, call, listed(live, operands, call.shape), out)
    return out


TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = Attention("reference", "cpu", _reference)
FLEX = Attention("flex", "cpu", _flex)
TRITON = Attention("triton", TRITON_DEVICE, _triton)
ATTENTIONS = (REFERENCE, FLEX, TRITON)
