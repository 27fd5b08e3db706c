"""What selects key blocks, in standard ONNX operators: the rules of :mod:`afbs_compile.kernels.policies.base`."""

from __future__ import annotations

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
    # strength = p * sqrt(n), n the blocks that take part
    key_axis = Constant <value = int64[1] {-1}> ()
    candidates_float = Cast <to = 1> (candidates)
    count = ReduceSum <keepdims = 1> (candidates_float, key_axis)
    root = Sqrt (count)
    strength = Mul (probability, root)
    keep = afbs.SelectByStrength (strength, tau)
}
"""

SELECT_BY_STRENGTH = """
SelectByStrength (strength, tau) => (keep)
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

RULES = (BLOCK_PROBABILITY, SELECT_BY_MASS, SELECT_BY_STRENGTH, SELECT_BY_SHARE)
