"""What the rows of a call see, in standard ONNX operators: :mod:`afbs_compile.kernels.sight` for the bodies.

Everywhere ``formula`` is int64 ``[4]``: the position of row 0 among the keys; how many keys ahead of its position a row
sees, and how many behind; the width of the chunks of keys of which it sees its own. ``valid`` is bool ``[B, k_len]``,
``mask`` is fp32 ``[B or 1, H or 1, q_len or 1, k_len]`` and added to the scores, -inf where a key is hidden.
Whatever looks at a dense mask does so for one block of query rows at a time.

Loops here and in the other bodies have a trip count, no condition, and a state: TensorRT warns of a loop with both of
the former, and onnxruntime forgets the last of a node's inputs if it is empty.
"""

from __future__ import annotations

BY_FORMULA = """
ByFormula (rows, keys, formula) => (seen)
{
    # [rows, keys]: whether the formula shows a row a key
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    column = Constant <value = int64[1] {-1}> ()
    shift = Gather (formula, zero)
    ahead = Gather (formula, one)
    positions = Add (rows, shift)
    last_flat = Add (positions, ahead)
    last = Unsqueeze (last_flat, column)
    first_flat = afbs.FirstSeen (rows, formula)
    first = Unsqueeze (first_flat, column)
    not_after = LessOrEqual (keys, last)
    not_before = GreaterOrEqual (keys, first)
    seen = And (not_after, not_before)
}
"""

FIRST_SEEN = """
FirstSeen (rows, formula) => (first)
{
    # the first key that each row sees; 0 or less for all from the first key on
    zero = Constant <value = int64 {0}> ()
    two = Constant <value = int64 {2}> ()
    three = Constant <value = int64 {3}> ()
    shift = Gather (formula, zero)
    behind = Gather (formula, two)
    chunk = Gather (formula, three)
    positions = Add (rows, shift)
    furthest = Sub (positions, behind)
    chunks = Div (positions, chunk)
    begins = Mul (chunks, chunk)
    first = Max (furthest, begins)
}
"""

SEEN_BY_ROWS = """
SeenByRows (rows, formula, valid, mask) => (seen, given)
{
    # bool [B, H or 1, rows, k_len], and what is added to these scores; the lowest number hides a key from a row that
    # has anything larger
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    one1 = Constant <value = int64[1] {1}> ()
    head_axes = Constant <value = int64[2] {1, 2}> ()
    key_axis = Constant <value = int64[1] {-1}> ()
    hides = Constant <value = float {-inf}> ()
    lowest = Constant <value = float {-3.40282347e38}> ()
    k_len1 = Shape <start = 1, end = 2> (valid)
    k_len = Squeeze (k_len1)
    keys = Range (zero, k_len, one)
    by_formula = afbs.ByFormula (rows, keys, formula)
    valid_wide = Unsqueeze (valid, head_axes)
    mask_rows1 = Shape <start = 2, end = 3> (mask)
    last_row = Sub (mask_rows1, one1)
    rows_there = Min (rows, last_row)
    given = Gather <axis = 2> (mask, rows_there)
    hidden = Equal (given, hides)
    shown = Not (hidden)
    exists = And (by_formula, valid_wide)
    allowed = And (exists, shown)
    least = LessOrEqual (given, lowest)
    larger = Not (least)
    clear = And (allowed, larger)
    clear_int = Cast <to = 6> (clear)
    clear_most = ReduceMax <keepdims = 1> (clear_int, key_axis)
    clear_some = Cast <to = 9> (clear_most)
    nothing_clear = Not (clear_some)
    clear_enough = Or (clear, nothing_clear)
    seen = And (allowed, clear_enough)
}
"""

ROWS_OF_BLOCK = """
RowsOfBlock (block, size_q, q_len) => (rows)
{
    one = Constant <value = int64 {1}> ()
    first = Mul (block, size_q)
    end_full = Add (first, size_q)
    end = Min (end_full, q_len)
    rows = Range (first, end, one)
}
"""

BLOCKS_OF = """
BlocksOf (length, size) => (count)
{
    one = Constant <value = int64 {1}> ()
    less = Sub (length, one)
    whole = Div (less, size)
    count = Add (whole, one)
}
"""

