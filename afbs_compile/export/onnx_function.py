"""``afbs::SparseAttention`` and its masked form in standard ONNX operators, so that any runtime runs them without us.

The bodies follow the plain-PyTorch specification (:mod:`afbs_compile.kernels.spec`) line by line, in fp32 and in its
order of operations, so that they select the same blocks; each policy has its own in its file. ``Attend`` walks over
batch, heads and query blocks, gathers the live key blocks of each, and attends to those alone: what is not live is not
computed, and nothing of N x N exists that was not given. ``SparseAttention`` is ``Attend`` for a mask by formula,
``MaskedSparseAttention`` also for valid keys, a dense mask, a softcap and sinks; what of these a call has not, it is
given as a tensor that changes nothing. ``lam`` is carried for runtimes with a kernel of their own; like the CPU engine,
the bodies skip no product with V, which is never less accurate. Strings cannot be compared before opset 19, so the
bodies read ``policy_code`` and four numbers where a reader or another kernel reads ``policy`` and ``mask``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from afbs_compile.export.onnx_predict import prediction
from afbs_compile.export.onnx_rules import RULES
from afbs_compile.export.onnx_sight import SIGHT

if TYPE_CHECKING:
    import onnx

DOMAIN, NAME, MASKED_NAME = "afbs", "SparseAttention", "MaskedSparseAttention"

VERSION = 3
"""Of the domain and the nodes. Version 2 had the attributes ``upper`` and ``offset`` in place of ``ahead``, ``behind``,
``chunk`` and ``at_end``, and no masked node; version 1 had ``is_causal`` in place of ``mask``, and other codes."""

FORMULA = """
Formula <ahead, behind, chunk, at_end> (q, k) => (formula)
{
    # what the bodies are told of the mask; where it is aligned at the end, the last row's own key is the last one
    one1 = Constant <value = int64[1] {1}> ()
    ahead_int = Constant <value_int: int = @ahead> ()
    behind_int = Constant <value_int: int = @behind> ()
    chunk_int = Constant <value_int: int = @chunk> ()
    at_end_int = Constant <value_int: int = @at_end> ()
    ahead_1 = Reshape (ahead_int, one1)
    behind_1 = Reshape (behind_int, one1)
    chunk_1 = Reshape (chunk_int, one1)
    q_len1 = Shape <start = 2, end = 3> (q)
    k_len1 = Shape <start = 2, end = 3> (k)
    more = Sub (k_len1, q_len1)
    shift = Mul (more, at_end_int)
    formula = Concat <axis = 0> (shift, ahead_1, behind_1, chunk_1)
}
"""

WHERE_VALID = """
WhereValid (x, valid) => (clean)
{
    # [B, H, N, D] in fp32 with zeros for keys that are not valid: what is there may be NaN
    zero = Constant <value = float {0}> ()
    outer = Constant <value = int64[2] {1, 3}> ()
    x32 = Cast <to = 1> (x)
    wide = Unsqueeze (valid, outer)
    clean = Where (wide, x32, zero)
}
"""

ATTEND = """
Attend <tau, theta, policy_code, ahead, behind, chunk, at_end, scale, softcap, dense, added, lowest, block_q, block_k,
    last_rows, local_keys, min_length, max_length> (q, k, v, valid, attn_mask, sinks) => (out)
{
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    zero1 = Constant <value = int64[1] {0}> ()
    one1 = Constant <value = int64[1] {1}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    outer = Constant <value = int64[2] {0, 1}> ()
    row_axis = Constant <value = int64[1] {2}> ()
    key_axis = Constant <value = int64[1] {-1}> ()
    hides = Constant <value = float {-inf}> ()
    nothing = Constant <value = float {0}> ()
    least32 = Constant <value = float {-3.40282347e38}> ()
    size_q = Constant <value_int: int = @block_q> ()
    size_k = Constant <value_int: int = @block_k> ()
    scaling = Constant <value_float: float = @scale> ()
    least = Constant <value_float: float = @lowest> ()
    by_mask_int = Constant <value_int: int = @dense> ()
    by_mask = Cast <to = 9> (by_mask_int)
    formula = afbs.Formula <ahead: int = @ahead, behind: int = @behind, chunk: int = @chunk, at_end: int = @at_end>
        (q, k)
    batch1 = Shape <start = 0, end = 1> (q)
    heads1 = Shape <start = 1, end = 2> (q)
    kv_heads1 = Shape <start = 1, end = 2> (k)
    q_len1 = Shape <start = 2, end = 3> (q)
    k_len1 = Shape <start = 2, end = 3> (k)
    heads = Squeeze (heads1)
    kv_heads = Squeeze (kv_heads1)
    q_len = Squeeze (q_len1)
    k_len = Squeeze (k_len1)
    last_key = Sub (k_len, one)
    nowhere = Constant <value = int64 {1099511627776}> ()

    # the dense mask in fp32, of which the lowest number stays that
    mask_as_is = Cast <to = 1> (attn_mask)
    is_least = LessOrEqual (mask_as_is, least)
    is_hidden = Equal (mask_as_is, hides)
    is_finite = Not (is_hidden)
    is_lowest = And (is_least, is_finite)
    mask_32 = Where (is_lowest, least32, mask_as_is)
    mask_shape = Concat <axis = 0> (one1, one1, one1, k_len1)
    mask = Expand (mask_32, mask_shape)
    valid_shape = Concat <axis = 0> (batch1, k_len1)
    valid_given = Expand (valid, valid_shape)
    valid_all = If (by_mask) <
        then_branch = of_mask () => (bool[?, ?] seen_m)
        { seen_m = afbs.Resolved (q_len, formula, valid_given, mask, size_q) },
        else_branch = of_formula () => (bool[?, ?] seen_f) { seen_f = Identity (valid_given) }
    >
    sinks_32 = Cast <to = 1> (sinks)
    sinks_all = Expand (sinks_32, heads1)
    largest_sink = ReduceMax <keepdims = 0> (sinks_32)
    some_sinks = Greater (largest_sink, hides)
    q32 = Cast <to = 1> (q)
    k32 = afbs.WhereValid (k, valid_all)
    v32 = afbs.WhereValid (v, valid_all)

    live = afbs.PredictMask <tau: floats = @tau, theta: floats = @theta, policy_code: ints = @policy_code,
        scale: float = @scale, softcap: float = @softcap, dense: int = @dense, added: int = @added,
        block_q: int = @block_q, block_k: int = @block_k, last_rows: int = @last_rows, local_keys: int = @local_keys,
        min_length: int = @min_length, max_length: int = @max_length>
        (q32, k32, formula, valid_all, mask)
    count_q1 = Shape <start = 2, end = 3> (live)
    count_k1 = Shape <start = 3, end = 4> (live)
    count_q = Squeeze (count_q1)
    count_k = Squeeze (count_k1)
    live_shape = Concat <axis = 0> (minus_one, count_k1)
    live_of_rows = Reshape (live, live_shape)
    # a step has at least one block, whose keys are hidden where the rows see none
    live_int = Cast <to = 6> (live_of_rows)
    live_most = ReduceMax <keepdims = 1> (live_int, key_axis)
    live_some = Cast <to = 9> (live_most)
    live_none = Not (live_some)
    key_blocks = Range (zero, count_k, one)
    first_of_all = Equal (key_blocks, zero)
    instead = And (live_none, first_of_all)
    live_rows = Or (live_of_rows, instead)
    q_scaled = Mul (q32, scaling)
    dim1 = Shape <start = 3, end = 4> (q)
    value_dim1 = Shape <start = 3, end = 4> (v)
    size_q1 = Reshape (size_q, one1)
    size_k1 = Reshape (size_k, one1)
    q_shape = Concat <axis = 0> (minus_one, size_q1, dim1)
    k_shape = Concat <axis = 0> (minus_one, size_k1, dim1)
    v_shape = Concat <axis = 0> (minus_one, size_k1, value_dim1)
    q_5d, sizes_q = afbs.InBlocks (q_scaled, size_q)
    k_5d, sizes_k = afbs.InBlocks (k32, size_k)
    v_5d, sizes_v = afbs.InBlocks (v32, size_k)
    q_blocks = Reshape (q_5d, q_shape)
    k_blocks = Reshape (k_5d, k_shape)
    v_blocks = Reshape (v_5d, v_shape)
    keys_shape = Concat <axis = 0> (minus_one, dim1)
    values_shape = Concat <axis = 0> (minus_one, value_dim1)
    mask_batch1 = Shape <start = 0, end = 1> (mask)
    mask_heads1 = Shape <start = 1, end = 2> (mask)
    mask_rows1 = Shape <start = 2, end = 3> (mask)
    mask_batch = Squeeze (mask_batch1)
    mask_heads = Squeeze (mask_heads1)
    mask_count = Squeeze (mask_rows1)
    last_mask_batch = Sub (mask_batch, one)
    last_mask_head = Sub (mask_heads, one)
    last_mask_row = Sub (mask_count, one)
    mask_flat_shape = Concat <axis = 0> (minus_one, k_len1)
    mask_flat = Reshape (mask, mask_flat_shape)
    groups = Div (heads, kv_heads)
    rows_in_block = Range (zero, size_q, one)
    keys_in_block = Range (zero, size_k, one)
    places1 = Shape <start = 0, end = 1> (live_rows)
    places = Squeeze (places1)
    always = Constant <value = bool {1}> ()

    # NaN where anything of v is infinite or NaN
    v_zeros = Mul (v32, nothing)
    v_zero = ReduceSum <keepdims = 0> (v_zeros)
    some_unknown = IsNaN (v_zero)

    # one step for each batch element, head and block of query rows: attend to its live key blocks
    out_blocks = Loop (places, always)
    <body = attend (int64 place, bool more) => (bool again, float[?, ?] attended)
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
        values = Reshape (values_3d, values_shape)
        products_flat = Gemm <transB = 1> (queries, keys)
        products = Unsqueeze (products_flat, outer)
        capped = afbs.Capped <softcap: float = @softcap> (products)
        raw_scores = Squeeze (capped, outer)
        # -inf where the key is hidden from the row, or lies after the end
        first_row = Mul (block, size_q)
        row = Add (rows_in_block, first_row)
        first_keys_flat = Mul (blocks, size_k)
        first_keys = Unsqueeze (first_keys_flat, key_axis)
        keys_2d = Add (first_keys, keys_in_block)
        key = Reshape (keys_2d, minus_one)
        exists = Less (key, k_len)
        key_there = Min (key, last_key)
        valid_row = Gather (valid_all, batch)
        is_valid = Gather (valid_row, key_there)
        there = And (exists, is_valid)
        key_if_there = Where (there, key, nowhere)
        allowed = afbs.ByFormula (row, key_if_there, formula)
        changed_scores = If (by_mask) <
            then_branch = add_mask () => (float[?, ?] with_mask)
            {
                mask_of_batch = Min (batch, last_mask_batch)
                mask_of_head = Min (head, last_mask_head)
                mask_first = Mul (mask_of_batch, mask_heads)
                mask_place = Add (mask_first, mask_of_head)
                mask_begin = Mul (mask_place, mask_count)
                mask_row = Min (row, last_mask_row)
                mask_index = Add (mask_row, mask_begin)
                mask_wide = Gather <axis = 0> (mask_flat, mask_index)
                mask_here = Gather <axis = 1> (mask_wide, key_there)
                hidden = Equal (mask_here, hides)
                added_to = Add (raw_scores, mask_here)
                with_mask = Where (hidden, hides, added_to)
            },
            else_branch = leave () => (float[?, ?] without) { without = Identity (raw_scores) }
        >
        scores = Where (allowed, changed_scores, hides)
        # softmax over these and the head's sink; a row without a key is 0
        sink = Gather (sinks_all, head)
        largest = ReduceMax <keepdims = 1> (scores, key_axis)
        peak = Max (largest, sink)
        hopeless = Equal (peak, hides)
        weights = If (some_sinks) <
            then_branch = beside_sink () => (float[?, ?] beside)
            {
                peak_safe = Where (hopeless, nothing, peak)
                shifted = Sub (scores, peak_safe)
                powers = Exp (shifted)
                sink_shifted = Sub (sink, peak_safe)
                sink_power = Exp (sink_shifted)
                keys_total = ReduceSum <keepdims = 1> (powers, key_axis)
                total = Add (keys_total, sink_power)
                beside = Div (powers, total)
            },
            else_branch = alone () => (float[?, ?] by_softmax) { by_softmax = Softmax <axis = -1> (scores) }
        >
        # a value that no row of the block sees may be NaN, which is not multiplied by zero
        values_seen = If (some_unknown) <
            then_branch = of_seen () => (float[?, ?] known)
            {
                invisible = Equal (scores, hides)
                visible = Not (invisible)
                seen_int = Cast <to = 6> (visible)
                seen_most = ReduceMax <keepdims = 0> (seen_int, zero1)
                seen_some = Cast <to = 9> (seen_most)
                seen_column = Unsqueeze (seen_some, key_axis)
                known = Where (seen_column, values, nothing)
            },
            else_branch = of_all () => (float[?, ?] every) { every = Identity (values) }
        >
        summed = MatMul (weights, values_seen)
        attended = Where (hopeless, nothing, summed)
    }>
    batch_heads = Shape <start = 0, end = 2> (q)
    out_shape = Concat <axis = 0> (batch_heads, minus_one, value_dim1)
    out_padded = Reshape (out_blocks, out_shape)
    out32 = Slice (out_padded, zero1, q_len1, row_axis)
    out = CastLike (out32, q)
}
"""

PASSED_ON = """tau: floats = @tau, theta: floats = @theta, policy_code: ints = @policy_code, ahead: int = @ahead,
        behind: int = @behind, chunk: int = @chunk, at_end: int = @at_end, scale: float = @scale,
        block_q: int = @block_q, block_k: int = @block_k, last_rows: int = @last_rows, local_keys: int = @local_keys,
        min_length: int = @min_length, max_length: int = @max_length"""

SPARSE_ATTENTION = f"""
{NAME} <tau, theta, lam, policy, policy_code, mask, ahead, behind, chunk, at_end, scale, block_q, block_k, last_rows,
    local_keys, min_length, max_length, predictor_version>
    (q, k, v) => (out)
{{
    all_valid = Constant <value = bool[1, 1] {{1}}> ()
    nothing_added = Constant <value = float[1, 1, 1, 1] {{0}}> ()
    no_sinks = Constant <value = float[1] {{-inf}}> ()
    out = afbs.Attend <{PASSED_ON}, softcap = 0.0, dense = 0, added = 0, lowest = -3.40282347e38>
        (q, k, v, all_valid, nothing_added, no_sinks)
}}
"""

MASKED_SPARSE_ATTENTION = f"""
{MASKED_NAME} <tau, theta, lam, policy, policy_code, mask, ahead, behind, chunk, at_end, scale, softcap, dense, added,
    lowest, block_q, block_k, last_rows, local_keys, min_length, max_length, predictor_version>
    (q, k, v, valid, attn_mask, sinks) => (out)
{{
    out = afbs.Attend <{PASSED_ON}, softcap: float = @softcap, dense: int = @dense, added: int = @added,
        lowest: float = @lowest>
        (q, k, v, valid, attn_mask, sinks)
}}
"""


def function_protos(opset: int) -> list[onnx.FunctionProto]:
    """The functions that a model with ``afbs::SparseAttention`` nodes carries, by the policies that are registered now.

    Args:
        opset: version of the standard operators that the model imports, 18 to 23.
    """
    import onnx.parser

    header = f'<opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">'
    functions = []
    bodies = (*RULES, *SIGHT, *prediction(), FORMULA, WHERE_VALID, ATTEND, SPARSE_ATTENTION, MASKED_SPARSE_ATTENTION)
    for body in bodies:
        text = "\n".join(line for line in body.splitlines() if not line.strip().startswith("#"))
        functions.append(onnx.parser.parse_function(header + text))
    return functions
