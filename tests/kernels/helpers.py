"""Inputs, masks, engines and the float64 truth that the kernel tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels import flex, predict, reference

NO_SKIP = reference.LAMBDA_OFF


@dataclass(frozen=True)
class Shape:
    """One attention call."""

    length: int
    head_dim: int = 64
    heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    dtype: torch.dtype = torch.float32
    causal: bool = True
    block_q: int = 64
    block_k: int = 64
    layout: str = "bhnd"
    scale: float | None = None

    def __str__(self) -> str:
        """Readable test id."""
        kind = "causal" if self.causal else "full"
        return (
            f"{self.batch}x{self.heads}of{self.kv_heads}x{self.length}x{self.head_dim}-{str(self.dtype)[6:]}-{kind}-"
            f"{self.block_q}x{self.block_k}-{self.layout}"
        )

    @property
    def call(self) -> dict[str, Any]:
        """The keyword arguments that predictor and engines share."""
        return {"causal": self.causal, "scale": self.scale, "block_q": self.block_q, "block_k": self.block_k}

    @property
    def counts(self) -> tuple[int, int]:
        """Query and key blocks."""
        return reference.block_count(self.length, self.block_q), reference.block_count(self.length, self.block_k)


def shape_id(value: object) -> str | None:
    """``ids=`` of a parametrisation over shapes."""
    return str(value) if isinstance(value, Shape) else None


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


def all_blocks(shape: Shape, device: str = "cpu") -> Tensor:
    """Every visible block."""
    visible = reference.visible_blocks(*shape.counts, shape.block_q, shape.block_k, shape.causal, torch.device(device))
    return visible.expand(shape.batch, shape.heads, -1, -1)


def some_blocks(shape: Shape, device: str = "cpu", seed: int = 1, share: float = 0.4) -> Tensor:
    """A random part of the visible blocks, the diagonal always."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(shape.batch, shape.heads, *shape.counts, generator=generator) < share
    diagonal = reference.diagonal_blocks(*shape.counts, shape.block_q, shape.block_k, torch.device("cpu"))
    return (chosen | diagonal).to(device) & all_blocks(shape, device)


def dense(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """SDPA in the dtype of the operands."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, scale=shape.scale, enable_gqa=True)


def exact(q: Tensor, k: Tensor, v: Tensor, live: Tensor, shape: Shape) -> Tensor:
    """The specification in float64."""
    lam = [NO_SKIP] * shape.heads
    return reference.masked_attention(q.double(), k.double(), v.double(), live, lam, **shape.call)


def error(out: Tensor, truth: Tensor) -> float:
    """Largest difference; infinite if anything is NaN."""
    if out.numel() == 0:
        return 0.0
    return float((out.double() - truth.double()).abs().nan_to_num(torch.inf).max())


def masked_dense(q: Tensor, k: Tensor, v: Tensor, live: Tensor, shape: Shape) -> Tensor:
    """SDPA in the dtype of the operands over the tokens that ``live`` and causality leave."""
    n = shape.length
    allowed = live.repeat_interleave(shape.block_q, 2).repeat_interleave(shape.block_k, 3)[..., :n, :n]
    if shape.causal:
        allowed = allowed.tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=shape.scale, enable_gqa=True)


def tolerance(q: Tensor, k: Tensor, v: Tensor, shape: Shape, live: Tensor | None = None) -> float:
    """The contract: fp32 1e-5; half precisions twice what SDPA itself is off on these operands (and blocks)."""
    if shape.dtype == torch.float32:
        return 1e-5
    double = [x.double() for x in (q, k, v)]
    if live is None:
        return 2 * error(dense(q, k, v, shape), dense(*double, shape))
    return 2 * error(masked_dense(q, k, v, live, shape), masked_dense(*double, live, shape))


@dataclass(frozen=True)
class Engine:
    """One implementation of attention over given blocks."""

    name: str
    device: str
    attend: Callable[..., Tensor]

    def __str__(self) -> str:
        """Readable test id."""
        return self.name


def _reference(q: Tensor, k: Tensor, v: Tensor, live: Tensor, **call: Any) -> Tensor:
    return reference.masked_attention(q, k, v, live, [NO_SKIP] * q.shape[1], **call)


def _triton(q: Tensor, k: Tensor, v: Tensor, live: Tensor, **call: Any) -> Tensor:
    from afbs_compile.kernels import block_sparse

    return block_sparse.attend(q, k, v, predict.mask_to_lists(live), [NO_SKIP] * q.shape[1], **call)


TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = Engine("reference", "cpu", _reference)
FLEX = Engine("flex", "cpu", flex.attend)
TRITON = Engine("triton", TRITON_DEVICE, _triton)
ENGINES = (REFERENCE, FLEX, TRITON)
