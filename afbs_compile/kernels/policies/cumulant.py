"""``cumulant``: the mass of 16 keys as 16 queries see it, to second order, with the rule ``"share"``.

A block of keys holds more of a row's softmax than its mean key says, by how far its keys spread along the query. The
logarithm of the mean of ``exp(scale <q, k>)`` over keys k of mean m and variance v (of each coordinate) is
``scale <q, m> + scale^2 / 2 <q^2, v>`` up to third order in the spread, coordinates taken as uncorrelated. Groups of 16
tokens, a quarter of a block, are described well by their means where whole blocks are not. Everything is a statistic of
the groups themselves, so nothing later than a query block enters its scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.base import OnnxBody
from afbs_compile.kernels.policies.features import GROUP, Features
from afbs_compile.kernels.policies.grouped import BLOCK_MASS, GroupedPolicy
from afbs_compile.kernels.policies.statistics import in_blocks

GROUP_MOMENTS = """
GroupMoments (x, valid) => (mean, variance)
{
    # of each coordinate over the valid tokens of each group; the last group may have fewer tokens
    group = Constant <value = int64 {16}> ()
    outer = Constant <value = int64[2] {1, 3}> ()
    row_axis = Constant <value = int64[1] {-2}> ()
    rows, unused = afbs.InBlocks (x, group)
    sizes = afbs.ValidSizes (valid, group)
    sum = ReduceSum <keepdims = 1> (rows, row_axis)
    sizes_wide = Unsqueeze (sizes, row_axis)
    mean_wide = Div (sum, sizes_wide)
    mean = Squeeze (mean_wide, row_axis)
    valid_float = Cast <to = 1> (valid)
    valid_rows = Unsqueeze (valid_float, outer)
    inside, unused_too = afbs.InBlocks (valid_rows, group)
    centred = Sub (rows, mean_wide)
    spread = Mul (centred, inside)
    squares = Mul (spread, spread)
    square_sum = ReduceSum <keepdims = 0> (squares, row_axis)
    variance = Div (square_sum, sizes)
}
"""

CUMULANT_MASS = """
CumulantMass (q, k, formula, valid, mask, blurred, scaling, softcap, capped, by_mask, with_bias, size_q, size_k)
    => (mass)
{
    # logit_ab = <scale mean_q, mean_k> + <(scale mean_q)^2 / 2, var_k>
    one = Constant <value = float {1}> ()
    two = Constant <value = float {2}> ()
    q_len1 = Shape <start = 2, end = 3> (q)
    q_len = Squeeze (q_len1)
    rows_valid = afbs.AllRows (q)
    mean_q, unused = afbs.GroupMoments (q, rows_valid)
    mean_k, variance_k = afbs.GroupMoments (k, valid)
    scaled = Mul (mean_q, scaling)
    squared = Mul (scaled, scaled)
    half = Div (squared, two)
    rows = Concat <axis = -1> (scaled, half)
    cols = Concat <axis = -1> (mean_k, variance_k)
    mass = afbs.BlockMass <span = 16, last = 15>
        (rows, cols, one, q_len, formula, valid, mask, blurred, softcap, capped, by_mask, with_bias, size_q, size_k)
}
"""

SCORE_BY_CUMULANT = """
ScoreByCumulant (q, k, formula, valid, mask, blurred, bias, scaling, softcap, capped, by_mask, with_bias, size_q,
    size_k) => (scores)
{
    mass = afbs.CumulantMass
        (q, k, formula, valid, mask, blurred, scaling, softcap, capped, by_mask, with_bias, size_q, size_k)
    scores = Log (mass)
}
"""


class Cumulant(GroupedPolicy):
    """Scores by means and variances of groups of tokens."""

    name = "cumulant"
    rule = "share"
    explored = (-1.0,)
    onnx = OnnxBody("ScoreByCumulant", (BLOCK_MASS, GROUP_MOMENTS, CUMULANT_MASS, SCORE_BY_CUMULANT))

    def features(self, operands: Operands) -> Features:
        """Per group its mean, then what multiplies or is the variance."""
        mean_q, _ = moments(operands.q)
        mean_k, variance_k = moments(operands.k, operands.valid)
        # logit_ab = <scale mean_q, mean_k> + <(scale mean_q)^2 / 2, var_k>
        scaled = mean_q * operands.scale
        # Of half precision the products cost half as much, and round a logit by less than the second order leaves out.
        dtype = torch.float32 if operands.q.dtype == torch.float32 else torch.bfloat16
        return _features(
            torch.cat([scaled, scaled.square() / 2], 3).to(dtype), torch.cat([mean_k, variance_k], 3).to(dtype)
        )

    def features_on_gpu(self, operands: Operands) -> Features:
        """The same by a Triton kernel."""
        from afbs_compile.kernels.policies.triton.moments import moment_rows  # Triton is not installed everywhere.

        of_q = moment_rows(operands.q, operands.scale, of_queries=True)
        return _features(of_q, moment_rows(operands.k, 1.0, of_queries=False))


def _features(q: Tensor, k: Tensor) -> Features:
    return Features(q, k, 1.0, parts=1, reverse=False, span=GROUP, last=GROUP - 1)


def moments(x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance of each coordinate over the valid tokens of each group; 0 where there is none.

    Args:
        x: ``[B, H, N, D]``; the last group may have fewer than :data:`GROUP` tokens.
        valid: bool ``[B, N]``, ``None`` for all.

    Returns:
        Two fp32 ``[B, H, ceil(N / GROUP), D]``.
    """
    rows, there = in_blocks(x.float(), GROUP, valid)
    inside = there[..., None]
    sizes = inside.sum(3).clamp_min(1)
    mean = rows.sum(3) / sizes
    variance = ((rows - mean[:, :, :, None]) * inside).square().sum(3) / sizes
    return mean, variance
