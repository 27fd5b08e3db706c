"""Measure thresholds on captured operands: error and sparsity of every head of a site in one engine call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape, block_count
from afbs_compile.kernels.call import Kept, SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.sight import looks_back, resolved, rows_that_count, sight_of
from afbs_compile.kernels.spec.selection import kept_blocks

WINDOWS = 5
"""Validation inputs that one sample is split into: the number of inputs the paper validates on."""


L1_ELEMENTS = 2**24
"""Elements that the error is computed of at a time."""

LOW_FIDELITY_SHARE = 4
"""The paper's stage 1 runs on short sequences: here a quarter of the length, a sixteenth of the work."""

LOCAL_KEPT = Kept(last_rows=64, local_keys=128)
"""Of masks that look back (:func:`kept_for`). At +1 % of perplexity and 8,192 tokens 64 local keys need more work, 256
less (``benchmarks/NOTES.md``), but those are a quarter of all work at 2,048. As many last rows as MInference's."""

MIN_LOW_BLOCKS = 16
"""Fewer blocks than this say little about a long sequence: then the low fidelity is the full length."""


@dataclass(frozen=True)
class Measurement:
    """What thresholds do to every head.

    Attributes:
        error: ``[inputs, H]`` fp32, relative L1 (Eq. 1): ``sum|O - O_dense| / sum|O_dense|`` per input. An input is
            one batch element of one sample or, where there is only one, each of its disjoint windows of queries.
        sparsity: ``[H]`` fp32, ``1 - live / visible blocks``, mean over the samples.
    """

    error: Tensor
    sparsity: Tensor

    @property
    def worst(self) -> Tensor:
        """``[H]``: the largest error of any input; NaN if one is."""
        return self.error.amax(0)

    def only(self, heads: Tensor) -> Measurement:
        """The same for the heads in ``heads`` (``[H]`` bool); the others are DENSE: no error, nothing skipped."""
        return Measurement(torch.where(heads, self.error, 0.0), torch.where(heads, self.sparsity, 0.0))


class Meter:
    """Measures calls of one site on its captured samples.

    Args:
        samples: operands in canonical form; all with the same heads.
        windows: split each sample's queries into this many disjoint windows, an input each; by default
            :data:`WINDOWS` where there is a single input, else 1.

    Attributes:
        calls: sparse attention calls so far, each as a share of one on a sample of full length.
        evaluations: attention work so far in dense calls over one sample of full length: the live share of each sparse
            call, and the dense calls that errors are measured against.
    """

    def __init__(self, samples: Sequence[Operands], *, windows: int | None = None) -> None:
        single = sum(sample.q.shape[0] for sample in samples) == 1
        self.windows = (WINDOWS if single else 1) if windows is None else windows
        self.samples = samples
        self._most = max(sample.work for sample in samples)
        self._dense = [dense_attention(sample) for sample in samples]
        self.calls = 0.0
        self.evaluations = sum(self._cost(sample) for sample in samples)

    @property
    def heads(self) -> int:
        """Query heads of the site."""
        return self.samples[0].heads

    @property
    def length(self) -> int:
        """Tokens of the longest sample."""
        return max(sample.q_len for sample in self.samples)

    def prefix(self, length: int, samples: int, windows: int | None = None) -> Meter:
        """A meter of lower fidelity: the first ``length`` tokens of the first ``samples`` samples.

        Where the mask is ``local`` a prefix is exact: its dense output is the prefix of the dense output.
        """
        short = [sample.first_rows(length) for sample in self.samples[:samples]]
        return Meter(short, windows=windows or self.windows)

    def __call__(self, call: SparseCall) -> Measurement:
        """Run every sample at these constants."""
        errors, sparsities = [], []
        for sample, dense in zip(self.samples, self._dense, strict=True):
            out, counts = run(sample, call)
            errors.append(relative_l1(out, dense, self.windows, call.shape.q, rows_that_count(sample)))
            sparsities.append(sparsity_of(sample, call.shape, counts))
            self.calls += self._cost(sample)
            self.evaluations += self._cost(sample) * (1 - float(sparsities[-1].mean()))
        return Measurement(torch.cat(errors).cpu(), torch.stack(sparsities).mean(0).cpu())

    def _cost(self, sample: Operands) -> float:
        return sample.work / self._most


def visible_count(sample: Operands, shape: BlockShape) -> float:
    """Blocks of a head and batch element that hold a key which some row sees, on average over both."""
    key = ("visible", shape)
    if key not in sample.derived:
        visible = sight_of(resolved(sample), shape).visible
        sample.derived[key] = float(visible.float().mean((0, 1)).sum())
    return float(sample.derived[key])


