"""Error and sparsity of many thresholds in one pass over the key blocks.

For a fixed policy and theta, a larger tau keeps every block that a smaller one keeps. A query block that visits its
key blocks in the order in which tau lets them in therefore holds, after each step, the output of one threshold: its
running maximum, sum and accumulator are what block-sparse attention over the blocks seen so far computes. Comparing it
with the dense output whenever a threshold's last block has been folded in gives the error of every threshold for the
work of the largest alone: blocks that it leaves out are never visited.

Each threshold's result is the one that :func:`afbs_compile.kernels.reference.masked_attention` gives on the mask of
:func:`afbs_compile.kernels.policy.predict_mask`: those two are the specification.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.policies.base import ALWAYS
from afbs_compile.kernels.policy import DEFAULT, levels
from afbs_compile.kernels.reference import (
    DIAGONAL_ONLY,
    Kept,
    block_count,
    diagonal_blocks,
    kept_blocks,
    visible_blocks,
)

WORKING_BYTES = 384 * 2**20
"""Memory that a pass may take for itself, about; it goes through the heads in groups that fit."""


class PassSums(NamedTuple):
    """What one pass over one input measures, for ``m`` query blocks and ``T`` thresholds.

    Attributes:
        difference: fp32 ``[H, m, T]``, ``sum|O - O_dense|`` over the rows of the query block.
        magnitude: fp32 ``[H, m]``, ``sum|O_dense|`` of the same rows.
        live: int32 ``[H, m, T]``, key blocks that the threshold keeps.
        visible: int32 ``[m]``, key blocks that hold a key which some row may attend.
    """

    difference: Tensor
    magnitude: Tensor
    live: Tensor
    visible: Tensor


class Visit(NamedTuple):
    """The order in which query blocks visit their key blocks.

    Attributes:
        order: int32 ``[H, m, n_k]``; diagonal blocks first, then the other ones that are always kept, then by score.
        level: fp32 ``[H, m, n_k]``, ascending: the block is live at every tau above it. Negative for blocks that are
            always kept, infinite for invisible ones.
    """

    order: Tensor
    level: Tensor


def visit_order(level: Tensor, diagonal: Tensor) -> Visit:
    """Sort key blocks by the tau from which they are live.

    Args:
        level: fp32 ``[H, m, n_k]``, as :func:`afbs_compile.kernels.policy.levels` gives them.
        diagonal: bool ``[m, n_k]``, blocks that overlap the query block's rows.
    """
    ascending = level.masked_fill(diagonal & (level < math.inf), ALWAYS - 1).sort(dim=-1, stable=True)
    return Visit(ascending.indices.int(), ascending.values)


class _Places(NamedTuple):
    """Of the query blocks ``rows`` (int64 ``[m]``): visible, always kept and diagonal blocks, bool ``[m, n_k]`` each.

    ``in_sight`` is int32 ``[m]``, the number of visible ones.
    """

    rows: Tensor
    visible: Tensor
    always: Tensor
    diagonal: Tensor
    in_sight: Tensor


@functools.lru_cache(maxsize=8)
def _places(
    length: int,
    block_q: int,
    block_k: int,
    rows: tuple[int, ...] | None,
    causal: bool,
    kept: Kept,
    device: torch.device,
) -> _Places:
    """Where a query block's key blocks lie. A calibration asks for the same again and again."""
    shape = (block_count(length, block_q), block_count(length, block_k), block_q, block_k)
    places = torch.arange(shape[0], device=device) if rows is None else torch.tensor(rows, device=device)
    visible = visible_blocks(*shape, causal, device)[places]
    always = kept_blocks(length, block_q, block_k, kept, device)[places]
    diagonal = diagonal_blocks(*shape, device)[places]
    return _Places(places, visible, always, diagonal, visible.sum(-1, dtype=torch.int32))