KEY_BLOCKS = """
KeyBlocks (x, size, fill) => (blocks)
{
    # [.., .., .., k_len] -> [.., .., .., n_k, size], the last block filled up
    zeros = Constant <value = int64[7] {0, 0, 0, 0, 0, 0, 0}> ()
    one1 = Constant <value = int64[1] {1}> ()
    same = Shape <start = 0, end = 3> (x)
    length1 = Shape <start = 3, end = 4> (x)
    size1 = Reshape (size, one1)
    # (-length) mod size, for Mod has the sign of its divisor
    minus_length1 = Neg (length1)
    missing = Mod (minus_length1, size1)
    pads = Concat <axis = 0> (zeros, missing)
    padded = Pad (x, pads, fill)
    # not -1, which says nothing where there are no heads
    covered = Add (length1, missing)
    count1 = Div (covered, size1)
    shape = Concat <axis = 0> (same, count1, size1)
    blocks = Reshape <allowzero = 1> (padded, shape)
}
"""

SOME_OF_BLOCK = """
SomeOfBlock (x, size) => (there)
{
    # whether any key of each block is true, [.., .., .., n_k]
    key_axis = Constant <value = int64[1] {-1}> ()
    fill = Constant <value = int32 {0}> ()
    as_int = Cast <to = 6> (x)
    blocks = afbs.KeyBlocks (as_int, size, fill)
    most = ReduceMax <keepdims = 0> (blocks, key_axis)
    there = Cast <to = 9> (most)
}
"""

MEAN_BIAS = """
MeanBias (given, seen, size, axes) => (bias)
{
    # the logarithm of the mean of exp over what is seen of each block of keys, over the axes of rows, blocks and keys
    hides = Constant <value = float {-inf}> ()
    zero = Constant <value = float {0}> ()
    one = Constant <value = float {1}> ()
    key_axis = Constant <value = int64[1] {-1}> ()
    numbers_flat = Where (seen, given, hides)
    numbers = afbs.KeyBlocks (numbers_flat, size, hides)
    peak = ReduceMax <keepdims = 1> (numbers, axes)
    hopeless = Equal (peak, hides)
    peak_safe = Where (hopeless, zero, peak)
    shifted = Sub (numbers, peak_safe)
    powers = Exp (shifted)
    total = ReduceSum <keepdims = 1> (powers, axes)
    log_total = Log (total)
    log_sum = Add (log_total, peak_safe)
    seen_float = Cast <to = 1> (seen)
    seen_blocks = afbs.KeyBlocks (seen_float, size, zero)
    counted = ReduceSum <keepdims = 1> (seen_blocks, axes)
    count = Max (counted, one)
    log_count = Log (count)
    mean = Sub (log_sum, log_count)
    bias = Squeeze (mean, key_axis)
}
"""

RESOLVED = """
Resolved (q_len, formula, valid, mask, size_q) => (seen_by_some)
{
    # the keys that some row of some head sees, [B, k_len]: what no row sees is not valid
    one = Constant <value = int64 {1}> ()
    block_axis = Constant <value = int64[1] {0}> ()
    row_axes = Constant <value = int64[2] {1, 2}> ()
    count = afbs.BlocksOf (q_len, size_q)
    unused_state, by_block = Loop (count, "", one)
    <body = look (int64 block, bool more, int64 state) => (bool again, int64 same_state, int32[?, ?] some_see)
    {
        again = Constant <value = bool {1}> ()
        same_state = Identity (state)
        rows = afbs.RowsOfBlock (block, size_q, q_len)
        seen, given = afbs.SeenByRows (rows, formula, valid, mask)
        seen_int = Cast <to = 6> (seen)
        some_see = ReduceMax <keepdims = 0> (seen_int, row_axes)
    }>
    most = ReduceMax <keepdims = 0> (by_block, block_axis)
    seen_by_some = Cast <to = 9> (most)
}
"""

