"""Run a graph on sample inputs and stop at each attention site with its Q, K and V.

All samples walk the graph side by side, one site at a time, so the memory beyond the walk's own activations is one
site's tensors, however many sites there are. The graph's inputs are cloned and the random state is forked: a
captured graph may write into its inputs (a static KV cache does).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from afbs_compile.passes.site import AttentionSite


@dataclass(frozen=True)
class Operands:
    """Q, K and V of one site on one sample, in canonical form.

    Attributes:
        q: ``[B, H, N, D]``; k, v: ``[B, H_kv, N, D]``; detached.
        scale: softmax scale.
        causal: whether row r attends keys 0..r only.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool


@dataclass(frozen=True)
class SampleRun:
    """One sample as a graph sees it: the graph, its sites in graph order, and the values of its placeholders."""

    gm: fx.GraphModule
    sites: Sequence[AttentionSite]
    inputs: Sequence[Any]


def capture(runs: Sequence[SampleRun]) -> Generator[tuple[str, list[Operands]], None, None]:
    """Yield ``(site name, operands of every sample)`` site by site, in graph order.

    Args:
        runs: samples; their graphs may differ (other lengths) but have the same sites by name.

    Raises:
        ValueError: the runs have no sample, or not the same sites.
    """
    names = [site.name for site in runs[0].sites] if runs else []
    if not runs or any([site.name for site in run.sites] != names for run in runs):
        raise ValueError(f"runs must all have the same attention sites, at least one run; got {len(runs)} runs")
    devices = sorted({t.device.index or 0 for run in runs for t in run.inputs if _is_cuda(t)})
    with torch.random.fork_rng(devices):
        walks = [_walk(run) for run in runs]
        for name in names:
            operands = [next(walk) for walk in walks]
            yield name, operands
            operands.clear()  # the consumer's loop variable must not keep them while the next site is computed


def _walk(run: SampleRun) -> Iterator[Operands]:
    """Interpret the graph in eager mode, stopping before each site; stop for good after the last one."""
    interpreter = _Walker(run)
    waiting = {site.node: site for site in run.sites}
    nodes = iter(run.gm.graph.nodes)
    try:
        while waiting:
            node = next(nodes)
            if site := waiting.pop(node, None):
                with _autocast_kept(site.device.type):
                    yield interpreter.operands(site)
            if waiting:
                interpreter.step(node)
    finally:
        for node in nodes:  # contexts that the walked part entered are left, or autocast would stay on
            if node.target is torch.amp.autocast_mode._exit_autocast and node.args[0] in interpreter.env:
                interpreter.step(node)


class _Walker(fx.Interpreter):
    """An interpreter that runs node by node and frees each value after its last use."""

    def __init__(self, run: SampleRun) -> None:
        super().__init__(run.gm)
        self.args_iter: Iterator[Any] = iter([concrete(value) for value in run.inputs])
        self._keep_operands(run)

    def _keep_operands(self, run: SampleRun) -> None:
        """Unrepeated K and V may have their last use before the call: keep each operand until its last site."""
        last_site = {
            node: site.node
            for site in run.sites
            for node in (site.q, site.k, site.v, site.scale)
            if isinstance(node, fx.Node)
        }
        order = {node: index for index, node in enumerate(run.gm.graph.nodes)}
        for user, dying in list(self.user_to_last_uses.items()):
            for node in [n for n in dying if n in last_site and order[last_site[n]] > order[user]]:
                dying.remove(node)
                self.user_to_last_uses.setdefault(last_site[node], []).append(node)

    @torch.no_grad()  # not around the whole walk: a generator that is dropped half-way would leave it on
    def step(self, node: fx.Node) -> None:
        self.env[node] = self.run_node(node)
        for dead in self.user_to_last_uses.get(node, []):
            del self.env[dead]

    def operands(self, site: AttentionSite) -> Operands:
        q, k, v = (site.canonical(self.env[node].detach()) for node in (site.q, site.k, site.v))
        scale = self.env[site.scale] if isinstance(site.scale, fx.Node) else site.scale
        return Operands(q, k, v, float(scale), site.causal)


def concrete(value: Any) -> Any:
    """A value that the graph may overwrite: parameters as they are, other tensors cloned, symbols as their hint."""
    if isinstance(value, torch.nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint  # int(value) would add a guard and fix the size
    return value


@contextmanager
def _autocast_kept(device: str) -> Iterator[None]:
    """Give the graph back its own autocast state after the consumer ran between two nodes.

    Graphs carry nodes that enter and leave autocast; samples that walk side by side would otherwise leave it for
    each other, and the consumer must not run under it.
    """
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, autocast)
        torch.set_autocast_dtype(device, dtype)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda
