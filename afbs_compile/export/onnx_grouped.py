"""Policies by groups of 16 tokens, in standard ONNX operators: :mod:`afbs_compile.kernels.policies.grouped`.

``KeepByCumulant`` is ``cumulant``, ``KeepByAntidiagonal`` is ``antidiagonal``, ``KeepBySlash`` is ``vertical_slash``.
The coarse attention is computed for one query block at a time, so that nothing grows with the square of the length but
the block mask.
"""

from __future__ import annotations

BLOCK_MASS = """
BlockMass <is_causal, block_q, block_k, span, last> (rows, cols, length, scaling) => (mass)
{
    # rows [B, H, groups of queries, F], cols [B, H, groups of keys, F] -> [B, H, n_q, n_k], which sums to 1 over n_k
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    group = Constant <value = int64 {16}> ()
    shape1 = Constant <value = int64[1] {1}> ()
    column = Constant <value = int64[1] {-1}> ()
    row_axis = Constant <value = int64[1] {-2}> ()
    key_axis = Constant <value = int64[1] {-1}> ()
    zeros = Constant <value = int64[6] {0, 0, 0, 0, 0, 0}> ()
    no_end = Constant <value = int64[1] {0}> ()
    lowest = Constant <value = float {-inf}> ()
    zero_float = Constant <value = float {0}> ()
    size_q = Constant <value_int: int = @block_q> ()
    size_k = Constant <value_int: int = @block_k> ()
    span_k = Constant <value_int: int = @span> ()
    last_token = Constant <value_int: int = @last> ()
    causal_int = Constant <value_int: int = @is_causal> ()
    causal = Cast <to = 9> (causal_int)
    any_key = Not (causal)
    always = Constant <value = bool {1}> ()

    per_q = Div (size_q, group)
    per_k = Div (size_k, span_k)
    per_q1 = Reshape (per_q, shape1)
    per_k1 = Reshape (per_k, shape1)
    less = Sub (length, one)
    whole_q = Div (less, size_q)
    whole_k = Div (less, size_k)
    count_q = Add (whole_q, one)
    count_k = Add (whole_k, one)
    count_q1 = Reshape (count_q, shape1)
    count_k1 = Reshape (count_k, shape1)
    groups_q1 = Shape <start = 2, end = 3> (rows)
    groups_k1 = Shape <start = 2, end = 3> (cols)
    groups_q = Squeeze (groups_q1)
    groups_k = Squeeze (groups_k1)
    batch_heads = Shape <start = 0, end = 2> (rows)
    width1 = Shape <start = 3, end = 4> (rows)

    # whole blocks of groups
    covered_q = Mul (count_q1, per_q1)
    covered_k = Mul (count_k1, per_k1)
    missing_q = Sub (covered_q, groups_q1)
    missing_k = Sub (covered_k, groups_k1)
    pads_q = Concat <axis = 0> (zeros, missing_q, no_end)
    pads_k = Concat <axis = 0> (zeros, missing_k, no_end)
    rows_padded = Pad (rows, pads_q)
    cols_padded = Pad (cols, pads_k)
    rows_shape = Concat <axis = 0> (batch_heads, count_q1, per_q1, width1)
    row_blocks = Reshape (rows_padded, rows_shape)
    col_columns = Transpose <perm = [0, 1, 3, 2]> (cols_padded)
    weights_shape = Concat <axis = 0> (batch_heads, per_q1, count_k1, per_k1)
    end_k = Squeeze (covered_k)
    key_groups = Range (zero, end_k, one)
    key_exists = Less (key_groups, groups_k)
    first_tokens = Mul (key_groups, span_k)
    groups_in_block = Range (zero, per_q, one)

    mass_blocks = Loop (count_q, always)
    <body = look (int64 block, bool more) => (bool again, float[?, ?, ?] of_block)
    {
        again = Identity (always)
        row_block = Gather <axis = 2> (row_blocks, block)
        products = MatMul (row_block, col_columns)
        logits = Mul (products, scaling)
        # key group b is seen by query group a when b * span <= a * 16 + last
        first_group = Mul (block, per_q)
        query_groups_flat = Add (groups_in_block, first_group)
        query_groups = Unsqueeze (query_groups_flat, column)
        group_tokens = Mul (query_groups, group)
        last_tokens = Add (group_tokens, last_token)
        not_after = LessOrEqual (first_tokens, last_tokens)
        may_see = Or (not_after, any_key)
        seen = And (may_see, key_exists)
        masked = Where (seen, logits, lowest)
        all_weights = Softmax <axis = -1> (masked)
        # the last query block may have fewer groups
        query_exists = Less (query_groups, groups_q)
        weights_flat = Where (query_exists, all_weights, zero_float)
        weights = Reshape (weights_flat, weights_shape)
        by_group = ReduceSum <keepdims = 0> (weights, key_axis)
        total = ReduceSum <keepdims = 0> (by_group, row_axis)
        left = Sub (groups_q, first_group)
        size_int = Min (left, per_q)
        size = Cast <to = 1> (size_int)
        of_block = Div (total, size)
    }>
    mass = Transpose <perm = [1, 2, 0, 3]> (mass_blocks)
}
"""

