"""Measure thresholds on captured operands: error and sparsity of every head of a site in one engine call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.op import sparse_attention_with_counts
from afbs_compile.kernels.reference import Kept, block_count, kept_blocks, visible_blocks
from afbs_compile.passes.capture import Operands
from afbs_compile.tuner.space import SitePrecision, Thresholds

WINDOWS = 5
"""Validation inputs that one sample is split into: the number of inputs the paper validates on."""


L1_ELEMENTS = 2**24
"""Elements that the error is computed of at a time."""

LOW_FIDELITY_SHARE = 4
"""The paper's stage 1 runs on short sequences: here a quarter of the length, a sixteenth of the work."""

KEPT = Kept(last_rows=64, local_keys=128)
"""Of causal inputs (:func:`with_kept_blocks`). At +1 % of perplexity and 8,192 tokens 64 local keys need more work, 256
less (``benchmarks/NOTES.md``), but those are a quarter of all work at 2,048. As many last rows as MInference's."""

MIN_LOW_BLOCKS = 16
"""Fewer blocks than this say little about a long sequence: then the low fidelity is the full length."""


@dataclass(frozen=True)
class Measurement:
    """What thresholds do to every head.

    Attributes:
        error: ``[inputs, H]`` fp32, relative L1 (Eq. 1): ``sum|O - O_dense| / sum|O_dense|`` per input. An input is
            one batch element of one sample or, where there is only one, each of its disjoint windows of queries.
        sparsity: ``[H]`` fp32, ``1 - live / causally valid blocks``, mean over the samples.
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
    """Measures thresholds of one site on its captured samples.

    Args:
        samples: operands in canonical form; all with the same heads.
        block_q, block_k: block shape.
        windows: split each sample's queries into this many disjoint windows, an input each; by default
            :data:`WINDOWS` where there is a single input, else 1.

    Attributes:
        calls: sparse attention calls so far, each as a share of one on a sample of full length.
        evaluations: attention work so far in dense calls over one sample of full length: the live share of each sparse
            call, and the dense calls that errors are measured against.
    """

    def __init__(
        self,
        samples: Sequence[Operands],
        *,
        block_q: int,
        block_k: int,
        windows: int | None = None,
        policy: Sequence[str] | None = None,
    ) -> None:
        single = sum(sample.q.shape[0] for sample in samples) == 1
        self.windows = (WINDOWS if single else 1) if windows is None else windows
        self.samples = samples
        self.block_q, self.block_k, self.policy = block_q, block_k, policy
        self._dense = [dense_attention(sample) for sample in samples]
        self.calls = 0.0
        self.evaluations = sum(self._cost(sample) for sample in samples)

    @property
    def heads(self) -> int:
        """Query heads of the site."""
        return int(self.samples[0].q.shape[1])

    @property
    def length(self) -> int:
        """Tokens of the longest sample."""
        return max(int(sample.q.shape[2]) for sample in self.samples)

    def prefix(self, length: int, samples: int, windows: int | None = None) -> Meter:
        """A meter of lower fidelity: the first ``length`` tokens of the first ``samples`` samples.

        For causal attention a prefix is exact: its dense output is the prefix of the dense output.
        """
        short = [
            replace(s, q=s.q[:, :, :length], k=s.k[:, :, :length], v=s.v[:, :, :length]) for s in self.samples[:samples]
        ]
        windows = windows or self.windows
        return Meter(short, block_q=self.block_q, block_k=self.block_k, windows=windows, policy=self.policy)

    def __call__(self, thresholds: Thresholds, precision: SitePrecision | None = None) -> Measurement:
        """Run every sample at these thresholds, every head in its precision."""
        errors, sparsities = [], []
        for sample, dense in zip(self.samples, self._dense, strict=True):
            out, counts = sparse_attention(sample, thresholds, self.policy, self.block_q, self.block_k, precision)
            errors.append(relative_l1(out, dense, self.windows, self.block_q))
            sparsities.append(self._sparsity(sample, counts))
            self.calls += self._cost(sample)
            self.evaluations += self._cost(sample) * (1 - float(sparsities[-1].mean()))
        return Measurement(torch.cat(errors).cpu(), torch.stack(sparsities).mean(0).cpu())

    def _cost(self, sample: Operands) -> float:
        return float(sample.q.shape[2] / self.length) ** 2

    def _sparsity(self, sample: Operands, counts: Tensor) -> Tensor:
        count_q, count_k = (block_count(sample.q.shape[2], block) for block in (self.block_q, self.block_k))
        valid = visible_blocks(count_q, count_k, self.block_q, self.block_k, sample.causal, torch.device("cpu")).sum()
        # sparsity = 1 - live blocks / causally valid blocks, over the whole batch
        return 1 - counts.sum(-1).float().mean(0) / valid.item()


def with_kept_blocks(samples: Sequence[Operands]) -> list[Operands]:
    """Samples that always keep the keys right before a query block and whose last rows attend everything, if causal.

    Both serve few rows of many, which do not move a block's mean, so no predictor of blocks can know; the error of a
    head does not show it either, for it is a sum over all rows. A block's first rows have hardly a key of their own
    block to look back at, and most of what a token attends lies right before it. The last row is what a language
    model's answer is read off, and it may ask for a block that no other row needs.
    """
    return [replace(sample, kept=KEPT) if sample.causal else sample for sample in samples]


@functools.cache
def kept_share(length: int, block_q: int, block_k: int, causal: bool, kept: Kept) -> float:
    """The share of an input's visible blocks that every tau keeps."""
    counts, cpu = (block_count(length, block_q), block_count(length, block_k)), torch.device("cpu")
    visible = visible_blocks(*counts, block_q, block_k, causal, cpu)
    return float((kept_blocks(length, block_q, block_k, kept, cpu) & visible).sum() / visible.sum())


