"""How far a sparse call is from the dense one, on a random sample of its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.dense import dense_rows
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.sight import rows_that_count


class RowErrors(NamedTuple):
    """What the sampled rows say of each head.

    Attributes:
        error: ``[H]`` fp32, ``sum|o - o_dense| / sum|o_dense|`` over the sampled rows (Eq. 1); infinite where the
            output alone is not finite, NaN where the head's values or its dense output are not.
        deviation: ``[H]`` fp32, the standard error of ``error`` as an estimate of the same over all rows, that of a
            ratio of two sums over rows drawn without replacement; 0 where all rows were drawn.
    """

    error: Tensor
    deviation: Tensor


def row_errors(operands: Operands, out: Tensor, count: int, generator: torch.Generator) -> RowErrors:
    """Compute some rows densely and compare; nothing waits for the device.

    Args:
        operands: of the call, batch size 1; out: its result ``[1, H, q_len, D_v]``.
        count: rows to draw, among those that are no padding; generator: draws them.
    """
    counted = rows_that_count(operands)
    chances = torch.rand(operands.q_len, generator=generator, device=operands.device)
    if counted is not None:
        chances = chances.masked_fill(~counted[0], -1.0)
    drawn = chances.topk(min(count, operands.q_len))
    rows = drawn.indices
    known = drawn.values >= 0  # of padding where there is too little else
    v = operands.v if operands.valid is None else operands.v.masked_fill(~operands.valid[:, None, :, None], 0.0)
    # 0 times a value that is not finite is NaN, also in rows that do not see it: such heads are not judged.
    dense = dense_rows(replace(operands, v=v.nan_to_num(0.0, 0.0, 0.0)), rows, torch.matmul)[0]
    difference = torch.linalg.vector_norm(out[0, :, rows].float() - dense, ord=1, dim=-1)
    magnitude = torch.linalg.vector_norm(dense, ord=1, dim=-1)
    judged = v.isfinite().all((-2, -1))[0].repeat_interleave(operands.groups) & magnitude.isfinite().all(-1)
    difference, magnitude = difference.masked_fill(~known, 0.0), magnitude.masked_fill(~known, 0.0)
    total = magnitude.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    error = difference.sum(-1) / total
    rest = (difference - error[:, None] * magnitude).square().sum(-1)
    among = operands.q_len if counted is None else counted.sum()
    many = known.sum()
    variance = rest * many / (many - 1).clamp_min(1) * (1 - many / among).clamp_min(0)
    error = torch.where(error.isnan(), torch.inf, error)
    return RowErrors(torch.where(judged, error, torch.nan), variance.sqrt() / total)
