"""FP8 where there is no Hopper GPU: the operator computes such heads by the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from afbs_compile import plan
from afbs_compile.kernels import fp8, op, precision
from afbs_compile.kernels.policy import predict_mask
from afbs_compile.kernels.reference import Kept
from afbs_compile.tuner import fp8 as tuner_fp8


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU have FP8, and let it be the faster precision."""
    own = op._sparse_attention

    def refusal(device: Any, dtype: Any, head_dim: int, lam: Any, block_q: int, block_k: int) -> str | None:
        return None if (block_q, block_k) == (128, 128) else f"blocks are {block_q}x{block_k}; accepted: 128x128"

    def sparse_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tau: Any,
        theta: Any,
        lam: Any,
        policy: Any,
        names: Any,
        constants: Any,
        kept: Kept,
        **call: Any,
    ) -> tuple[Tensor, Tensor]:
        out, counts = own(q, k, v, tau, theta, lam, policy, None, None, kept, **call)
        if names is not None and "fp8" in names:
            live = predict_mask(q, k, tau, theta, policy, kept=kept, **call)
            rounded = fp8.attend(fp8.quantise(q, k, v, constants, call["scale"]), live, causal=call["causal"])
            mine = torch.tensor([name == "fp8" for name in names])[:, None, None]
            out.copy_(torch.where(mine, rounded.to(q.dtype), out))
        return out, counts

    monkeypatch.setattr(op, "_sparse_attention", sparse_attention)
    for module in (precision, plan, tuner_fp8):
        monkeypatch.setattr(module, "refusal", refusal)
    monkeypatch.setattr(tuner_fp8, "best_ms", lambda calls: [2.0, 1.0])