def one_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dense: Tensor,
    tau: Tensor,
    theta: Tensor,
    *,
    policy: str = DEFAULT,
    rows: tuple[int, ...] | None = None,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    kept: Kept = DIAGONAL_ONLY,
) -> PassSums:
    """Measure every threshold of every head on one input.

    Args:
        q: ``[H, N, D]`` fp16, bf16, fp32 or, on the CPU, fp64; k, v: ``[H_kv, N, D]``, H a multiple of H_kv.
        dense: ``[H, N, D]``, the dense output in the dtype of ``q``.
        tau: fp32 ``[H, T]``, ascending; theta: fp32 ``[H]``; on any device.
        policy: what scores the blocks, one name for all heads.
        rows: the m query blocks to measure, ascending; all by default. Each is measured exactly.
        causal: whether row r attends keys 0..r only.
        scale: softmax scale; ``None`` means ``D ** -0.5``.
        block_q, block_k: rows per block; ``block_q`` is a multiple of ``block_k``.
        kept: which blocks every tau keeps, beside those on the diagonal.

    Returns:
        Sums per query block, on the device of ``q``. A row whose output overflows measures NaN or infinity.
    """
    heads, length, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    tau = tau.to(q.device, non_blocking=True)
    places = _places(length, block_q, block_k, rows, causal, kept, q.device)
    bytes_per_head = block_count(length, block_q) * block_count(length, block_k) * VISIT_BYTES
    measure = _triton_pass if q.device.type == "cuda" else torch_pass
    parts = []
    for some, kv in _head_groups(heads, k.shape[0], bytes_per_head):
        limits = theta[some] if policy == DEFAULT else None
        level = levels(
            policy, q[None, some], k[None, kv], limits,
            causal=causal, scale=scale, block_q=block_q, block_k=block_k,
            places=(places.visible, places.always), rows=None if rows is None else places.rows,
        )[0]  # fmt: skip
        visit = visit_order(level, places.diagonal)
        # A block is live at tau when its level lies below tau: the levels ascend, so a count says which.
        live = torch.searchsorted(
            visit.level, tau[some, None].expand(-1, len(places.rows), -1).contiguous(), out_int32=True
        )
        difference, magnitude = measure(
            q[some], k[kv], v[kv], visit, live, dense[some], places.rows,
            causal=causal, scale=scale, block_q=block_q, block_k=block_k,
        )  # fmt: skip
        parts.append((difference, magnitude, live))
    difference, magnitude, live = (torch.cat(x) for x in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
    return PassSums(difference, magnitude, live, places.in_sight)


VISIT_BYTES = 64
"""Bytes per (query block, key block) that ordering them takes at its peak."""


def _head_groups(heads: int, kv_heads: int, bytes_per_head: int) -> Iterator[tuple[slice, slice]]:
    """Query heads and their key heads, as many at a time as :data:`WORKING_BYTES` allows."""
    groups = heads // kv_heads
    parts = block_count(bytes_per_head * heads, WORKING_BYTES)
    step = max(1, kv_heads // parts)
    for first in range(0, kv_heads, step):
        last = min(first + step, kv_heads)
        yield slice(first * groups, last * groups), slice(first, last)


def _triton_pass(*operands: Any, **call: Any) -> tuple[Tensor, Tensor]:
    from afbs_compile.kernels import one_pass_triton  # Triton is not installed everywhere.

    return one_pass_triton.triton_pass(*operands, **call)


def torch_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visit: Visit,
    live: Tensor,
    dense: Tensor,
    rows: Tensor,
    *,
    causal: bool,
    scale: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """The pass in PyTorch: a query block at a time, the key blocks that the largest tau keeps in one product.

    Args:
        q, k, v, dense, rows, causal, scale, block_q, block_k: as in :func:`one_pass`.
        visit: the order; live: int32 ``[H, m, T]``, how many of the first blocks each threshold keeps.

    Returns:
        ``difference [H, m, T]`` and ``magnitude [H, m]``, fp32 or, for fp64 operands, fp64.
    """
    heads, length, dim = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    count_k = visit.order.shape[2]
    padding = (0, 0, 0, count_k * block_k - length)
    blocks_k, blocks_v = (F.pad(x.to(work), padding).view(-1, count_k, block_k, dim) for x in (k, v))
    within = torch.arange(block_k, device=q.device)
    difference = torch.empty(live.shape, dtype=work, device=q.device)
    magnitude = torch.empty(live.shape[:2], dtype=work, device=q.device)
    counts, places = live.tolist(), rows.tolist()
    for head in range(heads):
        keys, values = (blocks[head // (heads // k.shape[0])] for blocks in (blocks_k, blocks_v))
        for i, place in enumerate(places):
            first, last = place * block_q, min((place + 1) * block_q, length)
            ends = sorted(set(counts[head][i]))  # most thresholds keep what the one before them keeps
            seen = visit.order[head, i, : ends[-1]]
            # Under causality only the blocks on the diagonal, which come first, hold keys that a row must not see.
            masked = seen[: block_q // block_k] if causal else seen
            limit = torch.arange(first, last, device=q.device) if causal else seen.new_tensor([length - 1])
            hidden = (masked[:, None] * block_k + within).flatten() > limit[:, None]
            outputs = _outputs(
                q[head, first:last].to(work) * scale,
                keys[seen].flatten(0, 1),
                values[seen].flatten(0, 1),
                hidden,
                [end * block_k for end in ends],
            )
            exact = dense[head, first:last].to(work)
            # The engine rounds its output to the operands' dtype.
            distances = (outputs.to(q.dtype).to(work) - exact).abs_().sum((1, 2))
            difference[head, i] = distances[[ends.index(end) for end in counts[head][i]]]
            magnitude[head, i] = exact.abs().sum()
    return difference, magnitude


FAR_APART = 60.0
"""Beyond this distance of two row maxima, in nats, fp32 weights relative to one lose the other."""


def _outputs(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, ends: list[int]) -> Tensor:
    """Attention of some rows over the first ``end`` keys, for each of ``ends``.

    Args:
        query: ``[rows, D]``, scaled; keys, values: ``[n, D]``, in visiting order.
        hidden: bool ``[rows, m]`` or ``[1, m]``, which of the first m keys a row must not attend; some key of the first
            ``ends[0]`` remains for every row.
        ends: ascending, each once; the last is n.

    Returns:
        ``[len(ends), rows, D]``.
    """
    scores = query @ keys.T
    scores[:, : hidden.shape[1]].masked_fill_(hidden, -math.inf)
    peak = scores.amax(1, keepdim=True)
    far = peak - scores[:, : ends[0]].amax(1, keepdim=True) > FAR_APART
    if query.dtype == torch.float32 and bool(far.any()):
        return _outputs(query.double(), keys.double(), values.double(), hidden, ends).float()
    # With one maximum for all keys, sums over the first keys are running sums.
    weights = scores.sub_(peak).exp_()
    total, out = torch.zeros_like(peak), torch.zeros_like(query)
    outputs = []
    for first, end in itertools.pairwise([0, *ends]):
        part = weights[:, first:end]
        total = total + part.sum(1, keepdim=True)
        out = torch.addmm(out, part, values[first:end])
        outputs.append(out / total)
    return torch.stack(outputs)
