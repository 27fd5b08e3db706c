"""Tune every site of a graph, one after the other, and write down what was decided."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from afbs_compile.errors import OptionError
from afbs_compile.fingerprint import tensor_digest
from afbs_compile.found import FoundGraph
from afbs_compile.kernels.attend import machine
from afbs_compile.kernels.attend.engines import family_on, kernel_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.selection import PREDICTOR_VERSION
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.peers import Peers
from afbs_compile.recipe import (
    BudgetRecord,
    GraphRecipe,
    HeadRecipe,
    Promise,
    Recipe,
    SampleRecord,
    SearchPath,
    SiteRecipe,
)
from afbs_compile.shards import joined
from afbs_compile.tuner.budgeted import tune_with_budget
from afbs_compile.tuner.end_to_end import returns_logits
from afbs_compile.tuner.measure import attend_sparsely
from afbs_compile.tuner.progress import calibration_progress
from afbs_compile.tuner.promise import promise
from afbs_compile.tuner.result import SiteResult
from afbs_compile.tuner.settings import AUTOMATIC, TuneSettings
from afbs_compile.tuner.site import tune_site
from afbs_compile.tuner.speed import Stopwatch
from afbs_compile.version import __version__

Source = Literal["samples", "first call"]


def calibrate_graph(
    graphs: Sequence[tuple[FoundGraph, Sequence[Sequence[Any]]]], settings: TuneSettings, source: Source
) -> Recipe:
    """Calibrate the sites of one graph.

    Args:
        graphs: the graph, and the placeholder values of each sample; several graphs with the same sites where
            samples of other lengths made Dynamo capture it again.
        settings: how to tune.
        source: where the samples came from.

    Returns:
        A recipe with one :class:`GraphRecipe`.
    """
    began = time.monotonic()
    found = graphs[0][0]
    peers = found.peers
    if any(found.part(site).of > 1 for site in found.sites):
        if settings.budget is not None:
            raise OptionError(
                "tolerance: a budget on the output needs all heads of a call in one process, and this model's are in "
                "several; accepted: a number, or a recipe that was calibrated on one device"
            )
        settings = replace(settings, automatic=False)
    with peers.together():
        return _calibrated(graphs, settings, source, peers, began)


def _calibrated(
    graphs: Sequence[tuple[FoundGraph, Sequence[Sequence[Any]]]],
    settings: TuneSettings,
    source: Source,
    peers: Peers,
    began: float,
) -> Recipe:
    found = graphs[0][0]
    runs = [SampleRun(graph.gm, graph.sites, inputs) for graph, samples in graphs for inputs in samples]
    results, lengths, budget = _tune(runs, settings, peers) if found.sites else ({}, [0], None)
    batches = _batches(runs)
    validated = _validation_inputs(results, batches)
    promised = _promise(results, batches)
    record = SampleRecord(source, len(runs), validated, (min(lengths), max(lengths)), samples_digest(runs))
    mine = [
        (found.part(site), site_recipe(site.name, site.shapes().operands(), results[site.name])) for site in found.sites
    ]
    sites = [joined(rows) for rows in zip(*peers.gathered(mine), strict=True)]
    promises = [each for each in peers.gathered(promised) if each is not None]
    promised = max(promises, key=lambda each: each.model_bound, default=None)
    refused = [SiteRecipe(refusal.name, "refused", refusal.reason) for refusal in found.refusals]
    evaluations = sum(result.evaluations for result in results.values())
    device = found.sites[0].device if found.sites else torch.device("cpu")
    graph = GraphRecipe(
        graph=found.graph,
        weights=found.weights,
        source=found.source,
        samples=record,
        seconds=round(time.monotonic() - began, 3),
        evaluations=round(evaluations, 2),
        sites=(*sites, *refused),
        promise=promised,
        tensors=found.sketches,
    )
    return recipe_of(graph, settings, device, budget)


def recipe_of(
    graph: GraphRecipe, settings: TuneSettings, device: torch.device, budget: BudgetRecord | None = None
) -> Recipe:
    """A recipe of one graph.

    Args:
        graph: what was decided; settings: how it was tuned; device: where.
        budget: how a budget on the output was spent, where there is one.
    """
    return Recipe(
        options={
            **settings.asked,
            "tolerance": settings.tolerance if budget is None else {budget.quantity: budget.limit},
        },
        device=machine.kind(device),
        engine=family_on(device),
        predictor_version=PREDICTOR_VERSION,
        versions=_versions(),
        graphs=(graph,),
        budget=budget,
    )


def samples_digest(runs: Iterable[SampleRun]) -> str:
    """Digest of the inputs that are not parameters."""
    return tensor_digest(
        value
        for run in runs
        for value in run.inputs
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)
    )


def _tune(
    runs: Sequence[SampleRun], settings: TuneSettings, peers: Peers
) -> tuple[dict[str, SiteResult], list[int], BudgetRecord | None]:
    """Results by site, lengths at the sites, and how the budget was spent where there is one."""
    if settings.budget is not None:
        return tune_with_budget(runs, settings, settings.budget)
    if settings.automatic and returns_logits(runs[0]):
        return tune_with_budget(runs, settings, AUTOMATIC)
    return *_tune_sites(runs, settings, peers), None


def _tune_sites(
    runs: Sequence[SampleRun], settings: TuneSettings, peers: Peers
) -> tuple[dict[str, SiteResult], list[int]]:
    results: dict[str, SiteResult] = {}
    lengths: set[int] = set()
    earlier, stopwatch = None, Stopwatch(peers)

    # closing: the walk holds forked random state and autocast, which an error must not leave behind.
    def chosen(name: str, operands: Operands) -> Tensor | None:
        """Later sites are calibrated on what the sparse ones before them make."""
        result = results[name]
        return None if result.dense_reason else attend_sparsely(operands, result.call)

    with calibration_progress(len(runs[0].sites)) as progress, closing(capture(runs, chosen)) as walk:
        for name, operands in walk:
            result = tune_site(operands, settings, earlier=earlier, stopwatch=stopwatch)
            earlier = result.posterior
            results[name] = result
            lengths |= {sample.k_len for sample in operands}
            progress.finished(result)
    stopwatch.remember()
    return results, sorted(lengths)


def _promise(results: Mapping[str, SiteResult], batches: Mapping[str, Sequence[int]]) -> Promise | None:
    """What the validation of all sites says; the same inputs walked through each of them."""
    if not results:
        return None
    inputs = _inputs(batches)
    held_out, deciding = [], []
    for name, result in results.items():
        if result.held_out is None:  # Algorithm 1 chooses on every input it measures
            return promise(0, 0)
        groups = list(_groups(batches[name], inputs))
        held_out.append(torch.stack([result.held_out[group].all() for group in groups]))
        decided = _padded(result.deciding, result.held_out)
        deciding.append(torch.stack([decided[group].any() for group in groups]))
    counted = torch.stack(held_out).all(0)
    return promise(int(counted.sum()), int((torch.stack(deciding).any(0) & counted).sum()))


def _batches(runs: Sequence[SampleRun]) -> dict[str, list[int]]:
    """The batch of each site in each sample."""
    found: dict[str, list[int]] = {}
    for run in runs:
        for site in run.sites:
            found.setdefault(site.name, []).append(site.shapes().operands().q.shape[0])
    return found


def _inputs(batches: Mapping[str, Sequence[int]]) -> list[int]:
    """How many inputs each sample is: its batch elements or, where sites have batches of their own, itself.

    Which window of one site belongs to which element of another is not known.
    """
    return [sizes[0] if len(set(sizes)) == 1 else 1 for sizes in zip(*batches.values(), strict=True)]


def _validation_inputs(results: Mapping[str, SiteResult], batches: Mapping[str, Sequence[int]]) -> int:
    """Inputs, or windows of the only one, that every sparse head was validated on."""
    inputs = _inputs(batches)
    if any(list(sizes) != inputs for sizes in batches.values()):
        return sum(inputs)
    return max((result.measured.error.shape[0] for result in results.values()), default=0)


def _groups(batches: Sequence[int], inputs: Sequence[int]) -> Iterator[slice]:
    """Elements of a site that belong to one input: a site that cuts it into windows has several in a row.

    Args:
        batches: elements of the site in each sample; inputs: of the whole model.
    """
    start = 0
    for elements, count in zip(batches, inputs, strict=True):
        for _ in range(count):
            yield slice(start, start := start + elements // count)


def _padded(deciding: Tensor | None, like: Tensor) -> Tensor:
    """A site that left every head dense measured no curve on any input: none decided."""
    return torch.zeros_like(like) if deciding is None or not len(deciding) else deciding


def site_recipe(name: str, operands: Operands, result: SiteResult) -> SiteRecipe:
    """What is written down of one call.

    Args:
        name: of the site; operands: what it is called on, of which only shapes, strides and dtypes are read.
        result: of tuning it.
    """
    speed, call = result.speed, result.call
    rounded = replace(call, tau=_rounded(call.tau), theta=_rounded(call.theta), lam=_rounded(call.lam))
    kernel = None if speed is None else kernel_of(operands, call)
    return SiteRecipe(
        name=name,
        outcome="sparse" if result.dense_reason is None else "dense",
        reason=result.dense_reason,
        mask=str(operands.mask),
        head_dim=operands.q.shape[3],
        kv_heads=operands.k.shape[1],
        dtype=str(operands.q.dtype).removeprefix("torch."),
        call=rounded,
        heads=tuple(_head_recipe(result, head, dense) for head, dense in enumerate(rounded.dense_heads)),
        dense_ms=None if speed is None else round(speed.dense_ms, 4),
        sparse_ms=None if speed is None else round(speed.sparse_ms, 4),
        validated_lengths=None if result.lengths is None else result.lengths.validated,
        kernel=None if kernel is None else kernel.name,
        kernel_reason=None if kernel is None else kernel.reason,
        unsure=speed is not None and speed.is_unsure,
        kept_tried=result.kept_tried,
    )


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values)


def _head_recipe(result: SiteResult, head: int, dense: bool) -> HeadRecipe:
    def number(values: Tensor | None) -> float:
        return 0.0 if values is None else round(float(values[head]), 6)

    errors = [round(error, 6) for error in result.measured.error[:, head].tolist()]
    paths = [curves.path(head) for curves in result.curves if bool(curves.measured[head])]
    return HeadRecipe(
        outcome="dense" if dense else "sparse",
        sparsity=0.0 if dense else number(result.measured.sparsity),
        error=max(errors),
        validation_errors=tuple(errors),
        search=(*paths, *_trial_paths(result, head)),
        tau_exponent=number(result.tau_exponent),
        length_exponent=0.0 if dense or result.lengths is None else number(result.lengths.exponent),
        precision_reason=None if result.precision_reasons is None else result.precision_reasons[head],
    )


def _trial_paths(result: SiteResult, head: int) -> list[SearchPath]:
    """One path per stage of ``method="paper"``."""
    paths = []
    for (stage, length), group in groupby(result.trials, key=lambda trial: (trial.stage, trial.length)):
        trials = list(group)
        points = [(t.s, t.call.tau, t.call.theta, t.call.lam) for t in trials]
        s, tau, theta, lam = (tuple(round(float(x[head]), 6) for x in column) for column in zip(*points, strict=True))
        errors = [float(t.measured.worst[head]) for t in trials]
        paths.append(
            SearchPath(
                stage=stage,
                length=length,
                policy=result.call.policy[head],
                shape=result.call.shape,
                s=s,
                tau=tau,
                theta=theta,
                lam=lam,
                sparsity=tuple(round(float(t.measured.sparsity[head]), 6) for t in trials),
                error=tuple(round(error, 6) if math.isfinite(error) else -1.0 for error in errors),
            )
        )
    return paths


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "afbs-compile": __version__}
    for package in ("torch", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
