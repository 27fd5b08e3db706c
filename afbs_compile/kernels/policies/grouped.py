"""Scores from a coarser attention: groups of query tokens against groups of key tokens, summed into blocks.

A group of query tokens takes a softmax over the groups of keys that it may see; the mass that falls into a key block,
averaged over the query groups of a query block, is that block's probability. Policies differ in the features whose
products are the logits.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape, block_count, chunks
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.base import Policy
from afbs_compile.kernels.policies.features import GROUP, Features
from afbs_compile.kernels.sight import capped, of_rows, seen_by_rows, sight_of, valid_blocks

BLOCK_MASS = """
BlockMass <span, last> (rows, cols, scaling, q_len, formula, valid, mask, blurred, softcap, capped, by_mask, with_bias,
    size_q, size_k) => (mass)
{
    # rows [B, H, groups of queries, F], cols [B, H, groups of keys, F] -> [B, H, n_q, n_k], which sums to 1 over n_k,
    # or to less where groups see nothing; for one query block at a time, so that nothing but this result grows with
    # the square of the length
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    group = Constant <value = int64 {16}> ()
    shape1 = Constant <value = int64[1] {1}> ()
    column = Constant <value = int64[1] {-1}> ()
    row_axis = Constant <value = int64[1] {-2}> ()
    lowest = Constant <value = float {-inf}> ()
    zero_float = Constant <value = float {0}> ()
    span_k = Constant <value_int: int = @span> ()
    last_token = Constant <value_int: int = @last> ()
    groups_q1 = Shape <start = 2, end = 3> (rows)
    groups_k1 = Shape <start = 2, end = 3> (cols)
    groups_q = Squeeze (groups_q1)
    groups_k = Squeeze (groups_k1)

    # whole blocks of groups; the last query block may have fewer
    per_q = Div (size_q, group)
    per_k = Div (size_k, span_k)
    row_blocks, groups_of = afbs.InBlocks (rows, per_q)
    col_columns = Transpose <perm = [0, 1, 3, 2]> (cols)
    count_q1 = Shape <start = 2, end = 3> (row_blocks)
    count_q = Squeeze (count_q1)
    key_groups = Range (zero, groups_k, one)
    blocks_of_groups = Div (key_groups, per_k)
    groups_in_block = Range (zero, per_q, one)

    unused_state, mass_blocks = Loop (count_q, "", one)
    <body = look (int64 block, bool more, int64 state) => (bool again, int64 same_state, float[?, ?, ?] of_block)
    {
        again = Constant <value = bool {1}> ()
        same_state = Identity (state)
        row_block = Gather <axis = 2> (row_blocks, block)
        products = MatMul (row_block, col_columns)
        scaled = Mul (products, scaling)
        logits = afbs.Capped (scaled, softcap, capped)
        # the last token that a query group is told of decides what it sees
        first_group = Mul (block, per_q)
        query_groups_flat = Add (groups_in_block, first_group)
        group_tokens = Mul (query_groups_flat, group)
        tokens = Add (group_tokens, last_token)
        in_sight, bias = If (by_mask) <
            then_branch = of_mask () => (bool[?, ?, ?, ?] seen_m, float[?, ?, ?, ?] bias_m)
            {
                seen_m, bias_m = afbs.GroupsByMask
                    (tokens, q_len, formula, valid, mask, with_bias, span_k)
            },
            else_branch = of_formula () => (bool[?, ?, ?, ?] seen_f, float[?, ?, ?, ?] bias_f)
            {
                seen_f, bias_f = afbs.GroupsByFormula (tokens, formula, valid, span_k)
            }
        >
        # key groups of blurred blocks nobody sees
        block1 = Reshape (block, shape1)
        blurred_blocks = Gather <axis = 2> (blurred, block1)
        blurred_groups = Gather <axis = 3> (blurred_blocks, blocks_of_groups)
        clear = Not (blurred_groups)
        seen = And (in_sight, clear)
        logits_all = Add (logits, bias)
        masked = Where (seen, logits_all, lowest)
        all_weights = Softmax <axis = -1> (masked)
        query_groups = Unsqueeze (query_groups_flat, column)
        query_exists = Less (query_groups, groups_q)
        counts = And (query_exists, seen)
        counts_int = Cast <to = 6> (counts)
        counts_most = ReduceMax <keepdims = 1> (counts_int, column)
        counts_some = Cast <to = 9> (counts_most)
        weights_flat = Where (counts_some, all_weights, zero_float)
        weights = afbs.KeyBlocks (weights_flat, per_k, zero_float)
        by_group = ReduceSum <keepdims = 0> (weights, column)
        total = ReduceSum <keepdims = 0> (by_group, row_axis)
        size = Gather <axis = 0> (groups_of, block)
        of_block = Div (total, size)
    }>
    mass = Transpose <perm = [1, 2, 0, 3]> (mass_blocks)
}
"""

LOGITS_AT_ONCE = 1 << 24
"""Elements of the coarse attention that the PyTorch version holds at a time, per batch element and head group."""


class GroupedPolicy(Policy):
    """Base of the policies of this kind: subclasses make the features."""

    @abstractmethod
    def features(self, operands: Operands) -> Features:
        """The features of q and k; of a token's own group only, and of valid keys only."""

    def features_on_gpu(self, operands: Operands) -> Features:
        """The same without large temporary tensors."""
        return self.features(operands)

    def scores(self, operands: Operands, shape: BlockShape) -> Tensor:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.scores`."""
        return block_mass(self.features(operands), operands, shape).log()

    def write_scores(
        self, operands: Operands, shape: BlockShape, out: Tensor, *, with_similarity: bool = False
    ) -> Tensor | None:
        """See :meth:`~afbs_compile.kernels.policies.base.Policy.write_scores`."""
        from afbs_compile.kernels.policies.triton import grouped  # Triton is not installed everywhere.

        if operands.mask.band(operands.q_len, operands.k_len) is None:
            return super().write_scores(operands, shape, out)
        grouped.write_log_mass(self.features_on_gpu(operands), operands, shape, out)
        return None


def block_mass(features: Features, operands: Operands, shape: BlockShape) -> Tensor:
    """Mass of every key block, fp32 ``[B, H, n_q, n_k]``; rows sum to 1, or to less where groups see nothing.

    Args:
        features: of the call; operands: whose lengths and masks say what a query group sees.
        shape: tokens per block.
    """
    grid, heads = operands.grid(shape), features.q.shape[1]
    groups_q, groups_k = block_count(grid.q_len, GROUP), block_count(grid.k_len, features.span)
    rows = _grouped(features.q, groups_q, features.parts, features.reverse)
    cols = _grouped(features.k, groups_k, features.parts, False).repeat_interleave(heads // features.k.shape[1], 1)
    per_q, per_k = shape.q // GROUP, shape.k // features.span
    count_q, count_k = grid.count_q, grid.count_k
    mass = rows.new_zeros(*rows.shape[:2], count_q, count_k)
    for blocks in chunks(count_q, max(1, LOGITS_AT_ONCE // (heads * groups_k * per_q))):
        part = slice(blocks.start * per_q, min(blocks.stop * per_q, groups_q))
        logits = capped(rows[:, :, part] @ cols.transpose(-1, -2) * features.scale, operands.softcap)
        weights = _softmax(logits, *_seen_by_groups(features, operands, shape, part))
        groups = part.stop - part.start
        weights = torch.nn.functional.pad(weights, (0, count_k * per_k - groups_k, 0, -groups % per_q))
        summed = weights.unflatten(-1, (count_k, per_k)).sum(-1).unflatten(-2, (-1, per_q)).sum(-2)
        mass[:, :, blocks] = summed
    # The last query block may have fewer groups.
    sizes = torch.full((count_q, 1), per_q, device=mass.device)
    sizes[-1] = groups_q - (count_q - 1) * per_q
    return mass / sizes


def _softmax(logits: Tensor, seen: Tensor | None, bias: Tensor | None) -> Tensor:
    """Over the groups that are seen; 0 where none is."""
    if bias is not None:
        logits = logits + bias
    if seen is None:
        return logits.softmax(-1)
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    nothing = ~seen.any(-1, keepdim=True)
    return weights.masked_fill(nothing, 0.0) if nothing.any() else weights


def _seen_by_groups(
    features: Features, operands: Operands, shape: BlockShape, part: slice
) -> tuple[Tensor | None, Tensor | None]:
    """Which key groups some query groups see, broadcastable to the logits, and what is added to these.

    The last row that a query group is told of decides. By the formula it sees a key group whose first key it sees, if
    any of the group is valid; by a dense mask one of which it sees any. Key groups of blurred blocks nobody sees.

    Returns:
        ``None`` for either where everything is seen, and where nothing is added.
    """
    if operands.by_formula and operands.mask.hides_nothing:
        return None, None
    grid, span, device = operands.grid(shape), features.span, operands.device
    tokens = torch.arange(part.start, part.stop, device=device) * GROUP + features.last
    groups_k = block_count(grid.k_len, span)
    bias = None
    if operands.attn_mask is None:
        keys = torch.arange(groups_k, device=device) * span
        seen = operands.mask.sees(tokens[:, None] + operands.offset, keys)[None, None]
        if operands.valid is not None:
            seen = seen & valid_blocks(operands.valid, span)[0][:, None, None, :]
    else:
        rows = tokens.clamp_max(grid.q_len - 1)
        by_key = seen_by_rows(operands, rows)
        seen = _spans(by_key, span, value=False).any(-1)
        if operands.has_bias:
            given = of_rows(operands.attn_mask, rows).float().masked_fill(~by_key, -math.inf)
            counts = _spans(by_key, span, value=False).sum(-1)
            bias = _spans(given, span, value=-math.inf).logsumexp(-1) - counts.clamp_min(1).log()
    blurred = sight_of(operands, shape).blurred
    if blurred.any():
        blocks = torch.arange(part.start, part.stop, device=device) // (shape.q // GROUP)
        seen = seen & ~blurred[:, :, blocks].repeat_interleave(shape.k // span, 3)[..., :groups_k]
    return seen, bias


def _spans(x: Tensor, span: int, *, value: float) -> Tensor:
    """``[.., k]`` as ``[.., groups, span]``."""
    padded: Tensor = torch.nn.functional.pad(x, (0, -x.shape[-1] % span), value=value).unflatten(-1, (-1, span))
    return padded


def _grouped(x: Tensor, groups: int, parts: int, reverse: bool) -> Tensor:
    """fp32 ``[B, H, groups, parts * D]``."""
    x = torch.nn.functional.pad(x.float(), (0, 0, 0, groups * parts - x.shape[2])).unflatten(2, (groups, parts))
    return (x.flip(3) if reverse else x).flatten(3)
