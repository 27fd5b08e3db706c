"""How close a sparse form of a model stays to the dense one, and to what its recipe promises, on given inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.sight import rows_that_count
from afbs_compile.recipe import SiteRecipe
from afbs_compile.report.applied import AppliedGraph, operands
from afbs_compile.tuner.end_to_end import output_change
from afbs_compile.tuner.measure import relative_l1


@dataclass(frozen=True)
class Closeness:
    """One form of a model against another on one input.

    Attributes:
        relative_error: ``sum|a - b| / sum|b|`` of the model's first output; NaN if an output is not finite.
        largest_difference: ``max|a - b| / max|b|``.
        positions: places where a choice is made, 0 unless the output is logits.
        agreeing: of these, where both make the same first choice.
        kl: mean KL(b || a) of those choices in nats, ``None`` unless the output is logits.
        losses: mean next-token loss of either form, ``None`` unless the model predicts tokens.
    """

    relative_error: float
    largest_difference: float
    positions: int
    agreeing: int
    kl: float | None
    losses: tuple[float, float] | None


@dataclass(frozen=True)
class HeadErrors:
    """Errors of a site's sparse heads at the recipe's thresholds.

    Attributes:
        site: its name; heads: their indices.
        errors: ``[inputs, len(heads)]`` fp32, relative L1 per batch element of each sample (Eq. 1).
    """

    site: str
    heads: tuple[int, ...]
    errors: Tensor


def first_output(output: Any) -> Tensor:
    """The first tensor of what a model returns: logits, or the last hidden state.

    Raises:
        TypeError: there is none.
    """
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise TypeError(f"the model returned no tensor but {type(output).__name__}")


def closeness(sparse: Tensor, dense: Tensor, sample: Mapping[str, Any], *, logits: bool) -> Closeness:
    """Compare two outputs.

    Args:
        sparse, dense: the same output of two forms of a model, of one shape.
        sample: the input; with ``input_ids [B, N]`` and logits ``[B, N, V]`` next-token losses are computed.
        logits: whether the last dimension holds the scores of a choice.

    Raises:
        ValueError: the shapes differ.
    """
    if sparse.shape != dense.shape:
        raise ValueError(f"outputs of shapes {list(sparse.shape)} and {list(dense.shape)} cannot be compared")
    sparse, dense = sparse.detach().float(), dense.detach().float().to(sparse.device)
    difference, magnitude = (sparse - dense).abs(), dense.abs()
    tiny = torch.finfo(torch.float32).tiny
    relative = float(difference.sum(dtype=torch.float64) / magnitude.sum(dtype=torch.float64).clamp_min(tiny))
    largest = float(difference.max() / magnitude.max().clamp_min(tiny))
    positions = agreeing = 0
    kl = losses = None
    if logits:
        kl = output_change(dense, sparse, None).kl
        same = sparse.argmax(-1) == dense.argmax(-1)
        positions, agreeing = same.numel(), int(same.sum())
        ids = sample.get("input_ids")
        if isinstance(ids, Tensor) and sparse.shape[:-1] == ids.shape and ids.shape[-1] > 1:
            losses = _loss(sparse, ids), _loss(dense, ids)
    finite = bool(sparse.isfinite().all())
    return Closeness(relative if finite else math.nan, largest if finite else math.nan, positions, agreeing, kl, losses)


def head_errors(graphs: Sequence[AppliedGraph]) -> Iterable[HeadErrors]:
    """Errors of every sparse head of every call that the recipe rewrites, site by site."""
    for row, samples in operands(graphs):
        heads = tuple(index for index, head in enumerate(row.heads) if head.outcome == "sparse")
        if row.outcome == "sparse" and heads:
            errors = torch.cat([_errors(row, sample) for sample in samples])
            yield HeadErrors(row.name, heads, errors[:, list(heads)])


def _errors(row: SiteRecipe, sample: Operands) -> Tensor:
    out, _ = run(sample, row.calibrated)
    return relative_l1(out, dense_attention(sample), counted=rows_that_count(sample)).cpu()


def _loss(logits: Tensor, ids: Tensor) -> float:
    """Mean next-token loss."""
    targets = ids[..., 1:].reshape(-1).to(logits.device)
    return F.cross_entropy(logits[..., :-1, :].reshape(-1, logits.shape[-1]), targets).item()


def run_dense(model: Callable[..., Any], sample: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """The model's first output on one input, and whether it holds logits."""
    with torch.no_grad():
        output = model(**sample)
    return first_output(output), getattr(output, "logits", None) is not None
