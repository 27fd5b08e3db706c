"""What sparse attention does to the model's output: its next-token distribution, its perplexity, or its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from afbs_compile.errors import OptionError
from afbs_compile.kernels.call import SparseCall
from afbs_compile.passes.capture import SampleRun, concrete, run_with
from afbs_compile.passes.effects import value_of
from afbs_compile.tuner.measure import attend_sparsely

CHUNK_ELEMENTS = 2**25
"""Logits turned into fp32 probabilities at a time: 128 MiB, whatever the vocabulary."""

NO_TOKENS = (
    "tolerance: a budget on perplexity needs the tokens, and no integer input is shaped like the positions of the "
    "logits; accepted: a model of input_ids that returns the logits of every position, or {'kl': nats}"
)


@dataclass(frozen=True)
class OutputChange:
    """How far a sparse model's output, or a piece of it, is from the dense model's.

    Attributes:
        kl: KL(dense || sparse) of the next-token distributions in nats, mean over the positions.
        loss: rise of the cross entropy on the sample's own next tokens, in nats; NaN where they are not known.
        output: relative L1 error, ``sum|y - y_dense| / sum|y_dense|``. What was not asked for is NaN.
    """

    kl: float = math.nan
    loss: float = math.nan
    output: float = math.nan


class EndToEnd:
    """Runs a graph with any thresholds at its sites and compares its output with the dense one.

    Args:
        runs: the samples to compare on.
        quantity: what is compared, one of :data:`afbs_compile.tuner.budget.QUANTITIES`.

    Raises:
        OptionError: the graph returns no such output, or no tokens are known to compute a perplexity on.

    Attributes:
        evaluations: forward passes so far, dense ones included.
    """

    def __init__(self, runs: Sequence[SampleRun], quantity: str = "kl") -> None:
        self.evaluations = 0
        self._runs = runs
        self._find = find_output if quantity == "output" else find_logits
        self._dense = [self._output(run, {}) for run in runs]
        self._targets: list[Tensor | None] = [None] * len(runs)
        if quantity != "output":
            self._targets = [next_tokens(run, logits) for run, logits in zip(runs, self._dense, strict=True)]
        if quantity == "perplexity" and any(targets is None for targets in self._targets):
            raise OptionError(NO_TOKENS)

    def pieces_of(self, pieces: int) -> int:
        """Pieces that the first sample's output is compared in where so many are asked for: a row of it at least."""
        return min(pieces, self._dense[0][..., 0].numel())

    def __call__(
        self, chosen: Mapping[str, SparseCall], *, samples: int | None = None, pieces: int = 1
    ) -> list[OutputChange]:
        """What these sites change where they are sparse; sites that are not named stay dense.

        Args:
            chosen: calls by site.
            samples: how many of the samples, by default all; pieces: contiguous ones of each sample's output that are
                compared each.

        Returns:
            Sample by sample, piece by piece.
        """
        changes: list[OutputChange] = []
        for run, dense, targets in list(zip(self._runs, self._dense, self._targets, strict=True))[:samples]:
            sparse = self._output(run, chosen)
            compare = output_errors if self._find is find_output else output_changes
            changes += compare(dense, sparse, targets, pieces)
        return changes

    def _output(self, run: SampleRun, chosen: Mapping[str, SparseCall]) -> Tensor:
        self.evaluations += 1
        outputs = run_with(run, lambda name, ops: attend_sparsely(ops, chosen[name]) if name in chosen else None)
        return self._find(outputs)


def find_logits(outputs: Any) -> Tensor:
    """The logits ``[..., positions, classes]`` among a graph's outputs: the floating one with the most classes.

    Raises:
        OptionError: there is none, or two with as many classes.
    """
    tensors = _floating(outputs)
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


