"""Why an attention call stays dense: one rule a function, each with a sentence for the user.

A rule gets a call that passed the rules before it and returns None or a sentence that starts with the kind of refusal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from afbs_compile.kernels.operands import DTYPES, HEAD_DIMS
from afbs_compile.passes.effects import value_of
from afbs_compile.passes.operands import CALL_SDPA, FUSED, Call, fused_name, is_flex_attention, unread_reason
from afbs_compile.passes.sizes import Size, fixed, holds, shown

RANKS = range(2, 6)

FEWEST_ROWS = 16
"""Query rows from which a call is looked at: the fewest that a block has."""

GRADIENT = "gradient needed: the output requires grad; run under torch.no_grad() or torch.inference_mode()"

Rule = Callable[[Call], str | None]


def layout(call: Call) -> str | None:
    """Shapes are known and the tensors are strided ones on one device."""
    for value in (*call.tensors, call.result):
        if not isinstance(value, Tensor):
            return "unsupported layout: the graph records no shape for this call; capture it with torch.compile"
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            return "unsupported layout: the call is inside torch.vmap or torch.func; call it on batched tensors instead"
        if value.is_nested or value.layout != torch.strided:
            return "unsupported layout: nested or sparse tensors; strided ones are accepted (pad the batch)"
    places = [str(value.device) for value in call.tensors]
    if len(set(places)) > 1:
        return f"unsupported device: q, k, v are on {', '.join(places)}; all on one device are accepted"
    return None


def rank(call: Call) -> str | None:
    """Operands have the same number of dimensions, 2 to 5."""
    ranks = {value.dim() for value in call.tensors}
    if len(ranks) > 1 or not ranks <= set(RANKS):
        return f"unsupported shape: {_shapes(call)}; the same 2 to 5 dimensions are accepted for q, k and v"
    return None


def weights(call: Call) -> str | None:
    """Nothing but the product with v reads the softmax weights."""
    if not call.weights_used:
        return None
    return (
        "attention weights used: the graph returns or reads the softmax weights, which a sparse call does not have; "
        "call the model without output_attentions"
    )


def rows(call: Call) -> str | None:
    """Enough query rows that blocks of them share keys: a decode step has one.

    As few keys make no decode step: such a call is too short, by the length asked for.
    """
    q, k, _ = call.tensors
    if not holds(q.shape[-2] < FEWEST_ROWS) or holds(q.shape[-2] >= k.shape[-2]):
        return None
    return (
        f"decoding: {shown(q.shape[-2])} query rows against {shown(k.shape[-2])} keys; a few rows read every key once, "
        f"so there is no work to save, and calls of fewer than {FEWEST_ROWS} rows stay dense"
    )


def dropout(call: Call) -> str | None:
    """Nothing is dropped."""
    value = value_of(call.dropout) if isinstance(call.dropout, fx.Node) else call.dropout
    if isinstance(value, int | float | torch.SymFloat) and holds(value == 0):
        return None
    given = value.node.hint if isinstance(value, torch.SymFloat) and value.node.has_hint() else call.dropout
    return f"dropout in effect: dropout_p={given}; call model.eval() first"


def gradient(call: Call) -> str | None:
    """No backward pass runs through the call."""
    return GRADIENT if call.result.requires_grad else None


def dtype(call: Call) -> str | None:
    """It computes in an accepted dtype: that of its output, also where autocast changes it inside the call."""
    if call.result.dtype in DTYPES:
        return None
    found = ", ".join(_short(value.dtype) for value in call.tensors)
    return (
        f"unsupported dtype: q, k, v are {found}; float16, bfloat16 and float32 are accepted (load the model in one of "
        "them, or run it under torch.autocast)"
    )


def head_dim(call: Call) -> str | None:
    """Head sizes that are known, and that the kernels have."""
    q, k, v = (fixed(value.shape[-1]) for value in call.tensors)
    same_rank = len(call.tensors[0].shape) <= 4 or q == v
    if q == k and same_rank and all(size in HEAD_DIMS for size in (q, v)):
        return None
    found = ", ".join(str(shown(value.shape[-1])) for value in call.tensors)
    return f"unsupported head_dim: q, k, v have {found}; sizes from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} are accepted"


def batch(call: Call) -> str | None:
    """Operands share all dimensions before the heads; k and v agree in everything."""
    q, k, v = (value.shape for value in call.tensors)
    before_heads = -2 if len(q) < 4 else -3
    pairs = [*zip(q[:before_heads], k[:before_heads], strict=True), *zip(k[:-1], v[:-1], strict=True)]
    if all(holds(a == b) for a, b in pairs):
        return None
    return (
        f"unsupported shape: {_shapes(call)}; one batch for q, k, v, and one number of heads for k and v, is accepted"
    )


def heads(call: Call) -> str | None:
    """Each key head serves the same whole number of query heads."""
    q, k, _ = call.tensors
    if q.dim() < 4:
        return None
    count, kv_count = fixed(q.shape[-3]), fixed(k.shape[-3])
    if count is None or kv_count is None:
        return f"unsupported shape: {_shapes(call)}; numbers of heads that are the same in every call are accepted"
    if kv_count == 1 or kv_count == count != 0 or (kv_count and call.enable_gqa is True and count % kv_count == 0):
        return None
    return (
        f"unsupported shape: {count} query heads over {kv_count} key heads; with enable_gqa=True a multiple is accepted"
    )


def causal_flag(call: Call) -> str | None:
    """Either a plain ``is_causal`` or a mask."""
    if not isinstance(call.is_causal, bool):
        return "unsupported mask: is_causal is computed in the graph; pass True or False"
    if call.is_causal and call.mask is not None:
        return "unsupported mask: is_causal=True together with attn_mask; pass one of them"
    return None


def mask_shape(call: Call) -> str | None:
    """A mask with the dimensions of the operands, or fewer."""
    if call.mask is None:
        return None
    value, q = value_of(call.mask), call.tensors[0]
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
        return "unsupported mask: its shape is not recorded, or it is nested or sparse; pass a strided tensor"
    leading = value.shape[:-3] if q.dim() > 4 else ()
    if value.dim() > q.dim() or not (all(_is_one(n) for n in leading) or len(leading) == q.dim() - 3):
        return f"unsupported mask: shape {[shown(n) for n in value.shape]} over {_shapes(call)}; expand it to q's batch"
    return None


def _is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


RULES: tuple[Rule, ...] = (
    layout, rank, weights, rows, dropout, gradient, dtype, head_dim, batch, heads, causal_flag, mask_shape,
)  # fmt: skip
"""In the order in which they are asked; what cannot be changed by the user's next step comes first."""