def sparsity_of(sample: Operands, shape: BlockShape, counts: Tensor) -> Tensor:
    """``1 - live / visible blocks`` of every head over the whole batch, ``[H]`` fp32.

    Args:
        sample: the operands; shape: rows per block.
        counts: live blocks, ``[B, H, n_q]``.
    """
    return 1 - counts.sum(-1).float().mean(0) / visible_count(sample, shape)


def kept_for(sample: Operands) -> Kept:
    """The blocks that calibrated calls always keep: where rows look back those near a block and all of the last rows.

    Both serve few rows of many, which do not move a block's mean, so no predictor of blocks can know; the error of a
    head does not show it either, for it is a sum over all rows. A block's first rows have hardly a key of their own
    block to look back at, and most of what a token attends lies right before it. The last row is what a language
    model's answer is read off, and it may ask for a block that no other row needs.
    """
    return LOCAL_KEPT if looks_back(sample) else Kept()


def kept_share(sample: Operands, shape: BlockShape, kept: Kept) -> float:
    """The share of an input's visible blocks that every tau keeps; 1 where nothing is visible."""
    sample = resolved(sample)
    count = float(kept_blocks(sample, shape, kept).float().mean((0, 1)).sum())
    return count / max(visible_count(sample, shape), count, 1e-9) if count else 1.0


def nothing_to_skip(samples: Sequence[Operands], kept: Kept, shapes: Sequence[BlockShape]) -> str | None:
    """The reason why nothing can be skipped, where the blocks that are always kept are all there are."""
    length = max(sample.k_len for sample in samples)
    shares = [kept_share(sample, shape, kept) for sample in samples for shape in shapes]
    return f"too short: every block of its {length:,} tokens is always kept" if min(shares) >= 1 else None


def low_fidelity(meter: Meter, block: int, windows: int | None = None) -> Meter:
    """The meter of low fidelity: a prefix of the first sample, or the first sample whole if it is short.

    Args:
        meter: the meter at full length; block: rows of a block.
        windows: as in :class:`Meter`; the full meter's by default.
    """
    length = meter.length // LOW_FIDELITY_SHARE // block * block
    return meter.prefix(length if length >= MIN_LOW_BLOCKS * block else meter.length, 1, windows)


def attend_sparsely(sample: Operands, call: SparseCall) -> Tensor | None:
    """Sparse attention on a site's operands; ``None`` where every head is DENSE."""
    return None if call.is_dense else run(sample, call)[0]


def relative_l1(out: Tensor, dense: Tensor, windows: int = 1, block: int = 1, counted: Tensor | None = None) -> Tensor:
    """Relative L1 distance per input and head (Eq. 1).

    Args:
        out, dense: ``[B, H, N, D]``.
        windows: split the rows into at most this many disjoint windows of whole blocks, an input each.
        block: rows per block.
        counted: bool ``[B, N]``, the rows that are looked at; ``None`` for all.

    Returns:
        ``[B * windows, H]`` fp32; 0 where both sums are 0, NaN where an output is NaN.
    """
    pairs = list(some_heads(out, dense))
    difference = torch.cat([_row_sums(a.float() - b) for a, b in pairs], 1)
    magnitude = torch.cat([_row_sums(b) for _, b in pairs], 1)
    if counted is not None:
        difference, magnitude = (x.masked_fill(~counted[:, None], 0.0) for x in (difference, magnitude))
    blocks = block_count(out.shape[2], block)
    edges = sorted({blocks * i // windows * block for i in range(1, windows)} - {0})
    pieces = zip(difference.tensor_split(edges, -1), magnitude.tensor_split(edges, -1), strict=True)
    tiny = torch.finfo(torch.float32).tiny
    return torch.cat([d.sum(-1) / m.sum(-1).clamp_min(tiny) for d, m in pieces])


def some_heads(out: Tensor, dense: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both a few heads at a time: fp32 copies of long sequences would take more memory than the operands."""
    some = max(1, L1_ELEMENTS // out[:, 0].numel())
    return zip(out.split(some, 1), dense.split(some, 1), strict=True)


def _row_sums(x: Tensor) -> Tensor:
    """``sum|x|`` of every row, ``[.., N]`` fp32, without an fp32 copy of ``x``."""
    sums: Tensor = torch.linalg.vector_norm(x, ord=1, dim=-1, dtype=torch.float32)
    return sums