def find_output(outputs: Any) -> Tensor:
    """The floating output of a graph; of several the one with the most elements that is no cache of keys and values.

    Raises:
        OptionError: there is none, or several with as many elements.
    """
    tensors = _floating(outputs)
    candidates = tensors if len(tensors) == 1 else [x for x in tensors if x.dim() != 4]
    most = max((x.numel() for x in candidates), default=0)
    largest = [x for x in candidates if x.numel() == most]
    if len(largest) != 1 or largest[0].dim() == 0:
        shapes = ", ".join(str(list(x.shape)) for x in tensors) or "none"
        raise OptionError(
            "tolerance: a budget on the output needs one; accepted: a model that returns one floating tensor larger "
            f"than its others; the floating outputs are {shapes}"
        )
    return largest[0]


def _floating(outputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


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


def returns_logits(run: SampleRun) -> bool:
    """Whether a graph is told to return the logits of its tokens, by the shapes that it was traced with."""
    outputs = next(node for node in run.gm.graph.nodes if node.op == "output").args[0]
    leaves = torch.utils._pytree.tree_leaves(outputs)
    try:
        traced = find_logits([value_of(leaf) for leaf in leaves if isinstance(leaf, fx.Node)])
    except OptionError:
        return False
    sizes = [concrete(size) for size in traced.shape]  # of an unknown size the one at hand, without a guard on it
    return next_tokens(run, torch.empty(sizes, device="meta")) is not None


def _fits(value: Tensor, logits: Tensor, node: fx.Node) -> bool:
    return value.shape == logits.shape[:-1] and bool(node.users)


def cost_of_output(run: SampleRun, dense: Any, sparse: Any, quantity: str) -> float:
    """What sparse attention cost of a budget on one sample.

    Args:
        run: the sample; dense, sparse: the graph's outputs on it.
        quantity: of the budget: ``"perplexity"`` is the rise of the cross entropy.

    Raises:
        OptionError: as :class:`EndToEnd`.
    """
    if quantity == "output":
        return output_errors(find_output(dense), find_output(sparse), None, 1)[0].output
    logits = find_logits(dense)
    targets = next_tokens(run, logits)
    if quantity == "perplexity" and targets is None:
        raise OptionError(NO_TOKENS)
    change = output_change(logits, find_logits(sparse), targets)
    return change.kl if quantity == "kl" else change.loss


def output_change(dense: Tensor, sparse: Tensor, targets: Tensor | None) -> OutputChange:
    """Compare two logits ``[..., positions, classes]``; targets ``[..., positions - 1]``."""
    return output_changes(dense, sparse, targets, 1)[0]


def output_changes(dense: Tensor, sparse: Tensor, targets: Tensor | None, pieces: int) -> list[OutputChange]:
    """The same in contiguous pieces of positions.

    The sums run over chunks of positions in fp32, so that no copy of the logits is made.
    """
    labels = _labels(dense, targets)
    return [
        _distributions(p, q, None if labels is None else labels[place])
        for p, q, place in _pieces(dense, sparse, pieces)
    ]


def output_errors(dense: Tensor, sparse: Tensor, _: Tensor | None, pieces: int) -> list[OutputChange]:
    """Compare two outputs ``[..., D]`` in contiguous pieces of rows: relative L1, NaN where one is not finite."""
    errors = []
    for a, b, _place in _pieces(dense, sparse, pieces):
        magnitude = float(a.double().abs().sum())
        errors.append(float((b.double() - a.double()).abs().sum()) / (magnitude or 1.0))
    return [OutputChange(output=error) for error in errors]


def _pieces(dense: Tensor, sparse: Tensor, pieces: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """The rows of both in contiguous pieces, as even as they come, and where they lie."""
    flat_dense, flat_sparse = dense.reshape(-1, dense.shape[-1]), sparse.reshape(-1, sparse.shape[-1])
    rows, pieces = len(flat_dense), min(pieces, len(flat_dense))
    for piece in range(pieces):
        place = slice(rows * piece // pieces, rows * (piece + 1) // pieces)
        yield flat_dense[place], flat_sparse[place], place


def _distributions(flat_dense: Tensor, flat_sparse: Tensor, labels: Tensor | None) -> OutputChange:
    """Compare logits ``[positions, classes]``; labels ``[positions]``, -1 where there is none."""
    rows = max(1, CHUNK_ELEMENTS // flat_dense.shape[-1])
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
