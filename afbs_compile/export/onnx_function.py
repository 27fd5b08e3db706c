"""``afbs::SparseAttention`` in standard ONNX operators: the bodies that let any runtime run the node without us.

The bodies follow the plain-PyTorch specification line by line, in fp32 and in its order of operations, so that they
select the same blocks: ``PredictMask`` is :func:`afbs_compile.kernels.policy.predict_mask`, ``BlockStatistics`` and
``SelectByMass`` are ``block_statistics`` and ``select_blocks`` of :mod:`afbs_compile.kernels.reference`, ``BlockMass``
is ``block_mass`` of :mod:`afbs_compile.kernels.policies.grouped`. ``SparseAttention`` walks over batch, heads and query
blocks, gathers the live key blocks of each, and attends to those alone: what is not live is not computed, and no N x N
tensor exists. ``lam`` is carried for runtimes with a kernel of their own; like the CPU engine, the body skips no
product with V, which is never less accurate. The attribute ``policy_code`` says the policy of each head (strings cannot
be compared before opset 19).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from afbs_compile.export.onnx_grouped import GROUPED
from afbs_compile.export.onnx_predict import PREDICTION
from afbs_compile.export.onnx_rules import RULES

if TYPE_CHECKING:
    import onnx

DOMAIN, NAME, VERSION = "afbs", "SparseAttention", 1

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
SparseAttention <tau, theta, lam, policy, policy_code, is_causal, scale, block_q, block_k, min_length, max_length,
    predictor_version, last_rows: int = 0, local_keys: int = 0>
    (q, k, v) => (out)
{
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
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

    live = afbs.PredictMask <tau: floats = @tau, theta: floats = @theta, policy_code: ints = @policy_code,
        is_causal: int = @is_causal, scale: float = @scale, block_q: int = @block_q, block_k: int = @block_k,
        last_rows: int = @last_rows, local_keys: int = @local_keys, min_length: int = @min_length,
        max_length: int = @max_length>
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

BODIES = (*RULES, *GROUPED, *PREDICTION, IN_BLOCKS, SPARSE_ATTENTION)


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