IN_GROUPS = """
InGroups (x) => (groups, length)
{
    # [B, H, N, D] -> [B, H, ceil(N / 16), 16, D], zeros after the last row
    group1 = Constant <value = int64[1] {16}> ()
    one1 = Constant <value = int64[1] {1}> ()
    zeros = Constant <value = int64[6] {0, 0, 0, 0, 0, 0}> ()
    no_end = Constant <value = int64[1] {0}> ()
    batch_heads = Shape <start = 0, end = 2> (x)
    length1 = Shape <start = 2, end = 3> (x)
    dim1 = Shape <start = 3, end = 4> (x)
    length = Squeeze (length1)
    less = Sub (length1, one1)
    whole = Div (less, group1)
    count1 = Add (whole, one1)
    covered = Mul (count1, group1)
    missing = Sub (covered, length1)
    pads = Concat <axis = 0> (zeros, missing, no_end)
    padded = Pad (x, pads)
    shape = Concat <axis = 0> (batch_heads, count1, group1, dim1)
    groups = Reshape (padded, shape)
}
"""

GROUP_MOMENTS = """
GroupMoments (x) => (mean, variance)
{
    # of each coordinate over each group; the last group may have fewer tokens
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    group = Constant <value = int64 {16}> ()
    column = Constant <value = int64[1] {-1}> ()
    row_axis = Constant <value = int64[1] {-2}> ()
    rows, length = afbs.InGroups (x)
    first = Range (zero, length, group)
    left = Sub (length, first)
    sizes_int = Min (left, group)
    sizes_flat = Cast <to = 1> (sizes_int)
    sizes = Unsqueeze (sizes_flat, column)
    sum = ReduceSum <keepdims = 1> (rows, row_axis)
    sizes_wide = Unsqueeze (sizes, row_axis)
    mean_wide = Div (sum, sizes_wide)
    mean = Squeeze (mean_wide, row_axis)
    places = Range (zero, group, one)
    left_columns = Unsqueeze (left, column)
    inside_flat = Less (places, left_columns)
    inside_bool = Unsqueeze (inside_flat, column)
    inside = Cast <to = 1> (inside_bool)
    centred = Sub (rows, mean_wide)
    spread = Mul (centred, inside)
    squares = Mul (spread, spread)
    square_sum = ReduceSum <keepdims = 0> (squares, row_axis)
    variance = Div (square_sum, sizes)
}
"""

KEEP_BY_CUMULANT = """
KeepByCumulant <scale, is_causal, block_q, block_k> (q, k, heads, tau, visible) => (keep)
{
    scaling = Constant <value_float: float = @scale> ()
    one = Constant <value = float {1}> ()
    two = Constant <value = float {2}> ()
    length1 = Shape <start = 2, end = 3> (q)
    length = Squeeze (length1)
    q_mine = Gather <axis = 1> (q, heads)
    mean_q, unused = afbs.GroupMoments (q_mine)
    mean_k, variance_k = afbs.GroupMoments (k)
    # logit_ab = <scale mean_q, mean_k> + <(scale mean_q)^2 / 2, var_k>
    scaled = Mul (mean_q, scaling)
    squared = Mul (scaled, scaled)
    half = Div (squared, two)
    rows = Concat <axis = -1> (scaled, half)
    cols_kv = Concat <axis = -1> (mean_k, variance_k)
    key_heads = afbs.KeyHeads (q, k, heads)
    cols = Gather <axis = 1> (cols_kv, key_heads)
    mass = afbs.BlockMass <is_causal: int = @is_causal, block_q: int = @block_q, block_k: int = @block_k,
        span = 16, last = 15> (rows, cols, length, one)
    scores = Log (mass)
    probability = afbs.BlockProbability (scores, visible)
    tau_mine = Gather <axis = 0> (tau, heads)
    keep = afbs.SelectByShare (probability, visible, tau_mine)
}
"""

