"""Mark calls of ``torch.nn.attention.varlen.varlen_attn`` with the attention call that they are.

Sequences packed one after the other are one long sequence whose rows see their own document only: q, k and v
``[tokens, heads, head_dim]`` become ``[1, heads, tokens, head_dim]``, and the mask is a band (``window_size``) AND "of
the same document", a bool tensor of tokens x tokens that the layers share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor

from afbs_compile.passes.build import NodeBuilder, aten
from afbs_compile.passes.effects import Writes, function_name, storage_of, value_of
from afbs_compile.passes.operands import Call, mark, mark_unread
from afbs_compile.passes.sizes import Size, same_sizes

NAME = "_varlen_attn"
NAMESPACE = "torch_attn"

Arguments = Mapping[str, Any]


def mark_varlen(gm: fx.GraphModule) -> None:
    """Mark every ``varlen_attn`` whose queries and keys are packed alike, in place; the graph computes the same.

    Others are marked with why they cannot be read.
    """
    calls = [node for node in gm.graph.nodes if function_name(node) == NAME and _is_torchs_own(node.target)]
    if not calls:
        return
    masks = _Masks(Writes(gm.graph))
    for node in calls:
        _mark(node, masks)
    gm.graph.lint()
    gm.recompile()


def _is_torchs_own(target: Any) -> bool:
    if isinstance(target, OpOverload):
        return target.namespace == NAMESPACE
    return isinstance(target, OpOverloadPacket) and target._qualified_op_name.startswith(f"{NAMESPACE}::")


def _mark(node: fx.Node, masks: _Masks) -> None:
    given = _arguments(node)
    output = next((user for user in node.users if user.args[1:] == (0,)), None)
    if output is None or not isinstance(value_of(output), FakeTensor):
        return
    if (reason := masks.refusal(node, output, given)) is not None:
        mark_unread(node, reason)
        return
    before, after = NodeBuilder(output), NodeBuilder(output, before=output.next)
    q, k, v = (_headed(before, given[name]) for name in ("query", "key", "value"))
    mask = masks.of(before, given)
    result = _headed(after, output)
    back = after.call(aten.permute.default, (after.call(aten.squeeze.dim, (result, 0)), [1, 0, 2]))
    (permuted,) = result.all_input_nodes
    output.replace_all_uses_with(back, delete_user_cb=lambda user: user is not permuted)
    mark(
        Call(
            node=result,
            q=q,
            k=k,
            v=v,
            mask=mask,
            dropout=0.0,
            is_causal=False,
            scale=given.get("scale"),
            enable_gqa=given.get("enable_gqa", False),
            spelling="varlen_attn",
        )
    )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """By the operator's own names, with its defaults."""
    target: Any = node.target
    schema = (target if isinstance(target, OpOverload) else target.default)._schema
    given = {argument.name: argument.default_value for argument in schema.arguments}
    names = [argument.name for argument in schema.arguments]
    return {**given, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _headed(build: NodeBuilder, node: fx.Node) -> fx.Node:
    """``[tokens, heads, head_dim]`` as ``[1, heads, tokens, head_dim]``."""
    return build.call(aten.unsqueeze.default, (build.call(aten.permute.default, (node, [1, 0, 2])), 0))


class _Masks:
    """The masks of a graph's calls; layers that are packed alike share one."""

    def __init__(self, writes: Writes) -> None:
        self._writes = writes
        self._made: dict[tuple[Any, ...], fx.Node] = {}
        self._first: dict[fx.Node, fx.Node] = {}

    def refusal(self, node: fx.Node, output: fx.Node, given: Arguments) -> str | None:
        """A clause that says why a call is not that of one long sequence."""
        starts, q, k = given["cu_seq_q"], given["query"], given["key"]
        if any(user.users for user in node.users if user is not output):
            return "its log-sum-exp is used"
        if given["cu_seq_k"] is not starts or not same_sizes(value_of(q).shape[:1], value_of(k).shape[:1]):
            return "its keys are not packed as its queries are, by one and the same tensor of positions"
        if given.get("seqused_k") is not None or given.get("block_table") is not None:
            return "its keys lie in a cache of pages or of another length"
        if not all(isinstance(bound, int) for bound in given.get("window_size") or ()):
            return "its window is computed in the graph"
        first = self._first.setdefault(starts, node)
        storage = storage_of(starts)
        if storage is None or self._writes.into({storage}, after=first, before=node):
            return "its tensor of positions is written into between two calls"
        return None

    def of(self, build: NodeBuilder, given: Arguments) -> fx.Node:
        """Bool ``[tokens, tokens]``: which keys a row sees."""
        starts, q = given["cu_seq_q"], given["query"]
        window = (-1, 0) if given["is_causal"] else tuple(given.get("window_size") or (-1, -1))
        key = (starts, str(value_of(q).shape[0]), window)
        if key not in self._made:
            self._made[key] = _mask(build, starts, q, window)
        return self._made[key]


def _mask(build: NodeBuilder, starts: fx.Node, q: fx.Node, window: tuple[int, int]) -> fx.Node:
    value = value_of(starts)
    tokens: Size | fx.Node = value_of(q).shape[0]
    if isinstance(tokens, torch.SymInt):
        tokens = build.call(aten.sym_size.int, (q, 0))
    places = build.call(aten.arange.default, (tokens,), {"dtype": value.dtype, "device": value.device})
    document = build.call(aten.searchsorted.Tensor, (starts, places), {"right": True})
    mask = build.call(aten.eq.Tensor, (_column(build, document), _row(build, document)))
    ahead = build.call(aten.sub.Tensor, (_row(build, places), _column(build, places)))
    left, right = window
    bands = [(aten.le.Scalar, right)] if right >= 0 else []
    bands += [(aten.ge.Scalar, -left)] if left >= 0 else []
    for compare, bound in bands:
        mask = build.call(aten.logical_and.default, (build.call(compare, (ahead, bound)), mask))
    return mask


def _column(build: NodeBuilder, node: fx.Node) -> fx.Node:
    return build.call(aten.unsqueeze.default, (node, 1))


def _row(build: NodeBuilder, node: fx.Node) -> fx.Node:
    return build.call(aten.unsqueeze.default, (node, 0))
