"""What a policy is: a score for every (query block, key block), the rule by which tau selects, and its form in ONNX.

A policy is one file: a subclass of :class:`Policy` with its scores in plain PyTorch, which are the specification, a
faster form for GPUs, and the body of its ONNX function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.rules import Rule


class OnnxBody(NamedTuple):
    """How a policy scores in standard ONNX operators; what selects by scores is one for all of them.

    Attributes:
        name: of the function that scores as :meth:`Policy.scores`, ``(q, k, formula, valid, mask, blurred, bias,
            scaling, softcap, capped, by_mask, with_bias, size_q, size_k) => (scores)``, whether it uses them or not:
            q and k fp32 with a key head for each query head and zeros for keys that are not valid; ``formula``,
            ``valid`` and ``mask`` as in :mod:`afbs_compile.export.onnx_sight`; which blocks are blurred, and what is
            added to the scores of each on average, ``[B, H or 1, n_q, n_k]``; then scalars: the softmax scale, the
            softcap and whether there is one, whether there is a dense mask and whether its numbers are added to scores,
            and the rows of a block of queries and of keys. It reads no attributes (TensorRT's parser loses them) and
            computes no size from values (TensorRT has no such sizes).
        functions: texts of the functions that it calls, then its own. :data:`afbs_compile.export.onnx_rules.RULES` and
            :data:`afbs_compile.export.onnx_sight.SIGHT` are there for every policy.
    """

    name: str
    functions: tuple[str, ...]


class Policy(ABC):
    """One policy; it has no state.

    Attributes:
        name: what recipes and graphs call it.
        rule: how tau selects.
        has_theta: whether theta keeps the blocks that are not similar to themselves.
        explored: the thetas that calibration explores the policy with (below 0: off); empty where it does not.
        onnx: its form in ONNX; without one an exported call stays dense.
    """

    name: ClassVar[str]
    rule: ClassVar[Rule]
    has_theta: ClassVar[bool] = False
    explored: ClassVar[tuple[float, ...]] = ()
    onnx: ClassVar[OnnxBody | None] = None

    @abstractmethod
    def scores(self, operands: Operands, shape: BlockShape) -> Tensor:
        """Score every block, in plain PyTorch: the specification.

        Causality: the row of a query block depends on no token that none of its rows sees.

        Args:
            operands: of the call; ``v`` does not matter.
            shape: rows per block.

        Returns:
            fp32 ``[B, H, n_q, n_k]``: the logarithm of the probability, up to a constant per row (of the strength, as
            it is, where that is the rule). Entries of blocks that are not visible are unspecified. A row with NaN
            keeps every block.
        """

    def write_scores(
        self, operands: Operands, shape: BlockShape, out: Tensor, *, with_similarity: bool = False
    ) -> Tensor | None:
        """Compute :meth:`scores` on the GPU, deterministically, without a tensor of N x N and without waiting for it.

        Args:
            operands, shape: as in :meth:`scores`.
            out: int32 ``[B, H, n_q, n_k]``, contiguous; gets the bits of the fp32 scores.
            with_similarity: whether self-similarities are wanted.

        Returns:
            Of a policy that has a theta, fp32, the self-similarities of all blocks of q, then of those of k (1 unless
            they are wanted); NaN where a block has an entry that is not finite. Of the others ``None``.
        """
        out.view(torch.float32).copy_(self.scores(operands, shape))
        return None
