"""``afbs::SparseAttention`` and its masked form in standard ONNX operators, so that any runtime runs them without us.

The bodies follow the plain-PyTorch specification (:mod:`afbs_compile.kernels.spec`) line by line, in fp32 and in its
order of operations, so that they select the same blocks; each policy has its own in its file. ``Attend`` walks over
batch, heads and query blocks, gathers the live key blocks of each, and attends to those alone: what is not live is not
computed, and nothing of N x N exists that was not given. ``SparseAttention`` is ``Attend`` for a mask by formula,
``MaskedSparseAttention`` also for valid keys, a dense mask, a softcap and sinks; what of these a call has not, it is
given as a tensor that changes nothing. ``lam`` is carried for runtimes with a kernel of their own; like the CPU engine,
the bodies skip no product with V, which is never less accurate. Strings cannot be compared before opset 19, so the
bodies read ``order`` and ``ends`` and four numbers where a reader or another kernel reads ``policy`` and ``mask``.

The bodies keep to what onnxruntime and TensorRT both take. TensorRT (for RTX, 1.7) knows no size that depends on
values: no ``NonZero``, no ``Slice`` up to a number that was computed from data. What depends on values is how often a
loop runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from string import Template
from typing import TYPE_CHECKING

from afbs_compile.export.onnx_branches import decide
from afbs_compile.export.onnx_predict import policy_codes, prediction
from afbs_compile.export.onnx_rules import RULES
from afbs_compile.export.onnx_sight import SIGHT

if TYPE_CHECKING:
    import onnx

DOMAIN, NAME, MASKED_NAME = "afbs", "SparseAttention", "MaskedSparseAttention"

VERSION = 5
"""Of the domain and the nodes. Version 4 had no ``block_heads``; version 3 had ``policy_code`` in place of ``order``
and ``ends``; version 2 had the attributes ``upper`` and ``offset`` in place of ``ahead``, ``behind``, ``chunk`` and
``at_end``, and no masked node; version 1 had ``is_causal`` in place of ``mask``, and other codes."""

FORMULA = """
Formula (q, k, ahead, behind, chunk, at_end) => (formula)
{
    # what the bodies are told of the mask; where it is aligned at the end, the last row's own key is the last one
    one1 = Constant <value = int64[1] {1}> ()
    ahead_1 = Reshape (ahead, one1)
    behind_1 = Reshape (behind, one1)
    chunk_1 = Reshape (chunk, one1)
    q_len1 = Shape <start = 2, end = 3> (q)
    k_len1 = Shape <start = 2, end = 3> (k)
    more = Sub (k_len1, q_len1)
    shift = Mul (more, at_end)
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

PASSED_ON = """tau, theta, order, ends, ahead, behind, chunk, at_end, scaling, size_q, size_k, together, last, local,
    shortest, longest"""
"""What :data:`READ` makes of the attributes."""

SHARED = """
Shared (live, together) => (all_live)
{
    # a block of [B, H, n_q, n_k] that is live for one of so many neighbouring heads is live for all of them
    one1 = Constant <value = int64[1] {1}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    group_axis = Constant <value = int64[1] {2}> ()
    live_shape = Shape (live)
    batch1 = Shape <start = 0, end = 1> (live)
    counts = Shape <start = 2, end = 4> (live)
    together1 = Reshape (together, one1)
    groups_shape = Concat <axis = 0> (batch1, minus_one, together1, counts)
    numbers = Cast <to = 6> (live)
    groups = Reshape (numbers, groups_shape)
    any = ReduceMax <keepdims = 1> (groups, group_axis)
    all_shape = Shape (groups)
    all_groups = Expand (any, all_shape)
    all_numbers = Reshape (all_groups, live_shape)
    all_live = Cast <to = 9> (all_numbers)
}
"""

LIVE_FIRST = """
LiveFirst (live) => (blocks, counts)
{
    # of each row of [rows, n_k] the numbers of the blocks that are live, then those of the others; how many are live
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    last_axis = Constant <value = int64 {-1}> ()
    last_axis1 = Constant <value = int64[1] {-1}> ()
    shape = Shape (live)
    count1 = Shape <start = 1, end = 2> (live)
    count = Squeeze (count1)
    numbers_flat = Range (zero, count, one)
    numbers = Expand (numbers_flat, shape)
    live_int = Cast <to = 7> (live)
    so_far = CumSum (live_int, last_axis)
    counts_wide = ReduceSum <keepdims = 1> (live_int, last_axis1)
    counts = Squeeze (counts_wide, last_axis1)
    place_of_live = Sub (so_far, one)
    dead_before = Sub (numbers, so_far)
    place_of_dead = Add (dead_before, counts_wide)
    place = Where (live, place_of_live, place_of_dead)
    blocks = ScatterElements <axis = 1> (numbers, place, numbers)
}
"""

ATTEND = f"""
Attend (q, k, v, valid, attn_mask, sinks, {PASSED_ON}, softcap, capped, by_mask, with_bias, least) => (out)
{{
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    zero1 = Constant <value = int64[1] {{0}}> ()
    one1 = Constant <value = int64[1] {{1}}> ()
    minus_one = Constant <value = int64[1] {{-1}}> ()
    no_slots = Constant <value = int64[3] {{0, 0, 0}}> ()
    outer = Constant <value = int64[2] {{0, 1}}> ()
    row_axis = Constant <value = int64[1] {{2}}> ()
    key_axis = Constant <value = int64[1] {{-1}}> ()
    hides = Constant <value = float {{-inf}}> ()
    nothing = Constant <value = float {{0}}> ()
    unit = Constant <value = float {{1}}> ()
    least32 = Constant <value = float {{-3.40282347e38}}> ()
    formula = afbs.Formula (q, k, ahead, behind, chunk, at_end)
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
    nowhere = Constant <value = int64 {{1099511627776}}> ()

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
        {{ seen_m = afbs.Resolved (q_len, formula, valid_given, mask, size_q) }},
        else_branch = of_formula () => (bool[?, ?] seen_f) {{ seen_f = Identity (valid_given) }}
    >
    sinks_32 = Cast <to = 1> (sinks)
    sinks_all = Expand (sinks_32, heads1)
    q32 = Cast <to = 1> (q)
    k32 = afbs.WhereValid (k, valid_all)
    v32 = afbs.WhereValid (v, valid_all)

    live_apart = afbs.PredictMask (q32, k32, formula, valid_all, mask, tau, theta, order, ends, scaling, size_q, size_k,
        last, local, shortest, longest, softcap, capped, by_mask, with_bias)
    live = afbs.Shared (live_apart, together)
    count_k1 = Shape <start = 3, end = 4> (live)
    count_q1 = Shape <start = 2, end = 3> (live)
    count_q = Squeeze (count_q1)
    count_k = Squeeze (count_k1)
    live_shape = Concat <axis = 0> (minus_one, count_k1)
    live_rows = Reshape (live, live_shape)
    live_blocks, live_counts = afbs.LiveFirst (live_rows)
    # so many at a time; after the last one come blocks that are not there
    at_once_most = Constant <value = int64 {{4}}> ()
    at_once = Min (count_k, at_once_most)
    at_once1 = Reshape (at_once, one1)
    more_slots = Concat <axis = 0> (no_slots, at_once1)
    slots_of_rows = Pad (live_blocks, more_slots)
    slots_at_once = Range (zero, at_once, one)
    before_last = Sub (live_counts, one)
    whole_steps = Div (before_last, at_once)
    some_steps = Add (whole_steps, one)
    steps_of_rows = Max (some_steps, one)

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
    column_shape = Concat <axis = 0> (size_q1, one1)
    sum_shape = Concat <axis = 0> (size_q1, value_dim1)
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

    # NaN where anything of v is infinite or NaN
    v_zeros = Mul (v32, nothing)
    v_zero = ReduceSum <keepdims = 0> (v_zeros)
    some_unknown = IsNaN (v_zero)

    # one step for each batch element, head and block of query rows: attend to its live key blocks
    unused_state, out_blocks = Loop (places, "", one)
    <body = attend (int64 place, bool more, int64 state) => (bool again, int64 same_state, float[?, ?] attended)
    {{
        again = Constant <value = bool {{1}}> ()
        same_state = Identity (state)
        block = Mod (place, count_q)
        batch_head = Div (place, count_q)
        batch = Div (batch_head, heads)
        head = Mod (batch_head, heads)
        kv_head = Div (head, groups)
        batch_first = Mul (batch, kv_heads)
        batch_kv_head = Add (batch_first, kv_head)
        first_block = Mul (batch_kv_head, count_k)
        queries = Gather (q_blocks, place)
        slots = Gather (slots_of_rows, place)
        number = Gather (live_counts, place)
        steps = Gather (steps_of_rows, place)
        first_row = Mul (block, size_q)
        row = Add (rows_in_block, first_row)
        valid_row = Gather (valid_all, batch)
        # the head's sink is a logit without a value
        sink = Gather (sinks_all, head)
        no_sink = Equal (sink, hides)
        sink_weight = Where (no_sink, nothing, unit)
        peak_first = Expand (sink, column_shape)
        total_first = Expand (sink_weight, column_shape)
        sum_first = Expand (nothing, sum_shape)
        # the softmax over some keys after others: sums so far are kept relative to the largest score so far
        peak_last, total_last, sum_last = Loop (steps, "", peak_first, total_first, sum_first)
        <body = attend_some (int64 step, bool more_steps, float[?, ?] peak, float[?, ?] total, float[?, ?] sum)
            => (bool again_some, float[?, ?] peak_new, float[?, ?] total_new, float[?, ?] sum_new)
        {{
            again_some = Constant <value = bool {{1}}> ()
            first_slot = Mul (step, at_once)
            slot = Add (slots_at_once, first_slot)
            blocks = Gather (slots, slot)
            slot_taken = Less (slot, number)
            gathered = Add (blocks, first_block)
            keys_3d = Gather (k_blocks, gathered)
            values_3d = Gather (v_blocks, gathered)
            keys = Reshape (keys_3d, keys_shape)
            values = Reshape (values_3d, values_shape)
            products_flat = Gemm <transB = 1> (queries, keys)
            products = Unsqueeze (products_flat, outer)
            capped_scores = afbs.Capped (products, softcap, capped)
            raw_scores = Squeeze (capped_scores, outer)
            # -inf where the key is hidden from the row, or lies after the end
            first_keys_flat = Mul (blocks, size_k)
            first_keys_taken = Where (slot_taken, first_keys_flat, nowhere)
            first_keys = Unsqueeze (first_keys_taken, key_axis)
            keys_2d = Add (first_keys, keys_in_block)
            key = Reshape (keys_2d, minus_one)
            exists = Less (key, k_len)
            key_there = Min (key, last_key)
            is_valid = Gather (valid_row, key_there)
            there = And (exists, is_valid)
            key_if_there = Where (there, key, nowhere)
            allowed = afbs.ByFormula (row, key_if_there, formula)
            changed_scores = If (by_mask) <
                then_branch = add_mask () => (float[?, ?] with_mask)
                {{
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
                }},
                else_branch = leave () => (float[?, ?] without) {{ without = Identity (raw_scores) }}
            >
            scores = Where (allowed, changed_scores, hides)
            largest = ReduceMax <keepdims = 1> (scores, key_axis)
            peak_new = Max (largest, peak)
            hopeless = Equal (peak_new, hides)
            peak_safe = Where (hopeless, nothing, peak_new)
            shifted = Sub (scores, peak_safe)
            weights = Exp (shifted)
            faded_by = Sub (peak, peak_safe)
            fade = Exp (faded_by)
            weight = ReduceSum <keepdims = 1> (weights, key_axis)
            total_faded = Mul (total, fade)
            total_new = Add (total_faded, weight)
            # a value that no row of the block sees may be NaN, which is not multiplied by zero
            values_seen = If (some_unknown) <
                then_branch = of_seen () => (float[?, ?] known)
                {{
                    invisible = Equal (scores, hides)
                    visible = Not (invisible)
                    seen_int = Cast <to = 6> (visible)
                    seen_most = ReduceMax <keepdims = 0> (seen_int, zero1)
                    seen_some = Cast <to = 9> (seen_most)
                    seen_column = Unsqueeze (seen_some, key_axis)
                    known = Where (seen_column, values, nothing)
                }},
                else_branch = of_all () => (float[?, ?] every) {{ every = Identity (values) }}
            >
            summed = MatMul (weights, values_seen)
            sum_faded = Mul (sum, fade)
            sum_new = Add (sum_faded, summed)
        }}>
        # a row without a key is 0
        nothing_seen = Equal (total_last, nothing)
        divisor = Where (nothing_seen, unit, total_last)
        attended = Div (sum_last, divisor)
    }}>
    batch_heads = Shape <start = 0, end = 2> (q)
    out_shape = Concat <axis = 0> (batch_heads, minus_one, value_dim1)
    out_padded = Reshape (out_blocks, out_shape)
    out32 = Slice (out_padded, zero1, q_len1, row_axis)
    out = CastLike (out32, q)
}}
"""

READ = """
    tau = Constant <value_floats: floats = @tau> ()
    theta = Constant <value_floats: floats = @theta> ()
    order = Constant <value_ints: ints = @order> ()
    ends = Constant <value_ints: ints = @ends> ()
    ahead = Constant <value_int: int = @ahead> ()
    behind = Constant <value_int: int = @behind> ()
    chunk = Constant <value_int: int = @chunk> ()
    at_end = Constant <value_int: int = @at_end> ()
    scaling = Constant <value_float: float = @scale> ()
    size_q = Constant <value_int: int = @block_q> ()
    size_k = Constant <value_int: int = @block_k> ()
    together = Constant <value_int: int = @block_heads> ()
    last = Constant <value_int: int = @last_rows> ()
    local = Constant <value_int: int = @local_keys> ()
    shortest = Constant <value_int: int = @min_length> ()
    longest = Constant <value_int: int = @max_length> ()
"""
"""The attributes of both nodes as tensors. Only here are they read: TensorRT's parser loses sight of a function's
attributes once it has chosen a branch of an ``If``, and takes one that a function passes on to another for 0."""

SPARSE_ATTENTION = f"""
{NAME} <tau, theta, lam, policy, order, ends, mask, ahead, behind, chunk, at_end, scale, block_q, block_k, block_heads,
    last_rows, local_keys, min_length, max_length, predictor_version> (q, k, v) => (out)
{{
    {READ}
    # constants, so that a runtime need not look at what the call has not
    all_valid = Constant <value = bool[1, 1] {{1}}> ()
    nothing_added = Constant <value = float[1, 1, 1, 1] {{0}}> ()
    no_sinks = Constant <value = float[1] {{-inf}}> ()
    no_cap = Constant <value = float {{0}}> ()
    no = Constant <value = bool {{0}}> ()
    least = Constant <value = float {{-3.40282347e38}}> ()
    out = afbs.Attend (q, k, v, all_valid, nothing_added, no_sinks, {PASSED_ON}, no_cap, no, no, no, least)
}}
"""

MASKED_SPARSE_ATTENTION = f"""
{MASKED_NAME} <tau, theta, lam, policy, order, ends, mask, ahead, behind, chunk, at_end, scale, softcap, dense, added,
    lowest, block_q, block_k, block_heads, last_rows, local_keys, min_length, max_length, predictor_version>
    (q, k, v, valid, attn_mask, sinks) => (out)
{{
    {READ}
    cap = Constant <value_float: float = @softcap> ()
    least = Constant <value_float: float = @lowest> ()
    $softcap
    $dense
    $added
    out = afbs.Attend (q, k, v, valid, attn_mask, sinks, {PASSED_ON}, cap, capped, by_mask, with_bias, least)
}}
"""


FEATURES = {
    "softcap": ("capped", "none = Constant <value = float {0}> ()  capped = Greater (cap, none)"),
    "dense": ("by_mask", "dense = Constant <value_int: int = @dense> ()  by_mask = Cast <to = 9> (dense)"),
    "added": ("with_bias", "added = Constant <value_int: int = @added> ()  with_bias = Cast <to = 9> (added)"),
}
"""The attributes of masked nodes that are 0 where a call has no such thing: whether it has, and how that is asked."""


def all_functions(
    opset: int, calls: Sequence[Collection[str]] | None = None, features: Mapping[str, bool] | None = None
) -> list[onnx.FunctionProto]:
    """The bodies of the nodes and the functions that they call, by the policies that are registered now.

    Args:
        opset: version of the standard operators that the model imports, 18 to 23.
        calls: of each call that has such a node the policies that select for some head of it; of all by default.
        features: those of :data:`FEATURES` that all masked calls have, or none has; the others are asked for. None of
            them by default.
    """
    import onnx.parser

    header = f'<opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">'
    asked = {name: ask for name, (_, ask) in FEATURES.items()}
    known = {
        name: f"{FEATURES[name][0]} = Constant <value = bool {{{int(has)}}}> ()"
        for name, has in (features or {}).items()
    }
    masked = Template(MASKED_SPARSE_ATTENTION).substitute(asked | known)
    functions = []
    parts = (*RULES, *SIGHT, *prediction(calls), FORMULA, WHERE_VALID, SHARED, LIVE_FIRST, ATTEND)
    for body in (*parts, SPARSE_ATTENTION, masked):
        text = "\n".join(line for line in body.splitlines() if not line.strip().startswith("#"))
        functions.append(onnx.parser.parse_function(header + text))
    return functions


def bodies(opset: int, nodes: Sequence[onnx.NodeProto]) -> list[onnx.FunctionProto]:
    """The bodies that a file carries, in standard operators alone, without what none of its calls needs.

    All other functions are inlined into them: TensorRT's parser takes an attribute that a function passes on for 0. And
    no branch is left that a constant decides.

    Args:
        opset: as in :func:`all_functions`.
        nodes: those that the file has.
    """
    import onnx.inliner

    value = onnx.helper.get_attribute_value
    given = [{attribute.name: value(attribute) for attribute in node.attribute} for node in nodes]
    calls = [
        {name for name, code in policy_codes().items() if call["ends"][code] < call["ends"][code + 1]} for call in given
    ]
    having = {name: {bool(call[name]) for call in given if name in call} for name in FEATURES}
    features = {name: any(have) for name, have in having.items() if len(have) == 1}
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    nothing = onnx.helper.make_graph([], "nothing", [], [])
    functions = all_functions(opset, calls, features)
    model = onnx.helper.make_model(nothing, opset_imports=imports, functions=functions)
    flat = onnx.inliner.inline_selected_functions(model, [(DOMAIN, name) for name in (NAME, MASKED_NAME)], exclude=True)
    kept = [function for function in flat.functions if function.name in {node.op_type for node in nodes}]
    for function in kept:
        decide(function.node)
    return kept
