"""What the bodies of policies may call, in standard ONNX operators, and the rules by which tau selects.

``InBlocks`` brings rows into blocks; the rules are those of :mod:`afbs_compile.kernels.policies.rules`, one function
``SelectBy...`` for each, ``(scores, candidates, tau) => (keep)``.
"""

from __future__ import annotations

IN_BLOCKS = """
InBlocks (x, size) => (blocks, sizes)
{
    # [B, H, N, D] -> [B, H, n, size, D], zeros after the last row, and how many rows each block has, [n, 1]
    zero = Constant <value = int64 {0}> ()
    one1 = Constant <value = int64[1] {1}> ()
    column = Constant <value = int64[1] {-1}> ()
    zeros = Constant <value = int64[6] {0, 0, 0, 0, 0, 0}> ()
    no_end = Constant <value = int64[1] {0}> ()
    batch_heads = Shape <start = 0, end = 2> (x)
    length1 = Shape <start = 2, end = 3> (x)
    dim1 = Shape <start = 3, end = 4> (x)
    size1 = Reshape (size, one1)
    # n = ceil(N / size); the last block may be partial
    less = Sub (length1, one1)
    whole = Div (less, size1)
    count1 = Add (whole, one1)
    covered = Mul (count1, size1)
    missing = Sub (covered, length1)
    pads = Concat <axis = 0> (zeros, missing, no_end)
    padded = Pad (x, pads)
    shape = Concat <axis = 0> (batch_heads, count1, size1, dim1)
    blocks = Reshape <allowzero = 1> (padded, shape)
    length = Squeeze (length1)
    starts = Range (zero, length, size)
    left = Sub (length, starts)
    sizes_int = Min (left, size)
    sizes_flat = Cast <to = 1> (sizes_int)
    sizes = Unsqueeze (sizes_flat, column)
}
"""

ALL_ROWS = """
AllRows (x) => (valid)
{
    # [B, N], true: all rows of x count
    yes = Constant <value = bool {1}> ()
    batch = Shape <start = 0, end = 1> (x)
    length = Shape <start = 2, end = 3> (x)
    shape = Concat <axis = 0> (batch, length)
    valid = Expand (yes, shape)
}
"""

VALID_SIZES = """
ValidSizes (valid, size) => (sizes)
{
    # how many valid rows each block has, at least 1, [B, 1, n, 1]
    one = Constant <value = float {1}> ()
    outer = Constant <value = int64[2] {1, 3}> ()
    row_axis = Constant <value = int64[1] {-2}> ()
    numbers = Cast <to = 1> (valid)
    rows = Unsqueeze (numbers, outer)
    blocks, unused = afbs.InBlocks (rows, size)
    counted = ReduceSum <keepdims = 0> (blocks, row_axis)
    sizes = Max (counted, one)
}
"""

CAPPED = """
Capped (scores, softcap, some) => (capped)
{
    # softcap * tanh(scores / softcap); the scores themselves where there is none
    capped = If (some) <
        then_branch = by_tanh () => (float[?, ?, ?, ?] changed)
        {
            relative = Div (scores, softcap)
            bent = Tanh (relative)
            changed = Mul (bent, softcap)
        },
        else_branch = as_it_is () => (float[?, ?, ?, ?] same) { same = Identity (scores) }
    >
}
"""

BLOCK_PROBABILITY = """
BlockProbability (scores, candidates) => (probability)
{
    # softmax over the candidates, -inf first; a row without any is all 0
    key_axis = Constant <value = int64[1] {-1}> ()
    lowest = Constant <value = float {-inf}> ()
    zero = Constant <value = float {0}> ()
    tiny = Constant <value = float {1.17549435e-38}> ()
    masked = Where (candidates, scores, lowest)
    peak = ReduceMax <keepdims = 1> (masked, key_axis)
    hopeless = Equal (peak, lowest)
    peak_safe = Where (hopeless, zero, peak)
    shifted = Sub (masked, peak_safe)
    weights = Exp (shifted)
    total = ReduceSum <keepdims = 1> (weights, key_axis)
    total_safe = Max (total, tiny)
    probability = Div (weights, total_safe)
}
"""

SELECT_BY_MASS = """
SelectByMass (scores, candidates, tau) => (keep)
{
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    last_axis = Constant <value = int64 {-1}> ()
    last_axis1 = Constant <value = int64[1] {-1}> ()
    probability = afbs.BlockProbability (scores, candidates)
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

STRONG_ENOUGH = """
StrongEnough (strength, tau) => (keep)
{
    # s > (1 - tau) / tau   <=>   tau > 1 / (1 + s); a row with NaN keeps everything
    key_axis = Constant <value = int64[1] {-1}> ()
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = float {1}> ()
    below_one = Constant <value = float {0.99999994}> ()
    odds = Add (strength, one)
    inverse = Div (one, odds)
    level = Min (inverse, below_one)
    limit = Min (tau, one)
    strong = Less (level, limit)
    unknown = IsNaN (strength)
    unknown_int = Cast <to = 7> (unknown)
    unknown_count = ReduceSum <keepdims = 1> (unknown_int, key_axis)
    unknown_row = Greater (unknown_count, zero)
    keep = Or (strong, unknown_row)
}
"""

SELECT_BY_SHARE = """
SelectByShare (scores, candidates, tau) => (keep)
{
    # strength = p * n ** (1/4), n the blocks that take part
    key_axis = Constant <value = int64[1] {-1}> ()
    probability = afbs.BlockProbability (scores, candidates)
    candidates_float = Cast <to = 1> (candidates)
    count = ReduceSum <keepdims = 1> (candidates_float, key_axis)
    square_root = Sqrt (count)
    root = Sqrt (square_root)
    strength = Mul (probability, root)
    keep = afbs.StrongEnough (strength, tau)
}
"""

SELECT_BY_STRENGTH = """
SelectByStrength (scores, candidates, tau) => (keep)
{
    lowest = Constant <value = float {-inf}> ()
    masked = Where (candidates, scores, lowest)
    strength = Exp (masked)
    keep = afbs.StrongEnough (strength, tau)
}
"""

RULES = (
    IN_BLOCKS,
    ALL_ROWS,
    VALID_SIZES,
    CAPPED,
    BLOCK_PROBABILITY,
    SELECT_BY_MASS,
    STRONG_ENOUGH,
    SELECT_BY_SHARE,
    SELECT_BY_STRENGTH,
)
