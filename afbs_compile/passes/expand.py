"""Open the fused functions of ``torch.nn`` that hide a scaled-dot-product-attention call from the graph.

Dynamo does not trace into ``F.multi_head_attention_forward`` (nn.MultiheadAttention), and nn.TransformerEncoderLayer
calls one fused operator when no gradient is needed. Each becomes the operators that PyTorch documents it to compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from afbs_compile.passes.build import VALUE_KEYS, erase_unused
from afbs_compile.passes.effects import value_of

SYMBOLIC = (Tensor, torch.SymInt, torch.SymFloat)


def expand(gm: fx.GraphModule) -> int:
    """Replace fused attention functions by their parts, in place, so that ``find`` sees the attention.

    Left alone, for ``find`` to refuse: calls that need a gradient, whose attention weights are used, encoder layers
    with a mask, and calls whose parts cannot be traced.

    Returns:
        How many calls were opened.
    """
    opened = sum(_expand_node(node) for node in list(gm.graph.nodes) if node.target in _BODIES)
    if opened:
        gm.graph.lint()
        gm.recompile()
    return opened


def _expand_node(node: fx.Node) -> bool:
    output = _used_output(node)
    if output is None or not isinstance(value_of(output), FakeTensor) or value_of(output).requires_grad:
        return False
    traced = _trace(node)
    if traced is None or not _computes(traced[0], output):
        return False
    output.replace_all_uses_with(_inline(*traced, node, output))
    erase_unused(node.graph, [user for user in node.users if not user.users])
    node.graph.erase_node(node)
    return True


def _used_output(node: fx.Node) -> fx.Node | None:
    """The node that holds the attention output, where nothing else of the call is used."""
    if node.target is not F.multi_head_attention_forward:
        return node
    used = [user for user in node.users if user.users]
    if len(used) == 1 and used[0].op == "call_function" and used[0].args[1:] == (0,):
        return used[0]
    return None


def _trace(node: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]] | None:
    """The function's parts as a graph over aten, and the nodes that are its inputs."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs), is_leaf=lambda item: isinstance(item, fx.Node))
    values = [value_of(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    places = [place for place, value in enumerate(values) if isinstance(value, SYMBOLIC)]
    function = _BODIES[node.target]

    def body(*inputs: Any) -> Tensor:
        filled = list(values)
        for place, value in zip(places, inputs, strict=True):
            filled[place] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    try:
        with torch.no_grad():
            traced = make_fx(body, pre_dispatch=True)(*(values[place] for place in places))
    except Exception:  # an unusual call that PyTorch may still run: it stays fused
        return None
    return traced, [leaves[place] for place in places]


def _computes(body: fx.GraphModule, output: fx.Node) -> bool:
    """Whether a traced body is self-contained and its result has the output's dtype.

    Under autocast it has not: the trace does not see an autocast region of the graph.
    """
    result = body.graph.output_node().args[0]
    if any(inner.op not in ("placeholder", "call_function", "output") for inner in body.graph.nodes):
        return False
    return isinstance(result, fx.Node) and bool(value_of(result).dtype == value_of(output).dtype)


def _inline(body: fx.GraphModule, inputs: list[fx.Node], node: fx.Node, output: fx.Node) -> fx.Node:
    """Copy a traced body before ``node`` and return the copy of its result, which stands for ``output``."""
    key = next(key for key in VALUE_KEYS if key in output.meta)
    copies: dict[fx.Node, fx.Node] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with node.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "call_function":
                copy = copies[inner] = node.graph.node_copy(inner, copies.__getitem__)
                copy.meta = {name: item for name, item in node.meta.items() if name not in VALUE_KEYS}
                copy.meta[key] = value_of(inner)
    result = body.graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    return copies[result]


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """``F.multi_head_attention_forward`` without the attention weights."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.arguments["need_weights"]:
        # It then obeyed the mask; without weights it would trust the is_causal hint instead.
        bound.arguments.update(need_weights=False, is_causal=False)
    if not bound.arguments["training"]:
        bound.arguments["dropout_p"] = 0.0
    output: Tensor = F.multi_head_attention_forward(*bound.args, **bound.kwargs)[0]
    return output


def _encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """``torch._transformer_encoder_layer_fwd`` on ``src [B, N, E]``.

    Raises:
        NotImplementedError: there is a mask. The fused operator broadcasts it over batch and heads without copying;
            opened and then refused, the call would hold ``B * H * N * N`` mask elements.
    """
    if mask is not None:
        raise NotImplementedError("mask")

    def attend(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1)
        out: Tensor = F.multi_head_attention_forward(
            rows, rows, rows, embed_dim, num_heads, qkv_weight, qkv_bias, None, None, False, 0.0,
            proj_weight, proj_bias, training=False, need_weights=False,
        )[0]  # fmt: skip
        return out.transpose(0, 1)

    def feed_forward(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attend(norm_1(src))
        return src + feed_forward(norm_2(src))
    src = norm_1(src + attend(src))
    return norm_2(src + feed_forward(src))


_BODIES: dict[Any, Callable[..., Tensor]] = {
    F.multi_head_attention_forward: _attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}
