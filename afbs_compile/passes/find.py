"""Find every attention call of a graph and bring it into canonical form, or say why it stays dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from torch import fx

from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.passes.constants import ConstantTensors
from afbs_compile.passes.effects import submodule_of, value_of
from afbs_compile.passes.kv_heads import head_repeat
from afbs_compile.passes.mask_parts import MaskParts, MaskReader
from afbs_compile.passes.names import SiteNames
from afbs_compile.passes.operands import Call, is_attention
from afbs_compile.passes.rules import first_refusal, hidden_refusal, too_short
from afbs_compile.passes.site import AttentionSite, Refusal
from afbs_compile.passes.sizes import Size, fixed, holds


def find(
    gm: fx.GraphModule, *, min_length: int, prefixes: Mapping[str, str] | None = None
) -> tuple[list[AttentionSite], list[Refusal]]:
    """Every attention call of a graph, accepted or refused, each in graph order. The graph is not changed.

    Inside a Dynamo backend the answer may rest on symbolic sizes; each such condition becomes a guard, so the graph is
    compiled again where it does not hold: ``length >= min_length`` for a dynamic length, the number of heads, and for
    a dense mask the exact length that it was proven at. Outside (torch.export), and for sizes marked dynamic, a
    condition that does not hold for every size refuses the call, except ``min_length``: the operator checks it again
    when it runs. A dense mask is then proven for every length at once, or read when the graph runs.

    Args:
        gm: a graph from Dynamo, before AOTAutograd, or from torch.export, before decompositions.
        min_length: shortest sequence worth rewriting.
        prefixes: of names, as in :class:`afbs_compile.passes.names.SiteNames`.
    """
    return _Finder(gm, min_length, prefixes).find()


class _Finder:
    def __init__(self, gm: fx.GraphModule, min_length: int, prefixes: Mapping[str, str] | None) -> None:
        self._gm = gm
        self._min_length = min_length
        self._names = SiteNames(prefixes)
        self._constants = ConstantTensors(gm)
        self._masks = MaskReader(self._constants)
        self._sites: list[AttentionSite] = []
        self._refusals: list[Refusal] = []

    def find(self) -> tuple[list[AttentionSite], list[Refusal]]:
        for node in self._gm.graph.nodes:
            if is_attention(node):
                self._take(node)
            elif reason := hidden_refusal(node):
                self._refuse(node, reason)
            elif body := submodule_of(node):
                for inner in _attention_nodes(body):
                    self._refuse(inner, _inside_operator(node), at=node)
        return self._sites, self._refusals

    def _take(self, node: fx.Node) -> None:
        call = Call.of(node)
        try:
            parts = self._accept(call)
        except _RefusedError as refused:
            self._refuse(node, str(refused))
        else:
            self._sites.append(self._site(call, parts))

    def _refuse(self, node: fx.Node, reason: str, at: fx.Node | None = None) -> None:
        self._refusals.append(Refusal(self._names.name(node), reason, at or node))

    def _accept(self, call: Call) -> MaskParts:
        """What hides keys in an accepted call. The length is asked first: evaluating a mask pins it."""
        if sentence := first_refusal(call):
            raise _RefusedError(sentence)
        q_len, k_len = (tensor.shape[-2] for tensor in call.tensors[:2])
        if holds(q_len * k_len < self._min_length**2):
            raise _RefusedError(too_short(q_len, k_len, self._min_length))
        if call.mask is None:
            return MaskParts(Causal() if call.is_causal else Full())
        return self._masks.parts(call.mask, site=call.node, lengths=(q_len, k_len))

    def _site(self, call: Call, parts: MaskParts) -> AttentionSite:
        q = call.tensors[0]
        k, v = self._unrepeated(call)
        four_d = q.dim() >= 4
        return AttentionSite(
            name=self._names.name(call.node),
            node=call.node,
            q=call.q,
            k=k,
            v=v,
            mask=parts.mask,
            valid=parts.valid,
            attn_mask=parts.attn_mask,
            scale=_scale(call),
            softcap=call.softcap,
            sinks=call.sinks,
            batch=prod(q.shape[: -3 if four_d else -2]),
            q_len=q.shape[-2],
            k_len=call.tensors[1].shape[-2],
            heads=_known(q.shape[-3]) if four_d else 1,
            kv_heads=_known(value_of(k).shape[-3]) if four_d else 1,
            head_dim=_known(q.shape[-1]),
            value_dim=_known(call.tensors[2].shape[-1]),
            rank=q.dim(),
            dtype=call.result.dtype,
            device=q.device,
        )

    def _unrepeated(self, call: Call) -> tuple[fx.Node, fx.Node]:
        """Key and value before the graph repeated their heads, if it did so to both alike."""
        if call.tensors[0].dim() < 4:
            return call.k, call.v
        writes = self._constants.writes
        k, v = (head_repeat(node, writes, before=call.node) for node in (call.k, call.v))
        if k is None or v is None or k.repeats != v.repeats:
            return call.k, call.v
        return k.source, v.source


class _RefusedError(Exception):
    """Carries the sentence of a refusal."""


def _scale(call: Call) -> float | fx.Node:
    if isinstance(call.scale, fx.Node):
        return call.scale
    return float(call.scale) if call.scale is not None else _known(call.tensors[0].shape[-1]) ** -0.5


def _known(size: Size) -> int:
    """A size that a rule has already pinned."""
    number = fixed(size)
    assert number is not None
    return number


def _attention_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Attention calls of a graph and of the graphs inside it."""
    for node in gm.graph.nodes:
        if is_attention(node) or hidden_refusal(node):
            yield node
        elif body := submodule_of(node):
            yield from _attention_nodes(body)


def _inside_operator(node: fx.Node) -> str:
    """The sentence for attention in a graph that ``node`` hands to an operator such as checkpoint or cond."""
    operator = next((str(user.target) for user in node.users), "a submodule call")
    return f"inside a higher-order operator: {operator} runs it from a graph of its own; call it outside of that"
