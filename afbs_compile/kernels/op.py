"""``afbs::sparse_attention``: the operator that the rewritten graphs call.

One implementation serves all devices and branches on them: CUDA and ROCm run the Triton kernels, everything else the
PyTorch predictor and FlexAttention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels import flex, reference
from afbs_compile.kernels import precision as precisions
from afbs_compile.kernels.checks import check_call
from afbs_compile.kernels.fp8 import constant_count
from afbs_compile.kernels.policy import predict_mask
from afbs_compile.kernels.predict import BlockLists, predict_blocks
from afbs_compile.kernels.reference import KEEP_ALL, Kept

LISTS_SHARE = 0.035
"""Largest part of the memory of q, k, v and the output that block lists may take; at 128K tokens they and the block
means then stay under a twentieth of it. One key head's lists are the least that is held at a time."""


def engine_name(device: torch.device) -> str:
    """Which engine computes sparse attention on a device: ``"triton"`` or ``"flex"``."""
    return "triton" if device.type == "cuda" else "flex"


class Serving(NamedTuple):
    """Which kernel computes a sparse call.

    Attributes:
        kernel: ``"hopper"`` (:mod:`afbs_compile.kernels.hopper`), ``"portable"``
            (:mod:`afbs_compile.kernels.block_sparse`) or ``"flex"`` (:mod:`afbs_compile.kernels.flex`).
        reason: why a call on the engine ``"triton"`` is not on the Hopper kernel.
    """

    kernel: Literal["hopper", "portable", "flex"]
    reason: str | None = None


def serving(q: Tensor, k: Tensor, v: Tensor, lam: Sequence[float], block_q: int, block_k: int) -> Serving:
    """Which kernel computes a sparse call; what launches one asks here, and so do the reports.

    Args:
        q, k, v, lam, block_q, block_k: as in :func:`sparse_attention_with_counts`; no data is read.
    """
    if engine_name(q.device) != "triton":
        return Serving("flex")
    from afbs_compile.kernels import hopper  # Triton is not installed everywhere.

    reason = hopper.refusal(q, k, v, lam, block_q, block_k)
    return Serving("hopper") if reason is None else Serving("portable", reason)


def _empty_output(q: Tensor) -> Tensor:
    """``[B, H, N, D]`` that lies in memory as ``[B, N, H, D]``: the transpose and reshape that follow copy nothing."""
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim).transpose(1, 2)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """``F.scaled_dot_product_attention``, its result in the layout of :func:`_empty_output`."""
    with _own_precision(q):
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa)
    result = _empty_output(q)
    return out if out.stride() == result.stride() else result.copy_(out)


def _own_precision(q: Tensor) -> torch.autocast:
    """Context in which the operands' dtype decides: autocast would predict, and return, in another one."""
    return torch.autocast(q.device.type, enabled=False)


