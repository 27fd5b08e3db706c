"""What ``afbs::sparse_attention`` takes: one place for every refusal of its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from afbs_compile.kernels.policy import check_policies
from afbs_compile.kernels.precision import check_precision
from afbs_compile.kernels.reference import Kept

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(16, 257)
BLOCKS = (16, 32, 64, 128)


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    lam: Sequence[float],
    block_q: int,
    block_k: int,
    policy: Sequence[str] | None,
    precision: Sequence[str] | None,
    fp8_constants: Sequence[float] | None,
    kept: Kept,
) -> None:
    """Refuse arguments that no engine takes; of the tensors only shapes, dtypes and devices are read.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """
    _check_tensors(q, k, v)
    _check_constants(q.shape[1], tau, theta, lam, block_q, block_k, policy)
    check_precision(q, k, precision, fp8_constants)
    for name, value in kept._asdict().items():
        if value < 0:
            raise ValueError(f"{name} is {value}; accepted: 0 or more")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has {x.dim()} dimensions; accepted: 4, [batch, heads, length, head_dim]")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; accepted: {', '.join(map(str, DTYPES))}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; accepted: the same")
    (batch, heads, length, dim), kv_heads = q.shape, k.shape[1]
    if not HEAD_DIMS[0] <= dim <= HEAD_DIMS[-1]:
        raise ValueError(f"q has head_dim {dim}; accepted: {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}; accepted: a multiple of k's heads")
    if {type(batch), type(length), type(dim)} == {int} and (batch, kv_heads, length, dim) == k.shape == v.shape:
        return  # the checks below also take symbolic sizes, and time
    for name, x, shape in (("k", k, (batch, kv_heads, length, dim)), ("v", v, k.shape)):
        for axis, (came, wanted) in enumerate(zip(x.shape, shape, strict=True)):
            torch._check_value(
                came == wanted,
                lambda name=name, came=came, wanted=wanted, axis=axis: (
                    f"{name} has size {came} in dimension {axis}; accepted: {wanted}, as the other operands have "
                    "(query and key lengths must be equal)"
                ),
            )


def _check_constants(
    heads: int,
    tau: Sequence[float],
    theta: Sequence[float],
    lam: Sequence[float],
    block_q: int,
    block_k: int,
    policy: Sequence[str] | None,
) -> None:
    for name, values in (("tau", tau), ("theta", theta), ("lam", lam)):
        if len(values) != heads:
            raise ValueError(f"{name} has {len(values)} constants; accepted: one for each of the {heads} query heads")
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name} is {list(values)}; accepted: finite numbers")
    if policy is not None:
        check_policies(policy, theta)
    if max(lam, default=0.0) > 0.0:
        raise ValueError(f"lam is {list(lam)}; accepted: numbers at most 0 (log2 units under the running maximum)")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block not in BLOCKS:
            raise ValueError(f"{name} is {block}; accepted: {', '.join(map(str, BLOCKS))}")
    if block_q % block_k:
        raise ValueError(f"block_q is {block_q} and block_k is {block_k}; accepted: block_q a multiple of block_k")
