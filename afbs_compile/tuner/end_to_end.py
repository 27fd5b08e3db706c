"""What sparse attention does to the model's output: divergence of its next-token distribution, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from afbs_compile.errors import OptionError
from afbs_compile.kernels.call import SparseCall
from afbs_compile.passes.capture import SampleRun, run_with
from afbs_compile.tuner.measure import attend_sparsely

CHUNK_ELEMENTS = 2**25
"""Logits turned into fp32 probabilities at a time: 128 MiB, whatever the vocabulary."""


@dataclass(frozen=True)
class OutputChange:
    """How far a sparse model's next-token distributions are from the dense model's, mean over the positions.

    Attributes:
        kl: KL(dense || sparse) in nats.
        loss: rise of the cross entropy on the sample's own next tokens, in nats; NaN where they are not known.
    """

    kl: float
    loss: float


class EndToEnd:
    """Runs a graph with any thresholds at its sites and compares its logits with the dense ones.

    Args:
        runs: the samples to compare on.

    Raises:
        OptionError: the graph returns no logits.

    Attributes:
        evaluations: forward passes so far, dense ones included.
    """

    def __init__(self, runs: Sequence[SampleRun]) -> None:
        self.evaluations = 0
        self._runs = runs
        self._dense = [self._logits(run, {}) for run in runs]
        self._targets = [next_tokens(run, logits) for run, logits in zip(runs, self._dense, strict=True)]

    @property
    def knows_next_tokens(self) -> bool:
        """Whether every sample has tokens to compute a perplexity on."""
        return all(targets is not None for targets in self._targets)

    def __call__(self, chosen: Mapping[str, SparseCall]) -> list[OutputChange]:
        """One :class:`OutputChange` per sample with these sites sparse; sites that are not named stay dense."""
        changes = []
        for run, dense, targets in zip(self._runs, self._dense, self._targets, strict=True):
            changes.append(output_change(dense, self._logits(run, chosen), targets))
        return changes

    def _logits(self, run: SampleRun, chosen: Mapping[str, SparseCall]) -> Tensor:
        self.evaluations += 1
        outputs = run_with(run, lambda name, ops: attend_sparsely(ops, chosen[name]) if name in chosen else None)
        return find_logits(outputs)


def find_logits(outputs: Any) -> Tensor:
    """The logits ``[..., positions, classes]`` among a graph's outputs: the floating one with the most classes.

    Raises:
        OptionError: there is none, or two with as many classes.
    """
    tensors = [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]
    candidates = [x for x in tensors if x.dim() in (2, 3)]  # caches of keys and values have 4 dimensions
    most = max((x.shape[-1] for x in candidates), default=0)
    logits = [x for x in candidates if x.shape[-1] == most]
    if len(logits) != 1:
        shapes = ", ".join(str(list(x.shape)) for x in tensors) or "none"
        raise OptionError(
            "tolerance: a budget on the output needs logits; accepted: a model that returns one tensor [batch, "
            f"positions, classes] wider than its others; the floating outputs are {shapes}"
        )
    return logits[0]


def next_tokens(run: SampleRun, logits: Tensor) -> Tensor | None:
    """The tokens ``[batch, positions - 1]`` that follow each position: the graph's token input, shifted by one.

    The token input is the integer one shaped like the positions of the logits, the one named ``input_ids`` where
    there are several; ``None`` if there is none, or if its tokens are no classes of the logits.
    """
    placeholders = [node for node in run.gm.graph.nodes if node.op == "placeholder"]
    found: dict[str, Tensor] = {
        str(node.target): value
        for node, value in zip(placeholders, run.inputs, strict=True)
        if isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) and _fits(value, logits, node)
    }
    named = [value for name, value in found.items() if "input_ids" in name]
    tokens = named if named else list(found.values())
    if len(tokens) != 1 or tokens[0].shape[-1] < 2 or tokens[0].max() >= logits.shape[-1]:
        return None
    return tokens[0][..., 1:].long()


def _fits(value: Tensor, logits: Tensor, node: fx.Node) -> bool:
    return value.shape == logits.shape[:-1] and bool(node.users)


def output_change(dense: Tensor, sparse: Tensor, targets: Tensor | None) -> OutputChange:
    """Compare two logits ``[..., positions, classes]``; targets ``[..., positions - 1]``.

    The sums run over chunks of positions in fp32, so that no copy of the logits is made.
    """
    classes = dense.shape[-1]
    rows = max(1, CHUNK_ELEMENTS // classes)
    flat_dense, flat_sparse = dense.reshape(-1, classes), sparse.reshape(-1, classes)
    labels = _labels(dense, targets)
    kl = loss = 0.0
    for start in range(0, len(flat_dense), rows):
        p = F.log_softmax(flat_dense[start : start + rows].float(), -1)
        q = F.log_softmax(flat_sparse[start : start + rows].float(), -1)
        # KL(p || q) = sum p (log p - log q)
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
        if labels is not None:
            label = labels[start : start + rows, None]
            rise = (p - q).gather(-1, label.clamp_min(0))
            loss += float(rise[label >= 0].double().sum())
    counted = 0 if labels is None else int((labels >= 0).sum())
    return OutputChange(kl / len(flat_dense), loss / counted if counted else math.nan)


def _labels(logits: Tensor, targets: Tensor | None) -> Tensor | None:
    """The next token of every position, -1 for the last one of a sequence."""
    if targets is None:
        return None
    return F.pad(targets.to(logits.device), (0, 1), value=-1).reshape(-1)