SIGHT_BY_MASK = """
SightByMask (q_len, formula, valid, mask, with_bias, size_q, size_k) => (visible, blurred, first_ends, last_ends, bias)
{
    # bool [B, H or 1, n_q, n_k] twice; int64 [B, H or 1, n_q, 1], the last key that the first row of a query block
    # sees, and that any does, -1 for none; fp32, what is added to the scores of a block on average
    zero = Constant <value = int64 {0}> ()
    zero1 = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64 {1}> ()
    nothing = Constant <value = float {0}> ()
    row_axis = Constant <value = int64[1] {2}> ()
    rows_and_keys = Constant <value = int64[2] {2, 4}> ()
    own_row = Constant <value = int64[1] {3}> ()
    key_axis = Constant <value = int64[1] {-1}> ()
    head_axes = Constant <value = int64[2] {1, 2}> ()
    k_len1 = Shape <start = 1, end = 2> (valid)
    k_len = Squeeze (k_len1)
    end_place = Add (k_len, one)
    places = Range (one, end_place, one)
    exists = Unsqueeze (valid, head_axes)
    count = afbs.BlocksOf (q_len, size_q)
    unused_state, visible_5d, blurred_5d, first_5d, last_5d, bias_5d = Loop (count, "", one)
    <body = look (int64 block, bool more, int64 state) => (bool again, int64 same_state, bool[?, ?, ?, ?] visible_of,
        bool[?, ?, ?, ?] blurred_of, int64[?, ?, ?, ?] first_of, int64[?, ?, ?, ?] last_of, float[?, ?, ?, ?] bias_of)
    {
        again = Constant <value = bool {1}> ()
        same_state = Identity (state)
        rows = afbs.RowsOfBlock (block, size_q, q_len)
        seen, given = afbs.SeenByRows (rows, formula, valid, mask)
        seen_int = Cast <to = 6> (seen)
        somewhere_int = ReduceMax <keepdims = 1> (seen_int, row_axis)
        somewhere = Cast <to = 9> (somewhere_int)
        visible_of = afbs.SomeOfBlock (somewhere, size_k)
        nowhere = Not (somewhere)
        unseen = And (exists, nowhere)
        some_unseen = afbs.SomeOfBlock (unseen, size_k)
        blurred_of = And (visible_of, some_unseen)
        first_row = Gather <axis = 2> (seen, zero1)
        first_row_int = Cast <to = 7> (first_row)
        first_places = Mul (first_row_int, places)
        first_place = ReduceMax <keepdims = 1> (first_places, key_axis)
        first_of = Sub (first_place, one)
        somewhere_long = Cast <to = 7> (somewhere)
        last_places = Mul (somewhere_long, places)
        last_place = ReduceMax <keepdims = 1> (last_places, key_axis)
        last_of = Sub (last_place, one)
        bias_of = If (with_bias) <
            then_branch = mean_of () => (float[?, ?, ?, ?] mean)
            { mean = afbs.MeanBias (given, seen, size_k, rows_and_keys) },
            else_branch = none_of () => (float[?, ?, ?, ?] none)
            {
                as_float = Cast <to = 1> (visible_of)
                none = Mul (as_float, nothing)
            }
        >
    }>
    # [n_q, B, H, 1, ..] -> [B, H, n_q, ..]
    visible_4d = Squeeze (visible_5d, own_row)
    blurred_4d = Squeeze (blurred_5d, own_row)
    first_4d = Squeeze (first_5d, own_row)
    last_4d = Squeeze (last_5d, own_row)
    bias_4d = Squeeze (bias_5d, own_row)
    visible = Transpose <perm = [1, 2, 0, 3]> (visible_4d)
    blurred = Transpose <perm = [1, 2, 0, 3]> (blurred_4d)
    first_ends = Transpose <perm = [1, 2, 0, 3]> (first_4d)
    last_ends = Transpose <perm = [1, 2, 0, 3]> (last_4d)
    bias = Transpose <perm = [1, 2, 0, 3]> (bias_4d)
}
"""

