"""The calls that compute attention, under every name a captured graph may use, and their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from afbs_compile.passes.effects import function_name, value_of

SDPA = frozenset({
    F.scaled_dot_product_attention,  # also torch._C._nn.scaled_dot_product_attention: the same object
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
})  # fmt: skip

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

WRITTEN = "afbs_written_call"
"""Under which a node's ``meta`` keeps the call that :func:`mark` was given."""

UNREAD = "afbs_unread_attention"
"""The same for :func:`mark_unread`."""

CALL_SDPA = "call F.scaled_dot_product_attention instead"
NO_FAST_PATH = "call torch.backends.mha.set_fastpath_enabled(False) before compiling"

FUSED = {
    "multi_head_attention_forward": "pass need_weights=False",
    "_native_multi_head_attention": NO_FAST_PATH,
    "_transformer_encoder_layer_fwd": NO_FAST_PATH,
    "_scaled_dot_product_flash_attention": CALL_SDPA,
    "_scaled_dot_product_flash_attention_for_cpu": CALL_SDPA,
    "_scaled_dot_product_efficient_attention": CALL_SDPA,
    "_scaled_dot_product_cudnn_attention": CALL_SDPA,
    "_scaled_dot_product_attention_math": CALL_SDPA,
}
"""PyTorch functions with attention inside that a graph does not show, and what the user can do about it."""


@dataclass(frozen=True, eq=False)
class Call:
    """One scaled-dot-product-attention call as the graph spells it.

    Attributes:
        node: the call, or the last product of one that is written out.
        q, k, v, mask: its operands; ``mask`` is None where nothing is masked.
        dropout, is_causal, scale, enable_gqa: numbers and flags, or nodes where the graph computes them.
        spelling: what the graph calls it.
        softcap, sinks: as in :class:`afbs_compile.kernels.operands.Operands`, 0 and ``None`` for none.
        weights_used: whether the graph reads the softmax weights for anything else.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    dropout: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any
    spelling: str = "scaled_dot_product_attention"
    softcap: float = 0.0
    sinks: fx.Node | None = None
    weights_used: bool = False

    @classmethod
    def of(cls, node: fx.Node) -> Call:
        """Read the arguments, positional or by name; of a written-out call, what was marked."""
        if (written := written_call(node)) is not None:
            return written
        given: dict[str, Any] = {**dict(zip(PARAMETERS, node.args, strict=False)), **node.kwargs}
        return cls(
            node=node,
            q=given["query"],
            k=given["key"],
            v=given["value"],
            mask=given.get("attn_mask"),
            dropout=given.get("dropout_p", 0.0),
            is_causal=given.get("is_causal", False),
            scale=given.get("scale"),
            enable_gqa=given.get("enable_gqa", False),
        )

    @property
    def tensors(self) -> tuple[Any, Any, Any]:
        """Fake values of q, k and v."""
        return value_of(self.q), value_of(self.k), value_of(self.v)

    @property
    def result(self) -> Any:
        """Fake value of the output."""
        return value_of(self.node)


def is_sdpa(node: fx.Node) -> bool:
    """Whether a node calls ``scaled_dot_product_attention``."""
    return node.op == "call_function" and node.target in SDPA


def is_attention(node: fx.Node) -> bool:
    """Whether a node is an attention call that :class:`Call` can read, spelled as one function or written out."""
    return is_sdpa(node) or written_call(node) is not None


def mark(call: Call) -> None:
    """Remember at the last product of a written-out call what the call is."""
    call.node.meta[WRITTEN] = call


def mark_unread(node: fx.Node, reason: str) -> None:
    """Remember at the last product of written-out attention why it cannot be read."""
    node.meta[UNREAD] = node, reason


def unread_reason(node: fx.Node) -> str | None:
    """The clause that :func:`mark_unread` was given; ``None`` for any other node."""
    marked, reason = node.meta.get(UNREAD, (None, None))
    return reason if marked is node else None


def written_call(node: fx.Node) -> Call | None:
    """The written-out call that ends in a node; ``None`` for any other node, and for copies of such a graph."""
    call = node.meta.get(WRITTEN)
    return call if isinstance(call, Call) and call.node is node else None


def is_flex_attention(node: fx.Node) -> bool:
    """Whether a node is a FlexAttention call."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.flex_attention


def fused_name(node: fx.Node) -> str | None:
    """Name of the PyTorch function that hides an attention call; None for any other node."""
    name = function_name(node)
    return name if node.op == "call_function" and name in FUSED else None
