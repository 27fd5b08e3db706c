"""The pass of :mod:`afbs_compile.kernels.measure.one_pass` in PyTorch."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.measure.visit import Visit
from afbs_compile.kernels.operands import Operands

FAR_APART = 60.0
"""Beyond this distance of two row maxima, in nats, fp32 weights relative to one lose the other."""


def plain_pass(
    operands: Operands, dense: Tensor, shape: BlockShape, visit: Visit, live: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """A query block at a time, the key blocks that the largest tau keeps in one product.

    Args:
        operands: of one input; dense: its dense output ``[1, H, q_len, D]`` in the dtype of ``q``.
        shape: rows per block.
        visit: the order; live: int32 ``[H, m, T]``, how many of the first blocks each threshold keeps.
        rows: int64 ``[m]``, the query blocks.

    Returns:
        ``difference [H, m, T]`` and ``magnitude [H, m]``, fp32 or, for fp64 operands, fp64.
    """
    q, exact_dtype = operands.q[0], operands.q.dtype
    heads, q_len, dim = q.shape
    work = torch.float64 if exact_dtype == torch.float64 else torch.float32
    count_k = visit.order.shape[2]
    padding = (0, 0, 0, count_k * shape.k - operands.k_len)
    blocks_k, blocks_v = (
        F.pad(x[0].to(work), padding).view(-1, count_k, shape.k, dim) for x in (operands.k, operands.v)
    )
    within = torch.arange(shape.k, device=q.device)
    offset = operands.mask.offset(q_len, operands.k_len)
    difference = torch.empty(live.shape, dtype=work, device=q.device)
    magnitude = torch.empty(live.shape[:2], dtype=work, device=q.device)
    counts, places = live.tolist(), rows.tolist()
    for head in range(heads):
        keys, values = (blocks[head // operands.groups] for blocks in (blocks_k, blocks_v))
        for i, place in enumerate(places):
            first, last = place * shape.q, min((place + 1) * shape.q, q_len)
            ends = sorted(set(counts[head][i]))  # most thresholds keep what the one before them keeps
            seen = visit.order[head, i, : ends[-1]]
            masked = visit.partial[i, seen].nonzero()[:, 0]  # only partial blocks hold keys that a row does not see
            columns = (masked[:, None] * shape.k + within).flatten()
            keys_there = (seen[masked][:, None] * shape.k + within).flatten()
            positions = torch.arange(first, last, device=q.device)[:, None] + offset
            hidden = ~(operands.mask.sees(positions, keys_there) & (keys_there < operands.k_len))
            outputs = _outputs(
                q[head, first:last].to(work) * operands.scale,
                keys[seen].flatten(0, 1),
                values[seen].flatten(0, 1),
                (columns, hidden),
                [end * shape.k for end in ends],
            )
            exact = dense[0, head, first:last].to(work)
            # The engine rounds its output to the operands' dtype.
            distances = (outputs.to(exact_dtype).to(work) - exact).abs_().sum((1, 2))
            difference[head, i] = distances[[ends.index(end) for end in counts[head][i]]]
            magnitude[head, i] = exact.abs().sum()
    return difference, magnitude


def _outputs(query: Tensor, keys: Tensor, values: Tensor, masked: tuple[Tensor, Tensor], ends: list[int]) -> Tensor:
    """Attention of some rows over the first ``end`` keys, for each of ``ends``.

    Args:
        query: ``[rows, D]``, scaled; keys, values: ``[n, D]``, in visiting order.
        masked: int64 ``[m]``, keys of which some are hidden, and bool ``[rows, m]``, from which rows; some key of the
            first ``ends[0]`` remains for every row.
        ends: ascending, each once; the last is n.

    Returns:
        ``[len(ends), rows, D]``.
    """
    scores = query @ keys.T
    columns, hidden = masked
    scores[:, columns] = scores[:, columns].masked_fill(hidden, -math.inf)
    peak = scores.amax(1, keepdim=True)
    far = peak - scores[:, : ends[0]].amax(1, keepdim=True) > FAR_APART
    if query.dtype == torch.float32 and bool(far.any()):
        return _outputs(query.double(), keys.double(), values.double(), masked, ends).float()
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
