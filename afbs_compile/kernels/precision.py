"""Heads that compute in FP8 beside heads that compute in the precision of their operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels.fp8 import constant_count
from afbs_compile.kernels.policy import heads_of
from afbs_compile.kernels.predict import BlockLists

PRECISIONS = ("own", "fp8")
"""``"own"``: that of the operands; ``"fp8"``: :mod:`afbs_compile.kernels.fp8`."""


def refusal(
    device: torch.device, dtype: torch.dtype, head_dim: int, lam: Sequence[float], block_q: int, block_k: int
) -> str | None:
    """Why a call's heads cannot compute in FP8, or ``None`` if they can.

    Args:
        device, dtype, head_dim: of the operands.
        lam, block_q, block_k: as the operator takes them.

    Returns:
        A sentence that names what came and what is accepted.
    """
    if device.type != "cuda":
        return f"{device.type} is no NVIDIA GPU of compute capability 9.x"
    from afbs_compile.kernels import hopper_fp8  # Triton is not installed everywhere.

    return hopper_fp8.refusal(device, dtype, head_dim, lam, block_q, block_k)


def check_precision(q: Tensor, k: Tensor, precision: Sequence[str] | None, constants: Sequence[float] | None) -> None:
    """Refuse names and constants that do not fit a call.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """
    if precision is None:
        if constants is not None:
            raise ValueError("fp8_constants came without precision; accepted: together with heads of precision fp8")
        return
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
    if len(precision) != heads:
        raise ValueError(f"precision has {len(precision)} names; accepted: one for each of the {heads} query heads")
    for name in precision:
        if name not in PRECISIONS:
            raise ValueError(f"precision is {name!r}; accepted: {', '.join(PRECISIONS)}")
    if constants is not None:
        count = constant_count(kv_heads, dim)
        if len(constants) != count:
            raise ValueError(
                f"fp8_constants has {len(constants)} numbers; accepted: {count}, {dim} means and two peaks for each of "
                f"the {kv_heads} key heads"
            )
        if not math.isfinite(sum(constants)):  # one is enough, and thousands take time to look at
            raise ValueError("fp8_constants has a number that is not finite; accepted: finite numbers")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lists: BlockLists,
    lam: Sequence[float],
    own: Callable[..., object],
    *,
    precision: Sequence[str],
    constants: Sequence[float] | None,
    **call: Any,
) -> None:
    """Each head in its precision: one launch of attention for each precision that occurs.

    Where both do, the operands of either's heads are copied beside each other, a key head for each query head.

    Args:
        q, k, v, lists, lam, out, call: as in :func:`afbs_compile.kernels.hopper.attend`.
        own: the kernel that computes in the operands' precision.
        precision: a name per query head.
        constants: as in :meth:`afbs_compile.kernels.fp8.Constants.unpacked`.

    Raises:
        ValueError: heads of precision fp8 cannot be computed so; it says why.
    """
    from afbs_compile.kernels import hopper_fp8  # Triton is not installed everywhere.

    groups, width = q.shape[1] // k.shape[1], constant_count(1, q.shape[3])
    for name, heads in heads_of(precision).items():
        parts, part_lists, part_lam, part_out = (q, k, v), lists, lam, out
        table = None if constants is None else tuple(constants)
        if len(heads) < q.shape[1]:
            keys = [head // groups for head in heads]
            parts = (_taken(q, heads), _taken(k, keys), _taken(v, keys))
            part_lists = BlockLists(_taken(lists.counts, heads), _taken(lists.indices, heads))
            part_lam = [lam[head] for head in heads]
            part_out = torch.empty_like(parts[0])
            table = None if table is None else tuple(x for j in keys for x in table[j * width : (j + 1) * width])
        if name == "fp8":
            hopper_fp8.attend(*parts, part_lists, part_lam, constants=table, out=part_out, **call)
        else:
            own(*parts, part_lists, part_lam, out=part_out, **call)
        if part_out is not out:
            for place, head in enumerate(heads):
                out[:, head].copy_(part_out[:, place])


def _taken(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads, by slices: an index would have to be copied to a GPU, and waited for."""
    return torch.cat([x[:, head : head + 1] for head in heads], 1)