KEEP_BY_ANTIDIAGONAL = """
KeepByAntidiagonal <scale, is_causal, block_q, block_k> (q, k, heads, tau, visible) => (keep)
{
    # logit_ab = scale / 16 * sum_t <q[a 16 + 15 - t], k[b 16 + t]>
    scale_flat = Constant <value_float: float = @scale> ()
    sixteen = Constant <value = float {16}> ()
    scaling = Div (scale_flat, sixteen)
    backwards = Constant <value = int64[16] {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}> ()
    row_shape = Constant <value = int64[4] {0, 0, 0, -1}> ()
    q_mine = Gather <axis = 1> (q, heads)
    q_groups, length = afbs.InGroups (q_mine)
    k_groups, same_length = afbs.InGroups (k)
    q_reversed = Gather <axis = 3> (q_groups, backwards)
    rows = Reshape (q_reversed, row_shape)
    cols_kv = Reshape (k_groups, row_shape)
    key_heads = afbs.KeyHeads (q, k, heads)
    cols = Gather <axis = 1> (cols_kv, key_heads)
    mass = afbs.BlockMass <is_causal: int = @is_causal, block_q: int = @block_q, block_k: int = @block_k,
        span = 16, last = 15> (rows, cols, length, scaling)
    scores = Log (mass)
    probability = afbs.BlockProbability (scores, visible)
    tau_mine = Gather <axis = 0> (tau, heads)
    keep = afbs.SelectByMass (probability, tau_mine)
}
"""

WITH_PREVIOUS = """
WithPrevious <block_q, block_k> (mass) => (total)
{
    # plus half of what the query block before saw in the same column, and half of what it saw at the same distance
    half = Constant <value = float {0.5}> ()
    one1 = Constant <value = int64[1] {1}> ()
    starts = Constant <value = int64[2] {0, 0}> ()
    axes = Constant <value = int64[2] {2, 3}> ()
    no_start = Constant <value = int64[2] {0, 0}> ()
    no_end = Constant <value = int64[4] {0, 0, 0, 0}> ()
    zero1 = Constant <value = int64[1] {0}> ()
    size_q = Constant <value_int: int = @block_q> ()
    size_k = Constant <value_int: int = @block_k> ()
    step = Div (size_q, size_k)
    step1 = Reshape (step, one1)
    counts = Shape <start = 2, end = 4> (mass)
    half_mass = Mul (mass, half)
    down = Concat <axis = 0> (no_start, one1, zero1, no_end)
    column_padded = Pad (half_mass, down)
    same_column = Slice (column_padded, starts, counts, axes)
    down_and_right = Concat <axis = 0> (no_start, one1, step1, no_end)
    slash_padded = Pad (half_mass, down_and_right)
    same_distance = Slice (slash_padded, starts, counts, axes)
    with_column = Add (mass, same_column)
    total = Add (with_column, same_distance)
}
"""

KEEP_BY_SLASH = """
KeepBySlash <scale, is_causal, block_q, block_k> (q, k, heads, tau, visible) => (keep)
{
    # the first query of every group against every key that it sees
    scaling = Constant <value_float: float = @scale> ()
    start = Constant <value = int64[1] {0}> ()
    row_axis = Constant <value = int64[1] {2}> ()
    group1 = Constant <value = int64[1] {16}> ()
    length1 = Shape <start = 2, end = 3> (q)
    length = Squeeze (length1)
    q_mine = Gather <axis = 1> (q, heads)
    rows = Slice (q_mine, start, length1, row_axis, group1)
    key_heads = afbs.KeyHeads (q, k, heads)
    cols = Gather <axis = 1> (k, key_heads)
    mass = afbs.BlockMass <is_causal: int = @is_causal, block_q: int = @block_q, block_k: int = @block_k,
        span = 1, last = 0> (rows, cols, length, scaling)
    total = afbs.WithPrevious <block_q: int = @block_q, block_k: int = @block_k> (mass)
    scores = Log (total)
    probability = afbs.BlockProbability (scores, visible)
    tau_mine = Gather <axis = 0> (tau, heads)
    keep = afbs.SelectByMass (probability, tau_mine)
}
"""

GROUPED = (
    BLOCK_MASS, IN_GROUPS, GROUP_MOMENTS, KEEP_BY_CUMULANT, KEEP_BY_ANTIDIAGONAL, WITH_PREVIOUS, KEEP_BY_SLASH,
)  # fmt: skip
