"""Which key blocks each query block attends, in standard ONNX operators: ``PredictMask``, block means and distances.

``KeepByMeans`` is ``meansim`` and ``meanshare``, ``KeepByWindow`` is ``sink_window``; the other policies are in
:mod:`afbs_compile.export.onnx_grouped`. Only what some head of a call uses is computed: a head goes to the predictor
of its policy, a predictor without heads is the branch not taken of an ``If`` whose condition is a constant of the call,
and a head with ``tau >= 1`` goes to none.
"""

from __future__ import annotations

BLOCK_STATISTICS = """
BlockStatistics <block> (x) => (mean, similarity)
{
    size = Constant <value_int: int = @block> ()
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    tiny = Constant <value = float {1.17549435e-38}> ()
    row_axis = Constant <value = int64[1] {-2}> ()
    dim_axis = Constant <value = int64[1] {-1}> ()
    zeros = Constant <value = int64[6] {0, 0, 0, 0, 0, 0}> ()
    no_end = Constant <value = int64[1] {0}> ()
    batch_heads = Shape <start = 0, end = 2> (x)
    length1 = Shape <start = 2, end = 3> (x)
    dim1 = Shape <start = 3, end = 4> (x)
    length = Squeeze (length1)
    # count = ceil(length / block); the last block may be partial
    less = Sub (length, one)
    whole = Div (less, size)
    count = Add (whole, one)
    covered = Mul (count, size)
    missing = Sub (covered, length)
    shape1 = Constant <value = int64[1] {1}> ()
    missing1 = Reshape (missing, shape1)
    pads = Concat <axis = 0> (zeros, missing1, no_end)
    padded = Pad (x, pads)
    count1 = Reshape (count, shape1)
    size1 = Reshape (size, shape1)
    block_shape = Concat <axis = 0> (batch_heads, count1, size1, dim1)
    rows = Reshape (padded, block_shape)
    starts = Range (zero, covered, size)
    left = Sub (length, starts)
    sizes_int = Min (left, size)
    sizes_flat = Cast <to = 1> (sizes_int)
    sizes = Unsqueeze (sizes_flat, dim_axis)
    total = ReduceSum <keepdims = 0> (rows, row_axis)
    mean = Div (total, sizes)
    # unit = (x / max|x|) / ||x / max|x|||
    magnitude = Abs (rows)
    largest = ReduceMax <keepdims = 1> (magnitude, dim_axis)
    largest_safe = Max (largest, tiny)
    scaled = Div (rows, largest_safe)
    squares = Mul (scaled, scaled)
    norm_squared = ReduceSum <keepdims = 1> (squares, dim_axis)
    norm = Sqrt (norm_squared)
    norm_safe = Max (norm, tiny)
    unit = Div (scaled, norm_safe)
    # mean pairwise cosine = ||mean of unit rows||^2
    unit_total = ReduceSum <keepdims = 0> (unit, row_axis)
    unit_mean = Div (unit_total, sizes)
    unit_squares = Mul (unit_mean, unit_mean)
    similarity = ReduceSum <keepdims = 0> (unit_squares, dim_axis)
}
"""

KEY_HEADS = """
KeyHeads (q, k, heads) => (key_heads)
{
    # the key heads that query heads attend
    count_q = Shape <start = 1, end = 2> (q)
    count_k = Shape <start = 1, end = 2> (k)
    groups = Div (count_q, count_k)
    key_heads = Div (heads, groups)
}
"""

KEEP_BY_MEANS = """
KeepByMeans <theta, policy_code, scale, block_q, block_k> (q, k, heads, tau, visible) => (keep)
{
    head_axes = Constant <value = int64[2] {1, 2}> ()
    row_axis = Constant <value = int64[1] {-2}> ()
    key_axis = Constant <value = int64[1] {-1}> ()
    code_of_share = Constant <value = int64 {1}> ()
    scaling = Constant <value_float: float = @scale> ()
    theta_flat = Constant <value_floats: floats = @theta> ()
    theta_mine = Gather <axis = 0> (theta_flat, heads)
    theta3 = Unsqueeze (theta_mine, head_axes)
    code_flat = Constant <value_ints: ints = @policy_code> ()
    code_mine = Gather <axis = 0> (code_flat, heads)
    code3 = Unsqueeze (code_mine, head_axes)
    is_share = Equal (code3, code_of_share)
    is_mass = Not (is_share)
    tau_mine = Gather <axis = 0> (tau, heads)

    q_mine = Gather <axis = 1> (q, heads)
    mean_q, similarity_q = afbs.BlockStatistics <block: int = @block_q> (q_mine)
    mean_kv, similarity_kv = afbs.BlockStatistics <block: int = @block_k> (k)
    key_heads = afbs.KeyHeads (q, k, heads)
    mean_k = Gather <axis = 1> (mean_kv, key_heads)
    similarity_k = Gather <axis = 1> (similarity_kv, key_heads)
    # theta belongs to the rule by mass
    similarity_rows = Unsqueeze (similarity_k, row_axis)
    similarity_columns = Unsqueeze (similarity_q, key_axis)
    similar_k = GreaterOrEqual (similarity_rows, theta3)
    similar_q = GreaterOrEqual (similarity_columns, theta3)
    coherent_k = Or (similar_k, is_share)
    coherent_q = Or (similar_q, is_share)

    candidates = And (visible, coherent_k)
    mean_k_columns = Transpose <perm = [0, 1, 3, 2]> (mean_k)
    products = MatMul (mean_q, mean_k_columns)
    pooled = Mul (products, scaling)
    probability = afbs.BlockProbability (pooled, candidates)
    by_mass = afbs.SelectByMass (probability, tau_mine)
    by_share = afbs.SelectByShare (probability, candidates, tau_mine)
    chosen_share = And (is_share, by_share)
    chosen_mass = And (is_mass, by_mass)
    selected = Or (chosen_share, chosen_mass)
    chosen = And (selected, coherent_k)
    incoherent_k = Not (coherent_k)
    incoherent_q = Not (coherent_q)
    kept = Or (chosen, incoherent_k)
    keep = Or (kept, incoherent_q)
}
"""