SIGHT_BY_FORMULA = """
SightByFormula (q_len, formula, valid, size_q, size_k) => (visible, blurred, first_ends, last_ends, bias)
{
    # the same without a dense mask: of positions, and of whether any key of a block is valid
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    nothing = Constant <value = float {0}> ()
    column = Constant <value = int64[1] {-1}> ()
    outer = Constant <value = int64[2] {0, 1}> ()
    head_axes = Constant <value = int64[2] {1, 2}> ()
    k_len1 = Shape <start = 1, end = 2> (valid)
    k_len = Squeeze (k_len1)
    shift = Gather (formula, zero)
    ahead = Gather (formula, one)
    upper = Add (shift, ahead)
    first_rows_flat = Range (zero, q_len, size_q)
    first_rows = Unsqueeze (first_rows_flat, column)
    end_rows_full = Add (first_rows, size_q)
    end_rows = Min (end_rows_full, q_len)
    last_rows = Sub (end_rows, one)
    first_keys = Range (zero, k_len, size_k)
    end_keys_full = Add (first_keys, size_k)
    end_keys = Min (end_keys_full, k_len)
    last_keys = Sub (end_keys, one)
    # of the rows that reach a block the first looks back the furthest
    reaches = Sub (first_keys, upper)
    nearest_rows = Max (first_rows, reaches)
    exist = LessOrEqual (nearest_rows, last_rows)
    their_first = afbs.FirstSeen (nearest_rows, formula)
    look_back = LessOrEqual (their_first, last_keys)
    visible_2d = And (exist, look_back)
    of_first_rows = afbs.FirstSeen (first_rows, formula)
    begins = LessOrEqual (of_first_rows, first_keys)
    furthest = Add (last_rows, upper)
    ends = LessOrEqual (last_keys, furthest)
    covered = And (begins, ends)
    uncovered = Not (covered)
    blurred_2d = And (visible_2d, uncovered)
    valid_4d = Unsqueeze (valid, head_axes)
    some_valid = afbs.SomeOfBlock (valid_4d, size_k)
    visible = And (visible_2d, some_valid)
    blurred = And (blurred_2d, some_valid)
    # a row's position is its own key, past the end of the keys it is the last one
    last_key = Sub (k_len, one)
    positions = Add (first_rows, shift)
    own = Min (positions, last_key)
    own_end = Add (own, size_q)
    own_last = Sub (own_end, one)
    first_ends = Unsqueeze (own, outer)
    last_ends = Unsqueeze (own_last, outer)
    as_float = Cast <to = 1> (visible)
    bias = Mul (as_float, nothing)
}
"""

GROUPS_BY_MASK = """
GroupsByMask (tokens, q_len, formula, valid, mask, with_bias, span) => (seen, bias)
{
    # which groups of keys some query rows see, those of which they see any, and what is added to their logits
    one = Constant <value = int64 {1}> ()
    nothing = Constant <value = float {0}> ()
    keys_only = Constant <value = int64[1] {4}> ()
    last_row = Sub (q_len, one)
    rows = Min (tokens, last_row)
    by_key, given = afbs.SeenByRows (rows, formula, valid, mask)
    seen = afbs.SomeOfBlock (by_key, span)
    bias = If (with_bias) <
        then_branch = mean_of () => (float[?, ?, ?, ?] mean) { mean = afbs.MeanBias (given, by_key, span, keys_only) },
        else_branch = none_of () => (float[?, ?, ?, ?] none)
        {
            as_float = Cast <to = 1> (seen)
            none = Mul (as_float, nothing)
        }
    >
}
"""

GROUPS_BY_FORMULA = """
GroupsByFormula (tokens, formula, valid, span) => (seen, bias)
{
    # the same without a dense mask: groups whose first key a row sees, if any of their keys is valid
    zero = Constant <value = int64 {0}> ()
    nothing = Constant <value = float {0}> ()
    head_axes = Constant <value = int64[2] {1, 2}> ()
    k_len1 = Shape <start = 1, end = 2> (valid)
    k_len = Squeeze (k_len1)
    first_keys = Range (zero, k_len, span)
    by_formula = afbs.ByFormula (tokens, first_keys, formula)
    valid_4d = Unsqueeze (valid, head_axes)
    some_valid = afbs.SomeOfBlock (valid_4d, span)
    seen = And (by_formula, some_valid)
    as_float = Cast <to = 1> (seen)
    bias = Mul (as_float, nothing)
}
"""

SIGHT = (
    BY_FORMULA,
    FIRST_SEEN,
    SEEN_BY_ROWS,
    BLOCKS_OF,
    ROWS_OF_BLOCK,
    KEY_BLOCKS,
    SOME_OF_BLOCK,
    MEAN_BIAS,
    RESOLVED,
    SIGHT_BY_MASK,
    SIGHT_BY_FORMULA,
    GROUPS_BY_MASK,
    GROUPS_BY_FORMULA,
)