def first_refusal(call: Call) -> str | None:
    """The sentence of the first rule that a call breaks; None where it keeps all."""
    return next((sentence for rule in RULES if (sentence := rule(call)) is not None), None)


def hidden_refusal(node: fx.Node) -> str | None:
    """The sentence for attention that is no SDPA call; None for a node that is no attention."""
    if is_flex_attention(node):
        return "flex_attention: it carries its own block mask; F.scaled_dot_product_attention is accepted"
    if (reason := unread_reason(node)) is not None:
        return f"attention written out: {reason}; {CALL_SDPA}"
    if (name := fused_name(node)) is None:
        return None
    outputs = value_of(node)
    first = outputs[0] if isinstance(outputs, tuple | list) else outputs
    if isinstance(first, Tensor) and first.requires_grad:
        return GRADIENT
    return f"fused operator: {name} hides its attention from the graph; {FUSED[name]}"


def too_short(q_len: Size, k_len: Size, min_length: int) -> str:
    """The sentence for a call on which sparse attention would not pay."""
    return f"too short: {work_of(q_len, k_len)}; sparse attention is worth it here from {min_length} on"


def work_of(q_len: Size, k_len: Size) -> str:
    """How long a call is, for the user to read."""
    if shown(q_len) == shown(k_len):
        return f"{shown(q_len)} tokens"
    return f"{shown(q_len)} query rows over {shown(k_len)} keys"


def _shapes(call: Call) -> str:
    q, k, v = ([shown(size) for size in value.shape] for value in call.tensors)
    return f"q {q}, k {k}, v {v}"


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