KEEP_BY_WINDOW = """
KeepByWindow <block_q, block_k> (q, heads, tau, visible) => (keep)
{
    # strength = 1024 / distance, infinite for the first block; distance: tokens between the blocks' nearest rows
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    column = Constant <value = int64[1] {-1}> ()
    log_window = Constant <value = float {6.93147182}> ()
    infinite = Constant <value = float {inf}> ()
    lowest = Constant <value = float {-inf}> ()
    size_q = Constant <value_int: int = @block_q> ()
    size_k = Constant <value_int: int = @block_k> ()
    length1 = Shape <start = 2, end = 3> (q)
    length = Squeeze (length1)
    first_q_flat = Range (zero, length, size_q)
    first_q = Unsqueeze (first_q_flat, column)
    first_k = Range (zero, length, size_k)
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
    masked = Where (visible, log_strength, lowest)
    strength_2d = Exp (masked)
    batch1 = Shape <start = 0, end = 1> (q)
    number = Shape (heads)
    blocks = Shape (visible)
    shape = Concat <axis = 0> (batch1, number, blocks)
    strength = Expand (strength_2d, shape)
    tau_mine = Gather <axis = 0> (tau, heads)
    keep = afbs.SelectByStrength (strength, tau_mine)
}
"""

BLOCKS_IN_REACH = """
BlocksInReach <is_causal, block_q, block_k, last_rows: int = 0, local_keys: int = 0> (length) => (visible, kept)
{
    # visible: some row of the query block may attend some key; kept: the blocks share rows, or the key block holds keys
    # right before the query block, or the rows of the query block are among the last
    zero = Constant <value = int64 {0}> ()
    column = Constant <value = int64[1] {-1}> ()
    size_q = Constant <value_int: int = @block_q> ()
    size_k = Constant <value_int: int = @block_k> ()
    causal_int = Constant <value_int: int = @is_causal> ()
    causal = Cast <to = 9> (causal_int)
    any_key = Not (causal)
    first_q_flat = Range (zero, length, size_q)
    first_q = Unsqueeze (first_q_flat, column)
    first_k = Range (zero, length, size_k)
    end_q = Add (first_q, size_q)
    end_k = Add (first_k, size_k)
    begins_before = Less (first_k, end_q)
    local = Constant <value_int: int = @local_keys> ()
    end_near = Add (end_k, local)
    ends_after = Less (first_q, end_near)
    near = And (begins_before, ends_after)
    last = Constant <value_int: int = @last_rows> ()
    before_last = Sub (length, last)
    some_last = Greater (last, zero)
    reaches = Greater (end_q, before_last)
    whole = And (reaches, some_last)
    kept = Or (near, whole)
    visible = Or (begins_before, any_key)
}
"""

HEADS_WITH = """
HeadsWith (code, first, last, selects) => (heads, some)
{
    # the heads that select, with a policy code from first to last
    zero = Constant <value = int64 {0}> ()
    zero1 = Constant <value = int64[1] {0}> ()
    below = Less (code, first)
    above = Greater (code, last)
    outside = Or (below, above)
    inside = Not (outside)
    mine = And (inside, selects)
    found = NonZero (mine)
    heads = Squeeze (found, zero1)
    # not the size of heads, which no runtime knows before it runs: of this it drops the branch not taken when it loads
    mine_int = Cast <to = 7> (mine)
    number = ReduceSum <keepdims = 0> (mine_int)
    some = Greater (number, zero)
}
"""

