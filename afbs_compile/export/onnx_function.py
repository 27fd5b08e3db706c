"""``afbs::SparseAttention`` in standard ONNX operators: the bodies that let any runtime run the node without us.

The bodies follow :mod:`afbs_compile.kernels.reference` line by line, in fp32 and in its order of operations, so that
they select the same blocks: ``BlockStatistics`` is ``block_statistics``, ``SelectByMass`` is ``select_blocks``,
``PredictMask`` is ``predict_mask``. ``SparseAttention`` walks over batch, heads and query blocks, gathers the live key
blocks of each, and attends to those alone: what is not live is not computed, and no N x N tensor exists. ``lam`` is
carried for runtimes with a kernel of their own; like the CPU engine, the body skips no product with V, which is never
less accurate. Heads with the policy ``meanshare`` select by ``SelectByShare``: the attribute ``share`` says which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN, NAME, VERSION = "afbs", "SparseAttention", 1

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

REPEAT_HEADS = """
RepeatHeads (x, groups) => (repeated)
{
    # [B, H_kv, n, m] -> [B, H_kv * groups, n, m], each head next to its copies
    two = Constant <value = int64[1] {2}> ()
    one = Constant <value = int64[1] {1}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    batch = Shape <start = 0, end = 1> (x)
    heads = Shape <start = 1, end = 2> (x)
    rest = Shape <start = 2, end = 4> (x)
    wide = Unsqueeze (x, two)
    wide_shape = Concat <axis = 0> (batch, heads, groups, rest)
    copies = Expand (wide, wide_shape)
    shape = Concat <axis = 0> (batch, minus_one, rest)
    repeated = Reshape (copies, shape)
}
"""

SELECT_BY_MASS = """
SelectByMass (probability, tau) => (keep)
{
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    last_axis = Constant <value = int64 {-1}> ()
    last_axis1 = Constant <value = int64[1] {-1}> ()
    count = Shape <start = 3, end = 4> (probability)
    ordered, order = TopK <axis = -1, largest = 1, sorted = 1> (probability, count)
    # the mass of strictly earlier blocks; summed in double as PyTorch does
    ordered_double = Cast <to = 11> (ordered)
    running_double = CumSum (ordered_double, last_axis)
    running = Cast <to = 1> (running_double)
    before = Sub (running, ordered)
    reached = GreaterOrEqual (before, tau)
    needed = Not (reached)
    needed_int = Cast <to = 7> (needed)
    kept = ReduceSum <keepdims = 1> (needed_int, last_axis1)
    last = Sub (kept, one)
    place = Max (last, zero)
    threshold = GatherElements <axis = -1> (ordered, place)
    below = Less (probability, threshold)
    enough = Not (below)
    some = Greater (kept, zero)
    keep = And (enough, some)
}
"""

SELECT_BY_SHARE = """
SelectByShare (probability, candidates, tau) => (keep)
{
    # p * sqrt(n) > (1 - tau) / tau   <=>   tau > 1 / (1 + p * sqrt(n)); a row with NaN keeps everything
    key_axis = Constant <value = int64[1] {-1}> ()
    zero = Constant <value = int64 {0}> ()
    one_float = Constant <value = float {1}> ()
    below_one = Constant <value = float {0.99999994}> ()
    candidates_float = Cast <to = 1> (candidates)
    count = ReduceSum <keepdims = 1> (candidates_float, key_axis)
    root = Sqrt (count)
    strength = Mul (probability, root)
    odds = Add (strength, one_float)
    inverse = Div (one_float, odds)
    level = Min (inverse, below_one)
    limit = Min (tau, one_float)
    strong = Less (level, limit)
    unknown = IsNaN (strength)
    unknown_int = Cast <to = 7> (unknown)
    unknown_count = ReduceSum <keepdims = 1> (unknown_int, key_axis)
    unknown_row = Greater (unknown_count, zero)
    keep = Or (strong, unknown_row)
}
"""

PREDICT_MASK = """
PredictMask <tau, theta, share, is_causal, scale, block_q, block_k, min_length>
    (q, k) => (live)
{
    head_axes = Constant <value = int64[2] {1, 2}> ()
    row_axis = Constant <value = int64[1] {-2}> ()
    key_axis = Constant <value = int64[1] {-1}> ()
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    lowest = Constant <value = float {-inf}> ()
    zero_float = Constant <value = float {0}> ()
    one_float = Constant <value = float {1}> ()
    tiny = Constant <value = float {1.17549435e-38}> ()
    tau_flat = Constant <value_floats: floats = @tau> ()
    theta_flat = Constant <value_floats: floats = @theta> ()
    tau3 = Unsqueeze (tau_flat, head_axes)
    theta3 = Unsqueeze (theta_flat, head_axes)
    scaling = Constant <value_float: float = @scale> ()
    size_q = Constant <value_int: int = @block_q> ()
    size_k = Constant <value_int: int = @block_k> ()
    causal_int = Constant <value_int: int = @is_causal> ()
    causal = Cast <to = 9> (causal_int)
    any_key = Not (causal)
    heads = Shape <start = 1, end = 2> (q)
    kv_heads = Shape <start = 1, end = 2> (k)
    groups = Div (heads, kv_heads)

    mean_q, similarity_q = afbs.BlockStatistics <block: int = @block_q> (q)
    mean_kv, similarity_kv = afbs.BlockStatistics <block: int = @block_k> (k)
    mean_k = afbs.RepeatHeads (mean_kv, groups)
    similarity_rows = Unsqueeze (similarity_kv, row_axis)
    similarity_k = afbs.RepeatHeads (similarity_rows, groups)
    similarity_columns = Unsqueeze (similarity_q, key_axis)
    coherent_k = GreaterOrEqual (similarity_k, theta3)
    coherent_q = GreaterOrEqual (similarity_columns, theta3)

    # visible: some row of the query block may attend some key; diagonal: the blocks share rows
    count_q1 = Shape <start = 2, end = 3> (mean_q)
    count_k1 = Shape <start = 2, end = 3> (mean_k)
    count_q = Squeeze (count_q1)
    count_k = Squeeze (count_k1)
    index_q = Range (zero, count_q, one)
    index_k = Range (zero, count_k, one)
    first_q_flat = Mul (index_q, size_q)
    first_q = Unsqueeze (first_q_flat, key_axis)
    first_k = Mul (index_k, size_k)
    end_q = Add (first_q, size_q)
    end_k = Add (first_k, size_k)
    begins_before = Less (first_k, end_q)
    ends_after = Less (first_q, end_k)
    diagonal = And (begins_before, ends_after)
    visible = Or (begins_before, any_key)

    # softmax of the pooled scores over the candidates, -inf first
    candidates = And (visible, coherent_k)
    mean_k_columns = Transpose <perm = [0, 1, 3, 2]> (mean_k)
    products = MatMul (mean_q, mean_k_columns)
    pooled = Mul (products, scaling)
    scores = Where (candidates, pooled, lowest)
    peak = ReduceMax <keepdims = 1> (scores, key_axis)
    hopeless = Equal (peak, lowest)
    peak_safe = Where (hopeless, zero_float, peak)
    shifted = Sub (scores, peak_safe)
    weights = Exp (shifted)
    total = ReduceSum <keepdims = 1> (weights, key_axis)
    total_safe = Max (total, tiny)
    probability = Div (weights, total_safe)
    by_mass = afbs.SelectByMass (probability, tau3)
    by_share = afbs.SelectByShare (probability, candidates, tau3)
    share_flat = Constant <value_ints: ints = @share> ()
    share3 = Unsqueeze (share_flat, head_axes)
    is_share = Cast <to = 9> (share3)
    is_mass = Not (is_share)
    chosen_share = And (is_share, by_share)
    chosen_mass = And (is_mass, by_mass)
    selected = Or (chosen_share, chosen_mass)

    chosen = And (selected, coherent_k)
    incoherent_k = Not (coherent_k)
    incoherent_q = Not (coherent_q)
    keep_all = GreaterOrEqual (tau3, one_float)
    length = Shape <start = 2, end = 3> (q)
    shortest = Constant <value_int: int = @min_length> ()
    short = Less (length, shortest)
    kept_1 = Or (chosen, incoherent_k)
    kept_2 = Or (kept_1, incoherent_q)
    kept_3 = Or (kept_2, keep_all)
    kept_4 = Or (kept_3, diagonal)
    kept_5 = Or (kept_4, short)
    live = And (kept_5, visible)
}
"""

IN_BLOCKS = """
InBlocks <block> (x) => (blocks)
{
    # [B, H, N, D] -> [B * H * n, block, D], zeros after the last row
    size = Constant <value_int: int = @block> ()
    one = Constant <value = int64 {1}> ()
    shape1 = Constant <value = int64[1] {1}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    zeros = Constant <value = int64[6] {0, 0, 0, 0, 0, 0}> ()
    no_end = Constant <value = int64[1] {0}> ()
    length1 = Shape <start = 2, end = 3> (x)
    dim1 = Shape <start = 3, end = 4> (x)
    length = Squeeze (length1)
    less = Sub (length, one)
    whole = Div (less, size)
    count = Add (whole, one)
    covered = Mul (count, size)
    missing = Sub (covered, length)
    missing1 = Reshape (missing, shape1)
    pads = Concat <axis = 0> (zeros, missing1, no_end)
    padded = Pad (x, pads)
    size1 = Reshape (size, shape1)
    shape = Concat <axis = 0> (minus_one, size1, dim1)
    blocks = Reshape (padded, shape)
}
"""

SPARSE_ATTENTION = """
SparseAttention <tau, theta, lam, policy, share, is_causal, scale, block_q, block_k, min_length, predictor_version>
    (q, k, v) => (out)
{
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    shape1 = Constant <value = int64[1] {1}> ()
    zero1 = Constant <value = int64[1] {0}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    row_axis = Constant <value = int64[1] {2}> ()
    key_axis = Constant <value = int64[1] {-1}> ()
    lowest = Constant <value = float {-inf}> ()
    size_q = Constant <value_int: int = @block_q> ()
    size_k = Constant <value_int: int = @block_k> ()
    causal_int = Constant <value_int: int = @is_causal> ()
    causal = Cast <to = 9> (causal_int)
    any_key = Not (causal)
    scaling = Constant <value_float: float = @scale> ()
    q32 = Cast <to = 1> (q)
    k32 = Cast <to = 1> (k)
    v32 = Cast <to = 1> (v)

    live = afbs.PredictMask <tau: floats = @tau, theta: floats = @theta, share: ints = @share,
        is_causal: int = @is_causal, scale: float = @scale, block_q: int = @block_q, block_k: int = @block_k,
        min_length: int = @min_length>
        (q32, k32)
    count_q1 = Shape <start = 2, end = 3> (live)
    count_k1 = Shape <start = 3, end = 4> (live)
    count_q = Squeeze (count_q1)
    count_k = Squeeze (count_k1)
    live_shape = Concat <axis = 0> (minus_one, count_k1)
    live_rows = Reshape (live, live_shape)
    q_scaled = Mul (q32, scaling)
    q_blocks = afbs.InBlocks <block: int = @block_q> (q_scaled)
    k_blocks = afbs.InBlocks <block: int = @block_k> (k32)
    v_blocks = afbs.InBlocks <block: int = @block_k> (v32)
    dim1 = Shape <start = 3, end = 4> (q)
    keys_shape = Concat <axis = 0> (minus_one, dim1)
    heads1 = Shape <start = 1, end = 2> (q)
    kv_heads1 = Shape <start = 1, end = 2> (k)
    length1 = Shape <start = 2, end = 3> (q)
    heads = Squeeze (heads1)
    kv_heads = Squeeze (kv_heads1)
    length = Squeeze (length1)
    groups = Div (heads, kv_heads)
    rows_in_block = Range (zero, size_q, one)
    keys_in_block = Range (zero, size_k, one)
    places1 = Shape <start = 0, end = 1> (live_rows)
    places = Squeeze (places1)
    always = Constant <value = bool {1}> ()

    # one step for each batch element, head and block of query rows: attend to its live key blocks
    out_blocks = Loop (places, always)
    <body = attend (int64 place, bool more) => (bool again, float[rows, dim] attended)
    {
        again = Identity (always)
        block = Mod (place, count_q)
        batch_head = Div (place, count_q)
        batch = Div (batch_head, heads)
        head = Mod (batch_head, heads)
        kv_head = Div (head, groups)
        batch_first = Mul (batch, kv_heads)
        batch_kv_head = Add (batch_first, kv_head)
        first_block = Mul (batch_kv_head, count_k)
        queries = Gather (q_blocks, place)
        is_live = Gather (live_rows, place)
        found = NonZero (is_live)
        blocks = Squeeze (found, zero1)
        gathered = Add (blocks, first_block)
        keys_3d = Gather (k_blocks, gathered)
        values_3d = Gather (v_blocks, gathered)
        keys = Reshape (keys_3d, keys_shape)
        values = Reshape (values_3d, keys_shape)
        raw_scores = Gemm <transB = 1> (queries, keys)
        # -inf where the key lies after the row, or after the end
        first_row = Mul (block, size_q)
        rows_flat = Add (rows_in_block, first_row)
        row = Unsqueeze (rows_flat, key_axis)
        first_keys_flat = Mul (blocks, size_k)
        first_keys = Unsqueeze (first_keys_flat, key_axis)
        keys_2d = Add (first_keys, keys_in_block)
        key = Reshape (keys_2d, minus_one)
        exists = Less (key, length)
        not_after = LessOrEqual (key, row)
        may_attend = Or (not_after, any_key)
        allowed = And (may_attend, exists)
        scores = Where (allowed, raw_scores, lowest)
        weights = Softmax <axis = -1> (scores)
        attended = MatMul (weights, values)
    }>
    batch_heads = Shape <start = 0, end = 2> (q)
    out_shape = Concat <axis = 0> (batch_heads, minus_one, dim1)
    out_padded = Reshape (out_blocks, out_shape)
    out32 = Slice (out_padded, zero1, length1, row_axis)
    out = CastLike (out32, q)
}
"""

BODIES = (
    BLOCK_STATISTICS, REPEAT_HEADS, SELECT_BY_MASS, SELECT_BY_SHARE, PREDICT_MASK, IN_BLOCKS, SPARSE_ATTENTION,
)  # fmt: skip


def function_protos(opset: int) -> list[onnx.FunctionProto]:
    """The functions that a model with ``afbs::SparseAttention`` nodes carries.

    Args:
        opset: version of the standard operators that the model imports, 18 to 23.
    """
    import onnx.parser

    header = f'<opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">'
    functions = []
    for body in BODIES:
        text = "\n".join(line for line in body.splitlines() if not line.strip().startswith("#"))
        functions.append(onnx.parser.parse_function(header + text))
    return functions
