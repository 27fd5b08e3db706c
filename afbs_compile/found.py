"""A captured graph after ``find``: its attention calls and what identifies it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from afbs_compile.fingerprint import graph_digest, parameters_of, tensor_digest
from afbs_compile.passes.expand import expand
from afbs_compile.passes.find import find
from afbs_compile.passes.site import AttentionSite, Refusal


@dataclass(frozen=True)
class FoundGraph:
    """A graph and every attention call in it.

    Attributes:
        sites, refusals: the attention calls, each in graph order.
        parameters: names and values.
        graph: digest of the calls' names and the parameters' shapes; weights: digest of the parameters' values, empty
            where there is no site to calibrate.
    """

    gm: fx.GraphModule
    sites: list[AttentionSite]
    refusals: list[Refusal]
    parameters: list[tuple[str, Tensor]]
    graph: str
    weights: str

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any], min_length: int) -> FoundGraph:
        """Open fused attention modules, find the attention calls, and fingerprint the graph; changes it in place."""
        expand(gm)
        sites, refusals = find(gm, min_length=min_length)
        parameters = parameters_of(gm, example_inputs)
        # Sorted, because a call may be a site at one length and refused at another.
        names = sorted([site.name for site in sites] + [refusal.name for refusal in refusals])
        weights = tensor_digest(tensor for _, tensor in parameters) if sites else ""
        return cls(gm, sites, refusals, parameters, graph_digest(names, parameters), weights)
