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
from afbs_compile.kernels.sight import allowed_by_rows, capped, of_rows, product, rows_that_count, weights

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
    heads, q_len, _ = q.shape
    counted = rows_that_count(operands)
    work = torch.float64 if exact_dtype == torch.float64 else torch.float32
    count_k = visit.order.shape[2]
    padding = (0, 0, 0, count_k * shape.k - operands.k_len)
    blocks_k, blocks_v = (
        F.pad(x[0].to(work), padding).unflatten(1, (count_k, shape.k)) for x in (operands.k, operands.v)
    )
    within = torch.arange(shape.k, device=q.device)
    difference = torch.empty(live.shape, dtype=work, device=q.device)
    magnitude = torch.empty(live.shape[:2], dtype=work, device=q.device)
    counts, places = live.tolist(), rows.tolist()
    for i, place in enumerate(places):
        some = slice(place * shape.q, min((place + 1) * shape.q, q_len))
        by_key = F.pad(allowed_by_rows(operands, some), (0, padding[3]))[0]
        for head in range(heads):
            keys, values = (blocks[head // operands.groups] for blocks in (blocks_k, blocks_v))
            ends = sorted(set(counts[head][i]))  # most thresholds keep what the one before them keeps
            order = visit.order[head, i, : ends[-1]]
            in_order = (order[:, None] * shape.k + within).flatten()
            scores = q[head, some].to(work) * operands.scale @ keys[order].flatten(0, 1).T
            if not operands.is_plain:
                scores = _changed(operands, scores, head, some, in_order)
            partial = visit.partial[head % len(visit.partial), i, order]  # only those hold keys that a row does not see
            columns = (partial.nonzero() * shape.k + within).flatten()
            seen = by_key[head % len(by_key)][:, in_order[columns]]
            scores[:, columns] = scores[:, columns].masked_fill(~seen, -math.inf)
            sink = None if operands.sinks is None else operands.sinks[head].to(work)
            outputs = _outputs(scores, values[order].flatten(0, 1), sink, [end * shape.k for end in ends])
            exact = dense[0, head, some].to(work)
            if counted is not None:
                outputs, exact = (x.masked_fill(~counted[0, some, None], 0.0) for x in (outputs, exact))
            # The engine rounds its output to the operands' dtype.
            distances = (outputs.to(exact_dtype).to(work) - exact).abs_().sum((1, 2))
            difference[head, i] = distances[[ends.index(end) for end in counts[head][i]]]
            magnitude[head, i] = exact.abs().sum()
    return difference, magnitude


def _changed(operands: Operands, scores: Tensor, head: int, rows: slice, keys: Tensor) -> Tensor:
    """Scores ``[rows, n]`` of one head, capped, and with what the mask adds to those of ``keys``, int64 ``[n]``."""
    scores = capped(scores, operands.softcap)
    if operands.attn_mask is None or not operands.has_bias:
        return scores
    bias = of_rows(operands.attn_mask, rows)[0, head % operands.attn_mask.shape[1]].to(scores.dtype)
    return scores + bias[:, keys.clamp_max(operands.k_len - 1)]


def _outputs(scores: Tensor, values: Tensor, sink: Tensor | None, ends: list[int]) -> Tensor:
    """Attention of some rows over the first ``end`` keys, for each of ``ends``.

    Args:
        scores: ``[rows, n]``, in visiting order, hidden keys at -inf; changed in place. values: ``[n, D_v]``.
        sink: one more logit in the denominator.
        ends: ascending, each once; the last is n.

    Returns:
        ``[len(ends), rows, D_v]``; 0 where a row sees none of the first keys.
    """
    peak = scores.amax(1, keepdim=True) if scores.shape[1] else scores.new_full((len(scores), 1), -math.inf)
    if sink is not None:
        peak = torch.maximum(peak, sink)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    nearest = scores[:, : ends[0]].amax(1, keepdim=True) if ends[0] else torch.full_like(peak, -math.inf)
    far = (peak - nearest > FAR_APART) & (nearest > -math.inf)
    if bool(far.any()):
        if scores.dtype == torch.float64:
            return torch.stack([_output(scores[:, :end], values[:end], sink) for end in ends])
        wide_sink = None if sink is None else sink.double()
        return _outputs(scores.double(), values.double(), wide_sink, ends).float()
    # With one maximum for all keys, sums over the first keys are running sums.
    powers = scores.sub_(peak).exp_()
    total = torch.zeros_like(peak) if sink is None else torch.exp(sink - peak)
    out = torch.zeros(len(scores), values.shape[1], dtype=scores.dtype, device=scores.device)
    values = values.masked_fill(~values.isfinite() & (powers == 0).all(0)[:, None], 0.0)
    outputs = []
    for first, end in itertools.pairwise([0, *ends]):
        part = powers[:, first:end]
        total = total + part.sum(1, keepdim=True)
        out = torch.addmm(out, part, values[first:end])
        outputs.append(torch.where(total == 0, 0.0, out / total))
    return torch.stack(outputs)


def _output(scores: Tensor, values: Tensor, sink: Tensor | None) -> Tensor:
    """Attention of some rows over all of the keys, ``[rows, D_v]``."""
    return product(weights(scores[None, None], None if sink is None else sink[None])[0, 0], values)
