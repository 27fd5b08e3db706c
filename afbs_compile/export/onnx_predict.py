"""Which key blocks each query block attends, in standard ONNX operators, by the policies that are registered.

``PredictMask`` is :func:`afbs_compile.kernels.spec.selection.live_blocks`. It is put together from the policies of
:data:`afbs_compile.kernels.policies.registry.POLICIES` that have a body: a branch for each, which scores the blocks of
the heads that select by it. Only what some head of a call uses is computed: a policy without heads is the branch not
taken of an ``If`` whose condition is a constant of the call, and a head with ``tau >= 1`` goes to none.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from string import Template

from afbs_compile.kernels.policies.registry import POLICIES

KEPT_BLOCKS = """
KeptBlocks (q_len, k_len, visible, blurred, first_ends, last_ends, size_q, size_k, last, local) => (kept)
{
    # blurred ones; key blocks that hold positions of the query block, or keys right before it; all where the rows of
    # the query block are among the last; the first one that is visible where that is none
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    column = Constant <value = int64[1] {-1}> ()
    key_axis = Constant <value = int64 {-1}> ()
    first_rows_flat = Range (zero, q_len, size_q)
    first_rows = Unsqueeze (first_rows_flat, column)
    end_rows = Add (first_rows, size_q)
    first_keys = Range (zero, k_len, size_k)
    end_keys = Add (first_keys, size_k)
    begins_before = LessOrEqual (first_keys, last_ends)
    end_near = Add (end_keys, local)
    ends_after = Less (first_ends, end_near)
    near = And (begins_before, ends_after)
    near_visible = And (near, visible)
    before_last = Sub (q_len, last)
    some_last = Greater (last, zero)
    reaches = Greater (end_rows, before_last)
    whole = And (reaches, some_last)
    whole_visible = And (whole, visible)
    near_or_blurred = Or (near_visible, blurred)
    wanted = Or (near_or_blurred, whole_visible)
    wanted_int = Cast <to = 6> (wanted)
    wanted_most = ReduceMax <keepdims = 1> (wanted_int, column)
    wanted_some = Cast <to = 9> (wanted_most)
    wanted_none = Not (wanted_some)
    visible_int = Cast <to = 6> (visible)
    so_far = CumSum (visible_int, key_axis)
    so_far_long = Cast <to = 7> (so_far)
    is_first = Equal (so_far_long, one)
    first_visible = And (is_first, visible)
    first_instead = And (first_visible, wanted_none)
    kept = Or (wanted, first_instead)
}
"""

HEADS_WITH = """
HeadsWith <code> (order, ends) => (heads, some)
{
    # the heads that select, by the policy of that code; of constants, so that a runtime drops what no head uses when it
    # loads the file
    one1 = Constant <value = int64[1] {1}> ()
    code_int = Constant <value_int: int = @code> ()
    place = Reshape (code_int, one1)
    next = Add (place, one1)
    begin = Gather (ends, place)
    end = Gather (ends, next)
    heads = Slice (order, begin, end)
    some_1 = Less (begin, end)
    some = Squeeze (some_1)
}
"""

TAKEN = """
Taken (q, k, per_head, heads) => (q_mine, k_mine, mine)
{
    # some query heads, a key head for each, and a number for each as [heads, 1, 1]
    head_axes = Constant <value = int64[2] {1, 2}> ()
    count_q = Shape <start = 1, end = 2> (q)
    count_k = Shape <start = 1, end = 2> (k)
    groups = Div (count_q, count_k)
    key_heads = Div (heads, groups)
    q_mine = Gather <axis = 1> (q, heads)
    k_mine = Gather <axis = 1> (k, key_heads)
    mine_flat = Gather <axis = 0> (per_head, heads)
    mine = Unsqueeze (mine_flat, head_axes)
}
"""

TAKEN_HEADS = """
TakenHeads (x, heads) => (mine)
{
    # of [B, H or 1, ..] some heads, or the one that is there for all
    zero1 = Constant <value = int64[1] {0}> ()
    one1 = Constant <value = int64[1] {1}> ()
    count1 = Shape <start = 1, end = 2> (x)
    last = Sub (count1, one1)
    number1 = Shape (heads)
    many = Greater (count1, one1)
    end = Where (many, number1, one1)
    some = Slice (heads, zero1, end)
    there = Min (some, last)
    mine = Gather <axis = 1> (x, there)
}
"""

SELF_SIMILARITY = """
SelfSimilarity (x, valid, size) => (similarity)
{
    tiny = Constant <value = float {1.17549435e-38}> ()
    row_axis = Constant <value = int64[1] {-2}> ()
    dim_axis = Constant <value = int64[1] {-1}> ()
    rows, unused = afbs.InBlocks (x, size)
    sizes = afbs.ValidSizes (valid, size)
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

WITHOUT_THETA = "keep = afbs.SelectBy$rule (scores, candidates, tau_mine)"

WITH_THETA = """
    # a key block less similar to itself than theta is kept and takes no part; such a query block keeps all
    q_same, k_same, theta_mine = afbs.Taken (q, k, theta, heads)
    row_axis = Constant <value = int64[1] {-2}> ()
    key_axis = Constant <value = int64[1] {-1}> ()
    rows_valid = afbs.AllRows (q_mine)
    of_q = afbs.SelfSimilarity (q_mine, rows_valid, size_q)
    of_k = afbs.SelfSimilarity (k_mine, valid, size_k)
    similarity_q = Unsqueeze (of_q, key_axis)
    similarity_k = Unsqueeze (of_k, row_axis)
    coherent_q = GreaterOrEqual (similarity_q, theta_mine)
    coherent_k = GreaterOrEqual (similarity_k, theta_mine)
    similar = And (candidates, coherent_k)
    selected = afbs.SelectBy$rule (scores, similar, tau_mine)
    coherent = And (coherent_q, coherent_k)
    incoherent = Not (coherent)
    keep = Or (selected, incoherent)
"""

KEEP_BY = """
KeepBy$code (q, k, tau, theta, heads, formula, valid, mask, blurred, bias, clear, scaling, softcap, capped, by_mask,
    with_bias, size_q, size_k) => (keep)
{
    # of some heads, by one policy
    q_mine, k_mine, tau_mine = afbs.Taken (q, k, tau, heads)
    mask_mine = afbs.TakenHeads (mask, heads)
    blurred_mine = afbs.TakenHeads (blurred, heads)
    bias_mine = afbs.TakenHeads (bias, heads)
    candidates = afbs.TakenHeads (clear, heads)
    scores = afbs.$name (q_mine, k_mine, formula, valid, mask_mine, blurred_mine, bias_mine, scaling, softcap, capped,
        by_mask, with_bias, size_q, size_k)
    $select
}
"""

KEPT = """afbs.KeepBy$code (q, k, tau, theta, heads_$code, formula, valid, mask, blurred, bias, clear, scaling,
        softcap, capped, by_mask, with_bias, size_q, size_k)"""

IN_EVERY_CALL = f"""
    heads_$code, some_$code = afbs.HeadsWith <code = $code> (order, ends)
    keep_$code = {KEPT}
"""

IN_SOME_CALLS = f"""
    heads_$code, some_$code = afbs.HeadsWith <code = $code> (order, ends)
    keep_$code = If (some_$code) <
        then_branch = by_$code () => (bool[?, ?, ?, ?] chosen_$code) {{ chosen_$code = {KEPT} }},
        else_branch = without_$code () => (bool[?, ?, ?, ?] none_$code) {{ none_$code = Identity (nothing) }}
    >
"""

PREDICT_MASK = """
PredictMask (q, k, formula, valid, mask, tau, theta, order, ends, scaling, size_q, size_k, last, local, shortest,
    longest,
    softcap, capped, by_mask, with_bias) => (live)
{
    # valid is resolved, and k is 0 where it is not
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    zero1 = Constant <value = int64[1] {0}> ()
    no = Constant <value = bool {0}> ()
    yes = Constant <value = bool {1}> ()
    batch1 = Shape <start = 0, end = 1> (q)
    count1 = Shape <start = 1, end = 2> (q)
    q_len1 = Shape <start = 2, end = 3> (q)
    k_len1 = Shape <start = 2, end = 3> (k)
    count = Squeeze (count1)
    q_len = Squeeze (q_len1)
    k_len = Squeeze (k_len1)
    visible, blurred, first_ends, last_ends, bias = If (by_mask) <
        then_branch = of_mask () => (bool[?, ?, ?, ?] seen_m, bool[?, ?, ?, ?] blurred_m, int64[?, ?, ?, ?] first_m,
            int64[?, ?, ?, ?] last_m, float[?, ?, ?, ?] bias_m)
        {
            seen_m, blurred_m, first_m, last_m, bias_m = afbs.SightByMask
                (q_len, formula, valid, mask, with_bias, size_q, size_k)
        },
        else_branch = of_formula () => (bool[?, ?, ?, ?] seen_f, bool[?, ?, ?, ?] blurred_f, int64[?, ?, ?, ?] first_f,
            int64[?, ?, ?, ?] last_f, float[?, ?, ?, ?] bias_f)
        {
            seen_f, blurred_f, first_f, last_f, bias_f = afbs.SightByFormula
                (q_len, formula, valid, size_q, size_k)
        }
    >
    always = afbs.KeptBlocks (q_len, k_len, visible, blurred, first_ends, last_ends, size_q, size_k, last, local)
    sharp = Not (blurred)
    clear = And (visible, sharp)
    blocks = Shape <start = 2, end = 4> (visible)
    none_shape = Concat <axis = 0> (batch1, zero1, blocks)
    nothing = Expand (no, none_shape)

    # the heads that keep everything
    number_dense = Gather (ends, zero1)
    heads_dense = Slice (order, zero1, number_dense)
    dense_shape = Concat <axis = 0> (batch1, number_dense, blocks)
    keep_dense = Expand (yes, dense_shape)
    $branches
    # back into the order of the heads
    keep_parts = Concat <axis = 1> (keep_dense$keeps)
    numbers = Range (zero, count, one)
    place = ScatterElements <axis = 0> (order, order, numbers)
    keep_heads = Gather <axis = 1> (keep_parts, place)
    # calls of less work, and over more keys, keep every block
    least = Mul (shortest, shortest)
    work = Mul (q_len, k_len)
    short = Less (work, least)
    limited = Greater (longest, zero)
    past = Greater (k_len, longest)
    long = And (limited, past)
    outside = Or (short, long)
    anyway = Or (always, outside)
    kept = Or (keep_heads, anyway)
    live = And (kept, visible)
}
"""


def policy_codes() -> dict[str, int]:
    """The policies that have a body, and the number by which the node's ``policy_code`` knows each: its place."""
    return {name: code for code, (name, policy) in enumerate(POLICIES.items()) if policy.onnx is not None}


def prediction(calls: Sequence[Collection[str]] | None = None) -> tuple[str, ...]:
    """The texts of ``PredictMask`` and of what it calls, beside :data:`afbs_compile.export.onnx_rules.RULES`.

    Args:
        calls: the policies that select in each call; of all calls by default. One that no call has is left out, and one
            that every call has is no branch.
    """
    codes = policy_codes()
    chosen = {name: code for name, code in codes.items() if calls is None or any(name in call for call in calls)}
    functions: dict[str, None] = {}  # some are shared
    branches = []
    for name, code in chosen.items():
        policy, body = POLICIES[name], POLICIES[name].onnx
        assert body is not None
        words = {"code": code, "name": body.name, "rule": policy.rule.capitalize()}
        select = Template(WITH_THETA if policy.has_theta else WITHOUT_THETA).substitute(words)
        functions |= dict.fromkeys((*body.functions, Template(KEEP_BY).substitute(words, select=select)))
        everywhere = calls is not None and all(name in call for call in calls)
        branches.append(Template(IN_EVERY_CALL if everywhere else IN_SOME_CALLS).substitute(words))
    predict = Template(PREDICT_MASK).substitute(
        branches="".join(branches), keeps="".join(f", keep_{code}" for code in chosen.values())
    )
    return (KEPT_BLOCKS, HEADS_WITH, TAKEN, TAKEN_HEADS, SELF_SIMILARITY, *functions, predict)