def nothing_to_skip(samples: Sequence[Operands], shapes: Sequence[Sequence[int]]) -> str | None:
    """The reason why nothing can be skipped, where the blocks that are always kept are all there are."""
    length = max(sample.q.shape[2] for sample in samples)
    shares = [kept_share(s.q.shape[2], *shape, s.causal, s.kept) for s in samples for shape in shapes]
    return f"too short: every block of its {length:,} tokens is always kept" if min(shares) >= 1 else None


def low_fidelity(meter: Meter, windows: int | None = None) -> Meter:
    """The meter of low fidelity: a prefix of the first sample, or the first sample whole if it is short.

    Args:
        meter: the meter at full length.
        windows: as in :class:`Meter`; the full meter's by default.
    """
    length = meter.length // LOW_FIDELITY_SHARE // meter.block_q * meter.block_q
    return meter.prefix(length if length >= MIN_LOW_BLOCKS * meter.block_q else meter.length, 1, windows)


def dense_attention(sample: Operands) -> Tensor:
    """The dense output ``[B, H, N, D]`` that errors are measured against, in the operands' dtype."""
    return F.scaled_dot_product_attention(
        sample.q, sample.k, sample.v, is_causal=sample.causal, scale=sample.scale, enable_gqa=True
    )


def sparse_attention(
    sample: Operands,
    thresholds: Thresholds,
    policy: Sequence[str] | None,
    block_q: int,
    block_k: int,
    precision: SitePrecision | None = None,
) -> tuple[Tensor, Tensor]:
    """The output ``[B, H, N, D]`` of the operator at a site's thresholds, and its live blocks per query block."""
    return sparse_attention_with_counts(
        sample.q,
        sample.k,
        sample.v,
        thresholds.tau.tolist(),
        thresholds.theta.tolist(),
        thresholds.lam.tolist(),
        causal=sample.causal,
        scale=sample.scale,
        block_q=block_q,
        block_k=block_k,
        policy=policy,
        **sample.kept._asdict(),
        **(precision.arguments if precision is not None else {}),
    )


def relative_l1(out: Tensor, dense: Tensor, windows: int = 1, block: int = 1) -> Tensor:
    """Relative L1 distance per input and head (Eq. 1).

    Args:
        out, dense: ``[B, H, N, D]``.
        windows: split the rows into at most this many disjoint windows of whole blocks, an input each.
        block: rows per block.

    Returns:
        ``[B * windows, H]`` fp32; 0 where both sums are 0, NaN where an output is NaN.
    """
    # A few heads at a time: fp32 copies of long sequences would take more memory than the operands.
    some = max(1, L1_ELEMENTS // out[:, 0].numel())
    pairs = list(zip(out.split(some, 1), dense.split(some, 1), strict=True))
    difference = torch.cat([_row_sums(a.float() - b) for a, b in pairs], 1)
    magnitude = torch.cat([_row_sums(b) for _, b in pairs], 1)
    blocks = block_count(out.shape[2], block)
    edges = sorted({blocks * i // windows * block for i in range(1, windows)} - {0})
    pieces = zip(difference.tensor_split(edges, -1), magnitude.tensor_split(edges, -1), strict=True)
    tiny = torch.finfo(torch.float32).tiny
    return torch.cat([d.sum(-1) / m.sum(-1).clamp_min(tiny) for d, m in pieces])


def _row_sums(x: Tensor) -> Tensor:
    """``sum|x|`` of every row, ``[.., N]`` fp32, without an fp32 copy of ``x``."""
    sums: Tensor = torch.linalg.vector_norm(x, ord=1, dim=-1, dtype=torch.float32)
    return sums
