"""A captured graph after ``find``: its attention calls and what identifies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from afbs_compile.fingerprint import digest_of, graph_digest, module_tensors, plain_name, source_digest
from afbs_compile.passes.expand import expand
from afbs_compile.passes.find import find
from afbs_compile.passes.marking import mark_calls
from afbs_compile.passes.site import AttentionSite, Refusal
from afbs_compile.peers import Part, Peers, part_of
from afbs_compile.sketch import TensorSketch, sketched


@dataclass(frozen=True)
class FoundGraph:
    """A graph and every attention call in it.

    Attributes:
        sites, refusals: the attention calls, each in graph order.
        tensors: names and values of parameters and buffers.
        graph: digest of the calls' names and the tensors' shapes; source: digest of the code that makes the calls.
        sketches: what tells the tensors' values; none where there is no site to calibrate.
        prefixes: that the calls' names were given, as in :class:`afbs_compile.passes.names.SiteNames`.
    """

    gm: fx.GraphModule
    sites: list[AttentionSite]
    refusals: list[Refusal]
    tensors: list[tuple[str, Tensor]]
    graph: str
    source: str
    sketches: tuple[TensorSketch, ...]
    prefixes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        min_length: int,
        prefixes: Mapping[str, str] | None = None,
    ) -> FoundGraph:
        """Open fused modules, find the attention calls, and fingerprint the graph, which is changed in place.

        Args:
            gm, example_inputs: the graph and values of its placeholders; min_length: shorter calls are refused.
            prefixes: of names, as in :class:`afbs_compile.passes.names.SiteNames`.
        """
        expand(gm)
        mark_calls(gm)
        sites, refusals = find(gm, min_length=min_length, prefixes=prefixes)
        tensors = module_tensors(gm, example_inputs)
        # Sorted, because a call may be a site at one length and refused at another.
        names = sorted([site.name for site in sites] + [refusal.name for refusal in refusals])
        source = source_digest(site.node for site in sites)
        sketches = sketched(tensors) if sites else ()
        return cls(gm, sites, refusals, tensors, graph_digest(names, tensors), source, sketches, dict(prefixes or {}))

    @property
    def peers(self) -> Peers:
        """The processes that hold the tensors together."""
        return Peers.of(tensor for _, tensor in self.tensors)

    def part(self, site: AttentionSite) -> Part:
        """The part of a call's heads that this process has."""
        mine = f"_{site.name}_".replace(".", "_")
        tensors = [tensor for name, tensor in self.tensors if mine in plain_name(name)]
        return part_of(tensors, site.heads, site.head_dim)

    @property
    def weights(self) -> str:
        """Digest of the tensors' values, empty where there is no site to calibrate."""
        return digest_of(sketch.digest for sketch in self.sketches) if self.sites else ""
