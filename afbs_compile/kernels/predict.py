"""Which key blocks each query block attends, as lists: the form that the attention kernels read.

The rule is :func:`afbs_compile.kernels.policy.predict_mask`. On CUDA and ROCm it runs as three Triton kernels
(:mod:`afbs_compile.kernels.predict_triton`), everywhere else in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afbs_compile.kernels import reference


class BlockLists(NamedTuple):
    """The live key blocks of each query block.

    Attributes:
        counts: int32 ``[B, H, n_q]``, number of live blocks.
        indices: int32 ``[B, H, n_q, n_k]``; the first ``counts`` entries are the live blocks in ascending order, the
            others are unspecified but lie in ``0..n_k - 1``.
    """

    counts: Tensor
    indices: Tensor


def mask_to_lists(mask: Tensor) -> BlockLists:
    """Turn bool ``[B, H, n_q, n_k]`` into lists."""
    # A live block goes to the place that the number of live blocks before it names; the others share a place past the
    # end, which is cut off.
    counts = mask.sum(-1, dtype=torch.int32)
    place = torch.where(mask, mask.cumsum(-1) - 1, mask.shape[-1])
    blocks = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device).expand(mask.shape)
    indices = blocks.new_zeros(*mask.shape[:-1], mask.shape[-1] + 1).scatter_(-1, place, blocks)
    return BlockLists(counts, indices[..., :-1].contiguous())


def lists_to_mask(lists: BlockLists, n_k: int) -> Tensor:
    """Turn lists into bool ``[B, H, n_q, n_k]``; the inverse of :func:`mask_to_lists`."""
    counts, indices = lists
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    place = torch.where(valid, indices, n_k).long()
    mask = torch.zeros(*indices.shape[:-1], n_k + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, place, True)[..., :-1]


def predict_mask(
    q: Tensor,
    k: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    kept: reference.Kept = reference.DIAGONAL_ONLY,
) -> Tensor:
    """:func:`reference.predict_mask` with less work where no head asks for self-similarity; it may wait for the device.

    Arguments and result are those of the reference.
    """
    call: dict[str, Any] = {"causal": causal, "scale": scale, "block_q": block_q, "block_k": block_k, "kept": kept}
    if max(theta) >= 0.0:
        return reference.predict_mask(q, k, tau, theta, **call)
    mean_q, mean_k = _block_means(q, block_q), _block_means(k, block_k)
    if not (mean_q.isfinite().all() and mean_k.isfinite().all()):
        # A block with an infinite or NaN entry has no direction: it is not similar to itself.
        return reference.predict_mask(q, k, tau, theta, **call)
    sizes = (mean_q.shape[2], mean_k.shape[2], block_q, block_k)
    visible = reference.visible_blocks(*sizes, causal, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probability = reference.block_probabilities(mean_q, mean_k, visible, scale=scale)
    tau_head = reference.per_head(tau, q)
    live = reference.select_blocks(probability, tau_head) | (tau_head >= reference.KEEP_ALL)
    live = live | reference.kept_blocks(q.shape[2], block_q, block_k, kept, q.device)
    return live & visible


def _block_means(x: Tensor, block: int) -> Tensor:
    """Mean row of each block, fp32 ``[B, H, n, D]``; rows missing from the last block do not count."""
    count = x.shape[2] // block
    whole = count * block
    means: Tensor = x[:, :, :whole].unflatten(2, (count, block)).sum(3, dtype=torch.float32) / block
    if whole == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], 2)


def predict_blocks(
    q: Tensor,
    k: Tensor,
    tau: Sequence[float],
    theta: Sequence[float],
    *,
    policy: Sequence[str] | None = None,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    kept: reference.Kept = reference.DIAGONAL_ONLY,
) -> BlockLists:
    """Predict the live blocks on the device of ``q``, in fp32 whatever the inputs.

    Args:
        q: ``[B, H, N, D]``; k: ``[B, H_kv, N, D]``; any strides.
        tau, theta: one number per query head.
        policy: one name per query head (:data:`afbs_compile.kernels.policy.POLICIES`); ``None`` is ``meansim`` for all.
        causal: whether row r attends keys 0..r only.
        scale: softmax scale; ``None`` means ``D ** -0.5``.
        block_q, block_k: rows per block, powers of two; ``block_q`` is a multiple of ``block_k``.
        kept: which blocks every tau keeps, beside those on the diagonal.

    Returns:
        The lists. Engines agree up to fp32 rounding: a block whose preceding mass lies within about 1e-5 of ``tau``
        may be live on one and not on the other.
    """
    call: dict[str, Any] = {"causal": causal, "block_q": block_q, "block_k": block_k, "kept": kept}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type != "cuda":
        from afbs_compile.kernels import policy as policies  # it builds on this module

        return mask_to_lists(policies.predict_mask(q, k, tau, theta, policy, scale=scale, **call))
    if policy is None:
        from afbs_compile.kernels import predict_triton  # Triton is not installed everywhere.

        return predict_triton.predict_blocks(q, k, tau, theta, scale=scale, **call)
    from afbs_compile.kernels.policies import lists_triton

    return lists_triton.predict_blocks(q, k, tau, theta, policy, scale=scale, **call)
