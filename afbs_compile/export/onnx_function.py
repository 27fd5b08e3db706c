"""``afbs::SparseAttention`` in standard ONNX operators: the bodies that let any runtime run the node without us.

The bodies follow the plain-PyTorch specification (:mod:`afbs_compile.kernels.spec`) line by line, in fp32 and in its
order of operations, so that they select the same blocks; each policy has its own in its file. ``SparseAttention`` walks
over batch, heads and query blocks, gathers the live key blocks of each, and attends to those alone: what is not live is
not computed, and no N x N tensor exists. ``lam`` is carried for runtimes with a kernel of their own; like the CPU
engine, the body skips no product with V, which is never less accurate. Strings cannot be compared before opset 19, so
the body reads ``policy_code``, ``upper`` and ``offset`` where a reader or another kernel reads ``policy`` and ``mask``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from afbs_compile.export.onnx_predict import prediction
from afbs_compile.export.onnx_rules import RULES

if TYPE_CHECKING:
    import onnx

DOMAIN, NAME = "afbs", "SparseAttention"

VERSION = 2
"""Of the domain and the node. Version 1 had the attribute ``is_causal`` in place of ``mask``, ``upper`` and ``offset``,
and other codes of policies."""

SPARSE_ATTENTION = """
SparseAttention <tau, theta, lam, policy, policy_code, mask, upper, offset, scale, block_q, block_k, last_rows,
    local_keys, min_length, max_length, predictor_version>
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
    reach = Constant <value_int: int = @upper> ()
    scaling = Constant <value_float: float = @scale> ()
    q32 = Cast <to = 1> (q)
    k32 = Cast <to = 1> (k)
    v32 = Cast <to = 1> (v)

    live = afbs.PredictMask <tau: floats = @tau, theta: floats = @theta, policy_code: ints = @policy_code,
        upper: int = @upper, offset: int = @offset, scale: float = @scale, block_q: int = @block_q,
        block_k: int = @block_k, last_rows: int = @last_rows, local_keys: int = @local_keys,
        min_length: int = @min_length, max_length: int = @max_length>
        (q32, k32)
    count_q1 = Shape <start = 2, end = 3> (live)
    count_k1 = Shape <start = 3, end = 4> (live)
    count_q = Squeeze (count_q1)
    count_k = Squeeze (count_k1)
    live_shape = Concat <axis = 0> (minus_one, count_k1)
    live_rows = Reshape (live, live_shape)
    q_scaled = Mul (q32, scaling)
    dim1 = Shape <start = 3, end = 4> (q)
    one1 = Constant <value = int64[1] {1}> ()
    size_q1 = Reshape (size_q, one1)
    size_k1 = Reshape (size_k, one1)
    q_shape = Concat <axis = 0> (minus_one, size_q1, dim1)
    k_shape = Concat <axis = 0> (minus_one, size_k1, dim1)
    q_5d, sizes_q = afbs.InBlocks (q_scaled, size_q)
    k_5d, sizes_k = afbs.InBlocks (k32, size_k)
    v_5d, sizes_v = afbs.InBlocks (v32, size_k)
    q_blocks = Reshape (q_5d, q_shape)
    k_blocks = Reshape (k_5d, k_shape)
    v_blocks = Reshape (v_5d, k_shape)
    keys_shape = Concat <axis = 0> (minus_one, dim1)
    heads1 = Shape <start = 1, end = 2> (q)
    kv_heads1 = Shape <start = 1, end = 2> (k)
    q_len1 = Shape <start = 2, end = 3> (q)
    k_len1 = Shape <start = 2, end = 3> (k)
    heads = Squeeze (heads1)
    kv_heads = Squeeze (kv_heads1)
    k_len = Squeeze (k_len1)
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
        # -inf where the key is hidden from the row, or lies after the end
        first_row = Mul (block, size_q)
        rows_flat = Add (rows_in_block, first_row)
        row = Unsqueeze (rows_flat, key_axis)
        first_keys_flat = Mul (blocks, size_k)
        first_keys = Unsqueeze (first_keys_flat, key_axis)
        keys_2d = Add (first_keys, keys_in_block)
        key = Reshape (keys_2d, minus_one)
        exists = Less (key, k_len)
        furthest = Add (row, reach)
        in_reach = LessOrEqual (key, furthest)
        allowed = And (in_reach, exists)
        scores = Where (allowed, raw_scores, lowest)
        weights = Softmax <axis = -1> (scores)
        attended = MatMul (weights, values)
    }>
    batch_heads = Shape <start = 0, end = 2> (q)
    out_shape = Concat <axis = 0> (batch_heads, minus_one, dim1)
    out_padded = Reshape (out_blocks, out_shape)
    out32 = Slice (out_padded, zero1, q_len1, row_axis)
    out = CastLike (out32, q)
}
"""


def function_protos(opset: int) -> list[onnx.FunctionProto]:
    """The functions that a model with ``afbs::SparseAttention`` nodes carries, by the policies that are registered now.

    Args:
        opset: version of the standard operators that the model imports, 18 to 23.
    """
    import onnx.parser

    header = f'<opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">'
    functions = []
    for body in (*RULES, *prediction(), SPARSE_ATTENTION):
        text = "\n".join(line for line in body.splitlines() if not line.strip().startswith("#"))
        functions.append(onnx.parser.parse_function(header + text))
    return functions
