"""The kernel that computes a sparse call, for a reader; :func:`afbs_compile.kernels.op.serving` decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from afbs_compile.kernels import flex, op
from afbs_compile.kernels.reference import LAMBDA_OFF


class Kernel(NamedTuple):
    """A kernel and how it is laid out.

    Attributes:
        name: ``"hopper 128x128"``, ``"portable 64x64 tiles, 4 warps, 2 stages"`` or ``"flex 64x64 tiles"``, say.
        reason: why it is not the quickest kernel of the engine; ``None`` where it is, or where there is one only.
    """

    name: str
    reason: str | None


@dataclass(frozen=True, eq=False)
class SparseCall:
    """What decides which kernel computes a sparse call.

    Attributes:
        q: ``[B, H, N, D]``; k, v: ``[B, H_kv, N, D]``; no data is read, so fake tensors do.
        lam: one number per query head.
        causal: whether row r attends keys 0..r only.
        block_q, block_k: rows per block.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lam: Sequence[float]
    causal: bool
    block_q: int
    block_k: int

    def kernel(self) -> Kernel:
        """What computes the call now.

        On GPUs other than Hopper the portable kernel's launch shape is a first guess until a call of at least
        :data:`afbs_compile.kernels.tiling.SHORTEST_TIMED` tokens has timed it against its neighbours.
        """
        blocks = (self.block_q, self.block_k)
        serving = op.serving(self.q, self.k, self.v, self.lam, *blocks)
        kind = (self.q.device, self.q.dtype, self.q.shape[3])
        if serving.kernel == "flex":
            return Kernel(*flex.choice(*kind, *blocks))
        if serving.kernel == "hopper":
            return Kernel(f"hopper {self.block_q}x{self.block_k}", None)
        from afbs_compile.kernels import block_sparse  # Triton is not installed everywhere.

        shape = block_sparse.launch_choice(
            *kind,
            causal=self.causal,
            block_q=self.block_q,
            block_k=self.block_k,
            uses_lambda=any(value > LAMBDA_OFF for value in self.lam),
        )
        return Kernel(shape, f"not the Hopper kernel: {serving.reason}")
