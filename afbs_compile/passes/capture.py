"""Run a graph on sample inputs: stop at each attention site with its Q, K and V, or compute the sites otherwise.

All samples walk the graph side by side, one site at a time, so the memory beyond the walk's own activations is one
site's tensors, however many sites there are. The graph's inputs are cloned and the random state is forked: a
captured graph may write into its inputs (a static KV cache does). Around each consumer stands the graph's own autocast
state: samples that walk side by side would otherwise leave it for each other, and the consumer must not run under it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from afbs_compile.kernels.attend.machine import autocast_kept, indices
from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.build import laid_out_like
from afbs_compile.passes.effects import may_draw, value_of
from afbs_compile.passes.site import AttentionSite


@dataclass(frozen=True)
class SampleRun:
    """One sample as a graph sees it: the graph, its sites in graph order, and the values of its placeholders."""

    gm: fx.GraphModule
    sites: Sequence[AttentionSite]
    inputs: Sequence[Any]


Attention = Callable[[str, Operands], Tensor | None]
"""Computes a site, given its name and operands: ``[B, H, N, D]``, or ``None`` for what the graph itself computes."""


def capture(
    runs: Sequence[SampleRun], attention: Attention | None = None
) -> Generator[tuple[str, list[Operands]], None, None]:
    """Yield ``(site name, operands of every sample)`` site by site, in graph order.

    Args:
        runs: samples; their graphs may differ (other lengths) but have the same sites by name.
        attention: computes what the rest of the graph sees of a site, once the consumer is done with it: later sites
            are then captured on the activations that it makes. By default the graph's own call.

    Raises:
        ValueError: the runs have no sample, or not the same sites.
    """
    names = [site.name for site in runs[0].sites] if runs else []
    if not runs or any([site.name for site in run.sites] != names for run in runs):
        raise ValueError(f"runs must all have the same attention sites, at least one run; got {len(runs)} runs")
    with _random_state_kept(runs):
        walks = [_walk(run, attention) for run in runs]
        for name in names:
            operands = [next(walk) for walk in walks]
            yield name, operands
            operands.clear()  # the consumer's loop variable must not keep them while the next site is computed


def run_with(run: SampleRun, attention: Attention) -> Any:
    """The graph's outputs on one sample, with its sites computed by ``attention``; inputs and random state untouched.

    Args:
        run: the sample.
        attention: computes each site.
    """
    interpreter = _Walker(run)
    sites = {site.node: site for site in run.sites}
    nodes = iter(run.gm.graph.nodes)
    with _random_state_kept([run]):
        try:
            for node in nodes:
                if node.op == "output":
                    return interpreter.run_node(node)
                site = sites.get(node)
                interpreter.step(node, None if site is None else interpreter.attend(site, attention))
        finally:
            interpreter.leave_contexts(nodes)


def _walk(run: SampleRun, attention: Attention | None) -> Iterator[Operands]:
    """Interpret the graph in eager mode, stopping before each site; stop for good after the last one."""
    interpreter = _Walker(run)
    waiting = {site.node: site for site in run.sites}
    nodes = iter(run.gm.graph.nodes)
    try:
        while waiting:
            node, result = next(nodes), None
            if site := waiting.pop(node, None):
                with autocast_kept(site.device):
                    yield interpreter.operands(site)
                if attention is not None and waiting:
                    result = interpreter.attend(site, attention)
            if waiting:
                interpreter.step(node, result)
    finally:
        interpreter.leave_contexts(nodes)


def draws_random(gm: fx.GraphModule, sites: Iterable[str]) -> bool:
    """Whether running a graph may draw random numbers.

    Args:
        gm: the graph; sites: names of the nodes of its attention calls, which drop nothing.
    """
    known = set(sites)
    return any(may_draw(node) and node.name not in known and not _drops_nothing(node) for node in gm.graph.nodes)


def _drops_nothing(node: fx.Node) -> bool:
    """Whether it is dropout outside training."""
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | dict(node.kwargs)
    return node.target is torch.nn.functional.dropout and given.get("training") is False


def _random_state_kept(runs: Sequence[SampleRun]) -> AbstractContextManager[None]:
    """The random state as it was at the end; where nothing draws it is not touched, for other threads may use it."""
    if not any(draws_random(run.gm, [site.node.name for site in run.sites]) for run in runs):
        return nullcontext()
    return torch.random.fork_rng(indices(value for run in runs for value in run.inputs))


class _Walker(fx.Interpreter):
    """An interpreter that runs node by node and frees each value after its last use."""

    def __init__(self, run: SampleRun) -> None:
        super().__init__(run.gm)
        self.args_iter: Iterator[Any] = iter([concrete(value) for value in run.inputs])
        self._keep_operands(run)

    def _keep_operands(self, run: SampleRun) -> None:
        """Unrepeated K and V may have their last use before the call: keep each operand until its last site."""
        last_site = {node: site.node for site in run.sites for node in (site.q, site.k, site.v, *site.extras)}
        order = {node: index for index, node in enumerate(run.gm.graph.nodes)}
        for user, dying in list(self.user_to_last_uses.items()):
            for node in [n for n in dying if n in last_site and order[last_site[n]] > order[user]]:
                dying.remove(node)
                self.user_to_last_uses.setdefault(last_site[node], []).append(node)

    @torch.no_grad()  # not around the whole walk: a generator that is dropped half-way would leave it on
    def step(self, node: fx.Node, result: Tensor | None = None) -> None:
        self.env[node] = self.run_node(node) if result is None else result
        for dead in self.user_to_last_uses.get(node, []):
            del self.env[dead]

    def leave_contexts(self, remaining: Iterable[fx.Node]) -> None:
        """Leave the contexts that the walked part entered, or autocast would stay on."""
        for node in remaining:
            if node.target is torch.amp.autocast_mode._exit_autocast and node.args[0] in self.env:
                self.step(node)

    def operands(self, site: AttentionSite) -> Operands:
        def value(node: fx.Node) -> Any:
            found = self.env[node]
            return found.detach() if isinstance(found, Tensor) else found

        return site.operands(value)

    @torch.no_grad()
    def attend(self, site: AttentionSite, attention: Attention) -> Tensor | None:
        """The site's result by ``attention``, in the shape and memory order that the graph expects."""
        with autocast_kept(site.device):
            out = attention(site.name, self.operands(site))
        if out is None:
            return None
        shape = (*self.env[site.q].shape[:-1], out.shape[-1])
        return laid_out_like(out.reshape(shape), value_of(site.node))


def concrete(value: Any) -> Any:
    """A value that the graph may overwrite: parameters as they are, other tensors cloned, symbols as their hint."""
    if isinstance(value, torch.nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint  # int(value) would add a guard and fix the size
    return value