PREDICT_MASK = """
PredictMask <tau, theta, policy_code, is_causal, scale, block_q, block_k, min_length, max_length, last_rows: int = 0,
    local_keys: int = 0>
    (q, k) => (live)
{
    head_axes = Constant <value = int64[2] {1, 2}> ()
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    two = Constant <value = int64 {2}> ()
    three = Constant <value = int64 {3}> ()
    four = Constant <value = int64 {4}> ()
    five = Constant <value = int64 {5}> ()
    zero1 = Constant <value = int64[1] {0}> ()
    one_float = Constant <value = float {1}> ()
    no = Constant <value = bool {0}> ()
    yes = Constant <value = bool {1}> ()
    tau_flat = Constant <value_floats: floats = @tau> ()
    code = Constant <value_ints: ints = @policy_code> ()
    tau3 = Unsqueeze (tau_flat, head_axes)
    batch1 = Shape <start = 0, end = 1> (q)
    count1 = Shape <start = 1, end = 2> (q)
    length1 = Shape <start = 2, end = 3> (q)
    count = Squeeze (count1)
    length = Squeeze (length1)
    visible, always = afbs.BlocksInReach
        <is_causal: int = @is_causal, block_q: int = @block_q, block_k: int = @block_k, last_rows: int = @last_rows,
        local_keys: int = @local_keys>
        (length)
    blocks = Shape (visible)
    none_shape = Concat <axis = 0> (batch1, zero1, blocks)
    nothing = Expand (no, none_shape)

    keeps_all = GreaterOrEqual (tau_flat, one_float)
    selects = Not (keeps_all)
    found_dense = NonZero (keeps_all)
    heads_dense = Squeeze (found_dense, zero1)
    number_dense = Shape (heads_dense)
    dense_shape = Concat <axis = 0> (batch1, number_dense, blocks)
    keep_dense = Expand (yes, dense_shape)

    heads_means, some_means = afbs.HeadsWith (code, zero, one, selects)
    keep_means = If (some_means) <
        then_branch = by_means () => (bool[?, ?, ?, ?] keep)
        {
            keep = afbs.KeepByMeans <theta: floats = @theta, policy_code: ints = @policy_code, scale: float = @scale,
                block_q: int = @block_q, block_k: int = @block_k> (q, k, heads_means, tau3, visible)
        },
        else_branch = no_means () => (bool[?, ?, ?, ?] keep) { keep = Identity (nothing) }
    >
    heads_cumulant, some_cumulant = afbs.HeadsWith (code, two, two, selects)
    keep_cumulant = If (some_cumulant) <
        then_branch = by_cumulant () => (bool[?, ?, ?, ?] keep)
        {
            keep = afbs.KeepByCumulant <scale: float = @scale, is_causal: int = @is_causal, block_q: int = @block_q,
                block_k: int = @block_k> (q, k, heads_cumulant, tau3, visible)
        },
        else_branch = no_cumulant () => (bool[?, ?, ?, ?] keep) { keep = Identity (nothing) }
    >
    heads_antidiagonal, some_antidiagonal = afbs.HeadsWith (code, three, three, selects)
    keep_antidiagonal = If (some_antidiagonal) <
        then_branch = by_antidiagonal () => (bool[?, ?, ?, ?] keep)
        {
            keep = afbs.KeepByAntidiagonal <scale: float = @scale, is_causal: int = @is_causal, block_q: int = @block_q,
                block_k: int = @block_k> (q, k, heads_antidiagonal, tau3, visible)
        },
        else_branch = no_antidiagonal () => (bool[?, ?, ?, ?] keep) { keep = Identity (nothing) }
    >
    heads_window, some_window = afbs.HeadsWith (code, four, four, selects)
    keep_window = If (some_window) <
        then_branch = by_window () => (bool[?, ?, ?, ?] keep)
        {
            keep = afbs.KeepByWindow <block_q: int = @block_q, block_k: int = @block_k> (q, heads_window, tau3, visible)
        },
        else_branch = no_window () => (bool[?, ?, ?, ?] keep) { keep = Identity (nothing) }
    >
    heads_slash, some_slash = afbs.HeadsWith (code, five, five, selects)
    keep_slash = If (some_slash) <
        then_branch = by_slash () => (bool[?, ?, ?, ?] keep)
        {
            keep = afbs.KeepBySlash <scale: float = @scale, is_causal: int = @is_causal, block_q: int = @block_q,
                block_k: int = @block_k> (q, k, heads_slash, tau3, visible)
        },
        else_branch = no_slash () => (bool[?, ?, ?, ?] keep) { keep = Identity (nothing) }
    >

    # back into the order of the heads
    order = Concat <axis = 0> (heads_dense, heads_means, heads_cumulant, heads_antidiagonal, heads_window,
        heads_slash)
    keep_parts = Concat <axis = 1> (keep_dense, keep_means, keep_cumulant, keep_antidiagonal, keep_window,
        keep_slash)
    numbers = Range (zero, count, one)
    place = ScatterElements <axis = 0> (order, order, numbers)
    keep = Gather <axis = 1> (keep_parts, place)
    shortest = Constant <value_int: int = @min_length> ()
    short = Less (length, shortest)
    longest = Constant <value_int: int = @max_length> ()
    limited = Greater (longest, zero)
    past = Greater (length, longest)
    long = And (limited, past)
    outside = Or (short, long)
    anyway = Or (always, outside)
    kept = Or (keep, anyway)
    live = And (kept, visible)
}
"""

PREDICTION = (BLOCK_STATISTICS, KEY_HEADS, KEEP_BY_MEANS, KEEP_BY_WINDOW, BLOCKS_IN_REACH, HEADS_WITH, PREDICT_MASK)
