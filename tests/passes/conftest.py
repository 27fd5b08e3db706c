"""Graphs as Dynamo hands them to a backend, and what the passes make of them there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import fx

from afbs_compile.kernels.call import Kept, SparseCall
from afbs_compile.passes.expand import expand
from afbs_compile.passes.find import find
from afbs_compile.passes.marking import mark_calls
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
    """The constants of a call that runs dense."""
    return SparseCall.uniform(site.heads, 1.0)


def select_everything(site: AttentionSite) -> SparseCall:
    """The constants of a call that goes through selection and attention over blocks, all of which are kept."""
    return SparseCall.uniform(site.heads, 0.5, kept=Kept(last_rows=2**20))


def compiled(
    fn: Callable[..., Any],
    *,
    min_length: int = 1,
    change: bool = False,
    dynamic: bool | None = False,
    call: Callable[[AttentionSite], SparseCall] = keep_everything,
) -> Compiled:
    """Compile with a backend that finds, rewrites to a ``call`` where asked to, and runs the graph eagerly."""

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        expand(gm)
        mark_calls(gm)
        sites, refusals = find(gm, min_length=min_length)
        result.graphs.append(gm)
        result.sites.append(sites)
        result.refusals.append(refusals)
        if change:
            result.rewrites.append(rewrite(gm, {site: call(site) for site in sites}))
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


@pytest.fixture
def same() -> Callable[..., Compiled]:
    """Compare a compiled function with itself, its sites rewritten to dense calls and to calls over all blocks."""

    def run(
        fn: Callable[..., Any],
        *args: Any,
        kwargs: dict[str, Any] | None = None,
        close: dict[str, float] | None = None,
        **options: Any,
    ) -> Compiled:
        with torch.no_grad():
            torch.manual_seed(1)
            expected = fn(*args, **(kwargs or {}))
            for call in (keep_everything, select_everything):
                result = compiled(fn, change=True, call=call, **options)
                torch.manual_seed(1)
                out = result.call(*args, **(kwargs or {}))
                torch.testing.assert_close(out, expected, equal_nan=True, **(close or {}))
                assert sum(rewrite.changed for rewrite in result.rewrites) == sum(map(len, result.sites))
        return result

    return run


@pytest.fixture(autouse=True)
def every_graph_is_captured(fresh_dynamo: None) -> None:
    torch.manual_seed(0)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 4, 24, 16) for _ in range(3))  # type: ignore[return-value]