def _attend_in_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    lam: Sequence[float],
    policy: Sequence[str] | None,
    precision: Sequence[str] | None,
    fp8_constants: Sequence[float] | None,
    kept: Kept,
    **call: Any,
) -> tuple[Tensor, Tensor]:
    """Predict and attend on Triton for as many heads at a time as the memory of their block lists allows."""
    heads, repeats = q.shape[1], q.shape[1] // k.shape[1]
    out, counts = _empty_output(q), []
    step = heads_at_once(q, k, call["block_q"], call["block_k"])
    for first in range(0, heads, step):
        mine, keys = slice(first, first + step), slice(first // repeats, (first + step) // repeats)
        parts = (q, k, v, out) if step >= heads else (q[:, mine], k[:, keys], v[:, keys], out[:, mine])
        names = None if policy is None else policy[mine]
        lists = predict_blocks(*parts[:2], tau[mine], theta[mine], policy=names, kept=kept, **call)
        if precision is None:
            _attend_on_triton(*parts[:3], lists, lam[mine], out=parts[3], **call)
        else:
            width = constant_count(1, q.shape[3])
            constants = None if fp8_constants is None else fp8_constants[keys.start * width : keys.stop * width]
            names, fused = precision[mine], _attend_on_triton
            precisions.attend(*parts, lists, lam[mine], fused, precision=names, constants=constants, **call)
        counts.append(lists.counts)
        del lists  # before the next ones are made: their memory is what the groups are for
    return out, counts[0] if len(counts) == 1 else torch.cat(counts, 1)


def _attend_on_triton(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, lam: Sequence[float], *, out: Tensor, **call: Any
) -> None:
    """The kernel that serves the call; it writes into ``out``."""
    from afbs_compile.kernels import block_sparse, hopper  # Triton is not installed everywhere.

    chosen = serving(q, k, v, lam, call["block_q"], call["block_k"]).kernel
    kernel = hopper if chosen == "hopper" else block_sparse
    kernel.attend(q, k, v, lists, lam, out=out, **call)


def heads_at_once(q: Tensor, k: Tensor, block_q: int, block_k: int) -> int:
    """Query heads whose block lists take at most :data:`LISTS_SHARE` of the memory of q, k, v and the output.

    All of them at moderate lengths: the lists of a head grow with the square of the length.

    Returns:
        A multiple of the query heads per key head, at least one of it.
    """
    repeats = q.shape[1] // k.shape[1]
    count_q, count_k = (reference.block_count(q.shape[2], block) for block in (block_q, block_k))
    lists = q.shape[0] * repeats * count_q * count_k * torch.int32.itemsize
    operands = 2 * (q.numel() + k.numel()) * q.element_size()
    groups = -(-k.shape[1] // max(1, int(LISTS_SHARE * operands / lists)))
    return repeats * -(-k.shape[1] // groups)


def _sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    lam: Sequence[float],
    policy: Sequence[str] | None,
    precision: Sequence[str] | None,
    fp8_constants: Sequence[float] | None,
    kept: Kept,
    **call: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`sparse_attention_with_counts` on checked arguments that hold at least one element."""
    if precision is not None and "fp8" in precision:
        reason = precisions.refusal(q.device, q.dtype, q.shape[3], lam, call["block_q"], call["block_k"])
        if reason is not None:
            raise ValueError(f"precision is fp8, and {reason}")
    with _own_precision(q):
        if engine_name(q.device) == "triton":
            return _attend_in_groups(q, k, v, tau, theta, lam, policy, precision, fp8_constants, kept, **call)
        live = predict_mask(q, k, tau, theta, policy, kept=kept, **call)
        return flex.attend(q, k, v, live, **call), live.sum(-1, dtype=torch.int32)


def sparse_attention_with_counts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    lam: Sequence[float],
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    policy: Sequence[str] | None = None,
    precision: str | Sequence[str] | None = None,
    fp8_constants: Sequence[float] | None = None,
    last_rows: int = 0,
    local_keys: int = 0,
) -> tuple[Tensor, Tensor]:
    """The sparse engine of the device, whatever the length and the constants, and how much it computed.

    Args:
        q: ``[B, H, N, D]`` fp16, bf16 or fp32, D from 16 to 256; k, v: ``[B, H_kv, N, D]``, H a multiple of H_kv.
        tau, theta, lam: one number per query head, as in :mod:`afbs_compile.kernels.reference`.
        causal: whether row r attends keys 0..r only.
        scale: softmax scale; ``None`` means ``D ** -0.5``.
        block_q, block_k: rows per block; ``block_q`` is a multiple of ``block_k``.
        policy: one name per query head, of :data:`afbs_compile.kernels.policy.POLICIES`; ``None`` is ``meansim`` for
            all. Only ``meansim`` has a theta; other heads need a negative one.
        precision: one of :data:`afbs_compile.kernels.precision.PRECISIONS`, or such a name per query head; ``None`` is
            that of the operands. FP8 needs a Hopper GPU, fp16 or bf16, D 64 or 128, blocks of 128 x 128 and lam off.
        fp8_constants: what calibration knows of the keys and values, as
            :meth:`afbs_compile.kernels.fp8.Constants.unpacked` takes it.
        last_rows, local_keys: which blocks every tau keeps, as in :class:`afbs_compile.kernels.reference.Kept`.

    Returns:
        The output ``[B, H, N, D]``, which lies in memory as ``[B, N, H, D]``, and the number of live key blocks of
        each query block, int32 ``[B, H, n_q]``.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """
    precision = [precision] * q.shape[1] if isinstance(precision, str) else precision
    kept = Kept(last_rows, local_keys)
    check_call(q, k, v, tau, theta, lam, block_q, block_k, policy, precision, fp8_constants, kept)
    if q.numel() == 0:
        count_q = reference.block_count(q.shape[2], block_q)
        return _empty_output(q), q.new_zeros(*q.shape[:2], count_q, dtype=torch.int32)
    call = {"causal": causal, "scale": scale, "block_q": block_q, "block_k": block_k}
    return _sparse_attention(q, k, v, tau, theta, lam, policy, precision, fp8_constants, kept, **call)


@torch.library.custom_op(
    "afbs::sparse_attention",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, float[] tau, float[] theta, float[] lam, bool is_causal, float? scale=None, "
        "int block_q=64, int block_k=64, int min_length=0, int max_length=0, str[]? policy=None, "
        "str[]? precision=None, float[]? fp8_constants=None, int last_rows=0, int local_keys=0) -> Tensor"
    ),
)
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    lam: Sequence[float],
    is_causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    min_length: int = 0,
    max_length: int = 0,
    policy: Sequence[str] | None = None,
    precision: Sequence[str] | None = None,
    fp8_constants: Sequence[float] | None = None,
    last_rows: int = 0,
    local_keys: int = 0,
) -> Tensor:
    """Block-sparse attention with each head's constants; dense where that is what they say.

    The operands are those of :func:`sparse_attention_with_counts`.

    Args:
        min_length: sequences shorter than this run dense, and so does a call whose heads are all DENSE.
        max_length: sequences longer than this run dense; 0 for no limit.

    Returns:
        ``[B, H, N, D]`` in the dtype of ``q``; in memory ``[B, N, H, D]``.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
        RuntimeError: a gradient is asked for.
    """
    kept = Kept(last_rows, local_keys)
    check_call(q, k, v, tau, theta, lam, block_q, block_k, policy, precision, fp8_constants, kept)
    if q.numel() == 0:
        return _empty_output(q)
    too_long = 0 < max_length < q.shape[2]
    if q.shape[2] < min_length or too_long or all(value >= KEEP_ALL for value in tau):
        return _dense_attention(q, k, v, is_causal, scale)
    call = {"causal": is_causal, "scale": scale, "block_q": block_q, "block_k": block_k}
    out, _ = _sparse_attention(q, k, v, tau, theta, lam, policy, precision, fp8_constants, kept, **call)
    return out


@sparse_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    lam: Sequence[float],
    is_causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    min_length: int = 0,
    max_length: int = 0,
    policy: Sequence[str] | None = None,
    precision: Sequence[str] | None = None,
    fp8_constants: Sequence[float] | None = None,
    last_rows: int = 0,
    local_keys: int = 0,
) -> Tensor:
    """Shape, dtype and strides of the result; the same checks as the real thing."""
    check_call(
        q, k, v, tau, theta, lam, block_q, block_k, policy, precision, fp8_constants, Kept(last_rows, local_keys)
    )
    return _empty_output(q)


def _refuse_gradient(*_: object, **__: object) -> None:
    """Called, after the forward, when an operand requires grad and gradients are recorded.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "afbs::sparse_attention has no gradient: run the model under torch.no_grad() or torch.inference_mode(), "
        "or detach q, k and v"
    )


sparse_attention.register_autograd(_refuse_gradient, setup_context=_refuse_gradient)
