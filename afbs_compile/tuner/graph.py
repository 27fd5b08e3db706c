"""Tune every site of a graph, one after the other, and write down what was decided."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor

from afbs_compile.fingerprint import tensor_digest
from afbs_compile.found import FoundGraph
from afbs_compile.kernels.op import engine_name
from afbs_compile.kernels.reference import PREDICTOR_VERSION
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.passes.site import AttentionSite
from afbs_compile.recipe import GraphRecipe, HeadRecipe, Recipe, SampleRecord, SiteRecipe
from afbs_compile.tuner.progress import calibration_progress
from afbs_compile.tuner.site import SiteResult, TuneSettings, tune_site

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
    runs = [SampleRun(graph.gm, graph.sites, inputs) for graph, samples in graphs for inputs in samples]
    results, lengths = _tune_sites(runs, settings) if found.sites else ({}, [0])
    validated = max((result.measured.error.shape[0] for result in results.values()), default=0)
    record = SampleRecord(source, len(runs), validated, (min(lengths), max(lengths)), samples_digest(runs))
    sites = [_site_recipe(site, results[site.name], settings) for site in found.sites]
    refused = [SiteRecipe(refusal.name, "refused", refusal.reason) for refusal in found.refusals]
    evaluations = sum(result.evaluations for result in results.values())
    device = found.sites[0].device if found.sites else torch.device("cpu")
    return Recipe(
        tolerance=settings.tolerance,
        method=settings.method,
        parameterization=settings.parameterization,
        device=device.type,
        engine=engine_name(device),
        predictor_version=PREDICTOR_VERSION,
        versions=_versions(),
        graphs=(
            GraphRecipe(
                graph=found.graph,
                weights=found.weights,
                source=found.source,
                samples=record,
                seconds=round(time.monotonic() - began, 3),
                evaluations=round(evaluations, 2),
                sites=(*sites, *refused),
            ),
        ),
    )


def samples_digest(runs: Iterable[SampleRun]) -> str:
    """Digest of the inputs that are not parameters."""
    return tensor_digest(
        value
        for run in runs
        for value in run.inputs
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)
    )


def _tune_sites(runs: Sequence[SampleRun], settings: TuneSettings) -> tuple[dict[str, SiteResult], list[int]]:
    results: dict[str, SiteResult] = {}
    lengths: set[int] = set()
    earlier = None
    # closing: the walk holds forked random state and autocast, which an error must not leave behind.
    with calibration_progress(len(runs[0].sites)) as progress, closing(capture(runs)) as walk:
        for name, operands in walk:
            result = tune_site(operands, settings, earlier=earlier)
            earlier = result.posterior
            results[name] = result
            lengths |= {int(sample.q.shape[2]) for sample in operands}
            progress.finished(result)
    return results, sorted(lengths)


def _site_recipe(site: AttentionSite, result: SiteResult, settings: TuneSettings) -> SiteRecipe:
    speed = result.speed
    return SiteRecipe(
        name=site.name,
        outcome="sparse" if result.dense_reason is None else "dense",
        reason=result.dense_reason,
        causal=site.causal,
        head_dim=site.head_dim,
        kv_heads=site.kv_heads,
        dtype=str(site.dtype).removeprefix("torch."),
        block_q=settings.block_q,
        block_k=settings.block_k,
        heads=_head_recipes(result),
        dense_ms=None if speed is None else round(speed.dense_ms, 4),
        sparse_ms=None if speed is None else round(speed.sparse_ms, 4),
        min_length=None if speed is None else speed.min_length,
    )


def _head_recipes(result: SiteResult) -> tuple[HeadRecipe, ...]:
    thresholds, measured = result.thresholds, result.measured
    columns = zip(
        thresholds.is_dense.tolist(),
        thresholds.tau.tolist(),
        thresholds.theta.tolist(),
        thresholds.lam.tolist(),
        measured.sparsity.tolist(),
        measured.error.T.tolist(),
        strict=True,
    )
    return tuple(
        HeadRecipe(
            outcome="dense" if dense else "sparse",
            policy="meansim",
            tau=round(tau, 6),
            theta=round(theta, 6),
            lam=round(lam, 6),
            sparsity=round(sparsity, 6),
            error=round(max(errors), 6),
            validation_errors=tuple(round(error, 6) for error in errors),
        )
        for dense, tau, theta, lam, sparsity, errors in columns
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("afbs-compile", "torch", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
