"""A captured graph after ``find``: its attention calls and what identifies it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from afbs_compile.fingerprint import graph_digest, module_tensors, source_digest, tensor_digest
from afbs_compile.passes.expand import expand
from afbs_compile.passes.find import find
from afbs_compile.passes.marking import mark_calls
from afbs_compile.passes.site import AttentionSite, Refusal


@dataclass(frozen=True)
class FoundGraph:
    """A graph and every attention call in it.

    Attributes:
        sites, refusals: the attention calls, each in graph order.
        tensors: names and values of parameters and buffers.
        graph: digest of the calls' names and the tensors' shapes; weights: digest of the tensors' values, empty where
            there is no site to calibrate; source: digest of the code that makes the calls.
    """

    gm: fx.GraphModule
    sites: list[AttentionSite]
    refusals: list[Refusal]
    tensors: list[tuple[str, Tensor]]
    graph: str
    weights: str
    source: str

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any], min_length: int) -> FoundGraph:
        """Open fused modules, find the attention calls, and fingerprint the graph, which is changed in place."""
        expand(gm)
        mark_calls(gm)
        sites, refusals = find(gm, min_length=min_length)
        tensors = module_tensors(gm, example_inputs)
        # Sorted, because a call may be a site at one length and refused at another.
        names = sorted([site.name for site in sites] + [refusal.name for refusal in refusals])
        weights = tensor_digest(tensor for _, tensor in tensors) if sites else ""
        source = source_digest(site.node for site in sites)
        return cls(gm, sites, refusals, tensors, graph_digest(names, tensors), weights, source)
