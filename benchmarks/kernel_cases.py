"""The cases of the kernel benchmark: shapes, operands with structure, thresholds for a wanted sparsity, and the truth.

Operands are not noise, but where a case says so. Each head has some directions that queries and keys turn to for a
stretch of tokens, and a slow drift that neighbours share, so pooled scores spread as those of a trained head do. The
predictor then runs as it does in a model: ``tau`` of each head is found by bisection on the sparsity that it measures,
to within a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.attend.engines import engines_on
from afbs_compile.kernels.blocks import BlockLists, BlockShape, Grid, block_count
from afbs_compile.kernels.call import KEEP_ALL, LAMBDA_OFF, THETA_OFF, SparseCall
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import UNNAMED

DIRECTIONS, STRETCH, DRIFT = 48, 256, 512
"""Directions a head knows, tokens that follow one of them, tokens from one anchor of the drift to the next."""

BISECTIONS = 13
SAMPLED_BLOCKS = 8
"""Query blocks whose output is compared with float64: all would take longer than everything else together."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: as ``--cases`` takes it.
        mask: its text. sparsity: wanted share of the visible blocks that is not computed.
        at_least: times dense SDPA that the case must reach; None where nothing is asked.
        precision: of all heads.
        noise: whether the operands are normal noise: the chip is limited by power, and numbers that have nothing in
            common cost more of it. Most published kernel times are of noise.
    """

    name: str
    length: int
    mask: str
    sparsity: float
    at_least: float | None = None
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    precision: str = "own"
    noise: bool = False

    @property
    def dense_flops(self) -> float:
        """Multiplications and additions of both products, over the pairs that a row may attend."""
        half = 2 if self.mask == "causal" else 1
        return 4 * self.heads * self.head_dim * self.length * (self.length / half)


GPU_CASES = (
    Case("full-32k-70", 32768, "full", 0.7, 3.3),
    Case("causal-32k-70", 32768, "causal", 0.7, 3.2),
    Case("causal-16k-70", 16384, "causal", 0.7, 3.0),
    Case("causal-128k-70", 131072, "causal", 0.7, 3.3),
    Case("causal-64k-90", 65536, "causal", 0.9, 8.0),
    Case("full-32k-0", 32768, "full", 0.0, 0.95),
    Case("causal-32k-0", 32768, "causal", 0.0, 0.95),
    Case("gqa-32k-70", 32768, "causal", 0.7, 3.2, kv_heads=8),
    Case("d64-32k-70", 32768, "causal", 0.7, 3.0, heads=16, kv_heads=16, head_dim=64),
    Case("fp8-32k-70", 32768, "full", 0.7, 4.5, precision="fp8"),
    Case("noise-full-32k-70", 32768, "full", 0.7, 3.3, noise=True),
    Case("noise-causal-32k-70", 32768, "causal", 0.7, 3.2, noise=True),
    Case("noise-causal-16k-70", 16384, "causal", 0.7, 3.0, noise=True),
    Case("noise-d64-32k-70", 32768, "causal", 0.7, 3.0, heads=16, kv_heads=16, head_dim=64, noise=True),
)
_CPU: dict[str, Any] = {"heads": 4, "kv_heads": 4, "head_dim": 64}
CPU_CASES = (
    Case("cpu-full-8k-70-fp32", 8192, "full", 0.7, 2.5, dtype=torch.float32, **_CPU),
    Case("cpu-causal-8k-70-fp32", 8192, "causal", 0.7, 2.5, dtype=torch.float32, **_CPU),
    Case("cpu-full-8k-70-bf16", 8192, "full", 0.7, 1.5, **_CPU),
    Case("cpu-causal-8k-70-bf16", 8192, "causal", 0.7, 1.5, **_CPU),
)


def operands(case: Case, device: str, seed: int = 0) -> Operands:
    """q ``[1, H, N, D]``, k and v ``[1, H_kv, N, D]``, in memory ``[1, N, heads, D]`` as projections leave them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    groups = case.heads // case.kv_heads
    q, k, v = (
        torch.empty(1, case.length, heads, case.head_dim, dtype=case.dtype, device=device).transpose(1, 2)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    made = Operands(q, k, v, mask_of(case.mask), case.head_dim**-0.5)
    if case.noise:
        for x in (q, k, v):
            x.copy_(normal(*x.shape))
        return made
    for head in range(case.kv_heads):
        directions = F.normalize(normal(DIRECTIONS, case.head_dim), dim=-1)
        anchors = normal(1, case.head_dim, case.length // DRIFT + 2)
        path = F.interpolate(anchors, size=case.length, mode="linear", align_corners=True)[0].T
        local = F.normalize(path, dim=-1)
        mine = range(head * groups, (head + 1) * groups)
        for x in (k[0, head], *(q[0, i] for i in mine)):
            choice = torch.randint(DIRECTIONS, (block_count(case.length, STRETCH),), generator=generator, device=device)
            turned = directions[choice].repeat_interleave(STRETCH, 0)[: case.length]
            # Rows of norm about 1.5 D^(1/4) x 2: scaled scores of related blocks reach about 8.
            rows = turned + local + 0.7 * normal(case.length, case.head_dim) * case.head_dim**-0.5
            x.copy_(2 * rows * case.head_dim**0.25)
        v[0, head].copy_(normal(case.length, case.head_dim))
    return made


def sparse(case: Case, tau: Sequence[float], shape: BlockShape, lam: float = LAMBDA_OFF) -> SparseCall:
    """The case's call at some taus, theta off."""
    per_head = ((value,) * case.heads for value in (THETA_OFF, lam, UNNAMED))
    return SparseCall(tuple(tau), *per_head, shape, precision=(case.precision,) * case.heads)


def valid_blocks(case: Case, shape: BlockShape) -> int:
    """Blocks of one head that hold a pair which the mask allows."""
    grid = Grid(case.length, case.length, shape)
    return int(mask_of(case.mask).visibility(grid, torch.device("cpu")).visible.sum())


def sparsity_of(lists: BlockLists, case: Case, shape: BlockShape) -> Tensor:
    """``[H]``: 1 - live blocks / valid blocks."""
    return 1 - lists.counts[0].sum(-1).double().cpu() / valid_blocks(case, shape)


def predicted(operands: Operands, case: Case, tau: Sequence[float], shape: BlockShape) -> BlockLists:
    """The predictor alone."""
    return engines_on(operands.device)[0].select(operands, sparse(case, tau, shape))


def thresholds_for(
    case: Case, operands: Operands, shape: BlockShape, wanted: Sequence[float] | None = None
) -> tuple[list[float], BlockLists]:
    """``tau`` of each head by bisection, and the lists it gives; ``wanted`` is the sparsity of each head."""
    goal = torch.tensor(wanted or [case.sparsity] * case.heads, dtype=torch.float64)
    low, high = torch.zeros(case.heads).double(), torch.ones(case.heads).double()

    def lists_of(tau: Tensor) -> BlockLists:
        return predicted(operands, case, tau.tolist(), shape)

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_sparse = sparsity_of(lists_of(middle), case, shape) > goal  # a larger tau keeps more
        low, high = torch.where(too_sparse, middle, low), torch.where(too_sparse, high, middle)
    tau = torch.where(goal > 0, (low + high) / 2, KEEP_ALL)
    return tau.tolist(), lists_of(tau)


def live_pairs(lists: BlockLists, case: Case, shape: BlockShape) -> float:
    """Pairs of a query and a key that are computed and that the mask allows; lengths are whole blocks here."""
    block_q, block_k = shape.rows
    pairs = float(lists.counts.sum()) * block_q * block_k
    if case.mask == "causal":
        # Above the diagonal of its rows a query block computes block_q (block_q - 1) / 2 pairs for nothing.
        pairs -= lists.counts.numel() * block_q * (block_q - 1) / 2
    return pairs


def samples(case: Case, block_q: int) -> list[tuple[int, int]]:
    """(head, query block) pairs spread over heads and rows, the first and the last rows among them."""
    last = block_count(case.length, block_q) - 1
    steps = SAMPLED_BLOCKS - 1
    return [(i * (case.heads - 1) // steps, i * last // steps) for i in range(SAMPLED_BLOCKS)]


def exact_rows(
    operands: Operands, case: Case, shape: BlockShape, lists: BlockLists | None
) -> list[tuple[int, slice, Tensor]]:
    """Float64 output of the sampled query blocks over their live keys, or over all of them without lists."""
    q, k, v, (block_q, block_k) = operands.q, operands.k, operands.v, shape.rows
    result = []
    for head, block in samples(case, block_q):
        rows = torch.arange(block * block_q, min((block + 1) * block_q, case.length), device=q.device)
        cols = torch.arange(case.length, device=q.device)
        if lists is not None:
            live = lists.indices[0, head, block, : int(lists.counts[0, head, block])].long()
            cols = (live[:, None] * block_k + torch.arange(block_k, device=q.device)).flatten()
            cols = cols[cols < case.length]
        kv_head = head * case.kv_heads // case.heads
        scores = q[0, head, rows].double() @ k[0, kv_head, cols].double().T / math.sqrt(case.head_dim)
        scores = scores.masked_fill(~operands.mask.sees(rows[:, None], cols), -math.inf)
        out = scores.softmax(-1) @ v[0, kv_head, cols].double()
        result.append((head, slice(int(rows[0]), int(rows[-1]) + 1), out))
    return result


def relative_l1(out: Tensor, truth: list[tuple[int, slice, Tensor]]) -> float:
    """sum |o - truth| / sum |truth| over the sampled rows; NaN stays NaN."""
    off = sum(float((out[0, head, rows].double() - exact).abs().sum()) for head, rows, exact in truth)
    return off / sum(float(exact.abs().sum()) for _, _, exact in truth)
