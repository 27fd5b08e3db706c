"""``sink_window``: the first block and a window of the latest ones (StreamingLLM, Xiao et al. 2024).

tau maps to the window's extent: ``WINDOW * tau / (1 - tau)`` tokens behind the query block's first row (and ahead of
its last one where that is seen), whatever the length. tau = 0 keeps only what is always kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.base import OnnxBody, Policy

WINDOW = 1024
"""Extent in tokens at tau = 0.5."""

SCORE_BY_WINDOW = """
ScoreByWindow (q, k, formula, valid, mask, blurred, bias, scaling, softcap, capped, by_mask, with_bias, size_q, size_k)
    => (scores)
{
    # scores = log(1024 / distance), infinite for the first block; distance: tokens between the blocks' nearest rows
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    column = Constant <value = int64[1] {-1}> ()
    log_window = Constant <value = float {6.93147182}> ()
    infinite = Constant <value = float {inf}> ()
    shift = Gather (formula, zero)
    q_len1 = Shape <start = 2, end = 3> (q)
    k_len1 = Shape <start = 2, end = 3> (k)
    q_len = Squeeze (q_len1)
    k_len = Squeeze (k_len1)
    first_rows = Range (zero, q_len, size_q)
    first_q_flat = Add (first_rows, shift)
    first_q = Unsqueeze (first_q_flat, column)
    first_k = Range (zero, k_len, size_k)
    end_q = Add (first_q, size_q)
    end_k = Add (first_k, size_k)
    last_q = Sub (end_q, one)
    last_k = Sub (end_k, one)
    behind = Sub (first_q, last_k)
    ahead = Sub (first_k, last_q)
    distance_int = Max (behind, ahead, one)
    distance = Cast <to = 1> (distance_int)
    log_distance = Log (distance)
    by_distance = Sub (log_window, log_distance)
    is_first = Equal (first_k, zero)
    log_strength = Where (is_first, infinite, by_distance)
    batch_heads = Shape <start = 0, end = 2> (q)
    blocks = Shape (log_strength)
    shape = Concat <axis = 0> (batch_heads, blocks)
    scores = Expand (log_strength, shape)
}
"""


class SinkWindow(Policy):
    """Scores by distance; q and k do not matter."""

    name = "sink_window"
    rule = "strength"
    onnx = OnnxBody("ScoreByWindow", (SCORE_BY_WINDOW,))

    def scores(self, operands: Operands, shape: BlockShape) -> Tensor:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.scores`."""
        grid, device = operands.grid(shape), operands.device
        first_q = torch.arange(grid.count_q, device=device)[:, None] * shape.q + operands.offset
        first_k = torch.arange(grid.count_k, device=device) * shape.k
        # Tokens between the two blocks' nearest rows, at least 1 for blocks that do not overlap.
        behind, ahead = first_q - (first_k + shape.k - 1), first_k - (first_q + shape.q - 1)
        distance = torch.maximum(behind, ahead).clamp_min(1)
        # strength = WINDOW / distance > (1 - tau) / tau   <=>   distance < WINDOW * tau / (1 - tau)
        strength = math.log(WINDOW) - distance.float().log()
        strength[:, 0] = math.inf
        return strength.expand(*operands.q.shape[:2], -1, -1)
