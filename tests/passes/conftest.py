"""Graphs as Dynamo hands them to a backend, and what the passes make of them there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import fx

from afbs_compile.kernels.call import SparseCall
from afbs_compile.passes.expand import expand
from afbs_compile.passes.find import find
from afbs_compile.passes.rewrite import Rewrite, rewrite
from afbs_compile.passes.site import AttentionSite, Refusal


@dataclass
class Compiled:
    """A compiled callable and what happened to each graph that was captured for it."""

    call: Callable[..., Any]
    graphs: list[fx.GraphModule] = field(default_factory=list)
    sites: list[list[AttentionSite]] = field(default_factory=list)
    refusals: list[list[Refusal]] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)

    @property
    def site(self) -> AttentionSite:
        (site,) = self.sites[-1]
        assert self.refusals[-1] == []
        return site

    @property
    def reason(self) -> str:
        (refusal,) = self.refusals[-1]
        assert self.sites[-1] == []
        return refusal.reason


def keep_everything(site: AttentionSite) -> SparseCall:
    return SparseCall.uniform(site.heads, 1.0)


def compiled(
    fn: Callable[..., Any], *, min_length: int = 1, change: bool = False, dynamic: bool | None = False
) -> Compiled:
    """Compile with a backend that finds, rewrites where asked to, and runs the graph eagerly."""

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        expand(gm)
        sites, refusals = find(gm, min_length=min_length)
        result.graphs.append(gm)
        result.sites.append(sites)
        result.refusals.append(refusals)
        if change:
            result.rewrites.append(rewrite(gm, {site: keep_everything(site) for site in sites}))
        return gm.forward

    torch._dynamo.reset()  # a test may compile several functions of the same code
    result = Compiled(torch.compile(fn, backend=backend, dynamic=dynamic))
    return result


@pytest.fixture
def compile_with() -> Callable[..., Compiled]:
    return compiled


@pytest.fixture
def look() -> Callable[..., Compiled]:
    """Run a function once, without gradients, and return what was found in its graph."""

    def run(
        fn: Callable[..., Any], *args: Any, grad: bool = False, kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Compiled:
        result = compiled(fn, **options)
        with torch.set_grad_enabled(grad):
            result.call(*args, **(kwargs or {}))
        return result

    return run


@pytest.fixture(autouse=True)
def every_graph_is_captured(fresh_dynamo: None) -> None:
    torch.manual_seed(0)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 4, 24, 16) for _ in range(3))  # type: ignore[return-value]
