"""``afbs::sparse_attention``: the operator that the rewritten graphs call, the only place where a call is flat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from afbs_compile.kernels.attend.machine import without_autocast
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands, check_operands, empty_output
from afbs_compile.kernels.sight import without_idle_parts

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, float[] tau, float[] theta, float[] lam, str mask, float? scale=None, "
    "int block_q=64, int block_k=64, int min_length=0, int max_length=0, str[]? policy=None, "
    "str[]? precision=None, float[]? fp8_constants=None, int last_rows=0, int local_keys=0, Tensor? valid=None, "
    "Tensor? attn_mask=None, float softcap=0.0, Tensor? sinks=None, int block_heads=1) -> Tensor"
)


def arguments_of(call: SparseCall, mask: Mask, scale: Any) -> dict[str, Any]:
    """The operator's arguments beside q, k and v.

    Args:
        call: its constants; mask: what a row sees; scale: a number, or a node of a graph.
    """
    return {**call.arguments(), "mask": str(mask), "scale": scale}


def operands_of(q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Any]) -> Operands:
    """What an operator is called on.

    Args:
        q, k, v, given: its arguments, all but the first three by name; those that are no operands are not looked at.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """
    scale = q.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    extras = {name: given[name] for name in ("valid", "attn_mask", "softcap", "sinks")}
    valid, attn_mask = extras["valid"], extras["attn_mask"]
    if valid is not None and valid.dim() == 2 and valid.shape[0] == 1:
        extras["valid"] = valid.expand(q.shape[0], -1)
    if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[3] == 1:
        extras["attn_mask"] = attn_mask.expand(-1, -1, -1, k.shape[2])
    operands = Operands(q, k, v, mask_of(given["mask"]), scale, **extras)
    check_operands(operands)
    return operands


def checked(q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Any]) -> tuple[Operands, SparseCall]:
    """The operator's arguments as operands and call.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """
    operands = operands_of(q, k, v, given)
    call = SparseCall.of_arguments(int(q.shape[1]), given)  # a number, also where its graph is dynamic
    call.check_operands(operands)
    return operands, call


@torch.library.custom_op("afbs::sparse_attention", mutates_args=(), schema=SCHEMA)
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    lam: Sequence[float],
    mask: str,
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
    valid: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    block_heads: int = 1,
) -> Tensor:
    """Block-sparse attention with each head's constants; dense where that is what they say.

    Args:
        q: ``[B, H, q_len, D]`` fp16, bf16 or fp32; k: ``[B, H_kv, k_len, D]``, v: ``[B, H_kv, k_len, D_v]``; H a
            multiple of H_kv, D and D_v from 1 to 512.
        tau, theta, lam: one number per query head, as in :class:`afbs_compile.kernels.call.SparseCall`.
        mask: the text of a mask (:mod:`afbs_compile.kernels.masks`): ``"full"`` or ``"causal"``, say.
        scale: softmax scale; ``None`` means ``D ** -0.5``.
        block_q, block_k: rows per block; ``block_q`` is a multiple of ``block_k``.
        min_length, max_length: calls of less work and over more keys run dense, as
            :meth:`afbs_compile.kernels.call.SparseCall.dense_at` says; so does a call whose heads are all DENSE.
        policy: one name per query head; ``None`` is ``meansim`` for all.
        precision: one name per query head; ``None`` is that of the operands. FP8 needs a Hopper GPU, fp16 or bf16, D 64
            or 128, blocks of 128 x 128 and lam off.
        fp8_constants: what calibration knows of the keys and values, as
            :meth:`afbs_compile.kernels.spec.fp8.Fp8Constants.unpacked` takes it.
        last_rows, local_keys: which blocks every tau keeps, as in :class:`afbs_compile.kernels.call.Kept`.
        valid, attn_mask: what else hides keys, softcap, sinks: what else becomes of scores, as in
            :class:`afbs_compile.kernels.operands.Operands`; of ``valid`` the batch, and of ``attn_mask`` every
            dimension, may be 1.
        block_heads: neighbouring query heads of a key head that share a selection.

    Returns:
        ``[B, H, q_len, D_v]`` in the dtype of ``q``; in memory ``[B, q_len, H, D_v]``.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
        RuntimeError: a gradient is asked for.
    """
    given = locals()
    operands, call = checked(q, k, v, given)
    if q.numel() == 0 or k.numel() == 0:
        return empty_output(q, v).zero_()
    operands = without_idle_parts(operands)
    return densely(operands) if call.dense_at(operands.q_len, operands.k_len) else run(operands, call)[0]


def densely(operands: Operands) -> Tensor:
    """Dense attention that lies in memory as the operators' results do."""
    with without_autocast(operands.device):
        out, result = dense_attention(operands), empty_output(operands.q, operands.v)
    return out if out.stride() == result.stride() else result.copy_(out)


@sparse_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Shape, dtype and strides of the result; the same checks as the real thing."""
    checked(q, k, v, by_name(arguments, named))
    return empty_output(q, v)


def by_name(arguments: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """What a call gives after q, k and v, by position and by name, and the defaults of the rest."""
    schema = sparse_attention._opoverload._schema.arguments[3:]
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return given | dict(zip((argument.name for argument in schema), arguments, strict=False)) | dict(named)


def refuse_gradient(*_: object, **__: object) -> None:
    """Called, after the forward, when an operand requires grad and gradients are recorded.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "block-sparse attention (afbs) has no gradient: run the model under torch.no_grad() or torch.inference_mode(), "
        "or detach q, k and v"
    )


sparse_attention.register_autograd(refuse_gradient, setup_context=refuse_gradient)
