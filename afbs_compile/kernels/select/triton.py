"""Block lists on Triton: each policy's scores, then the kernel of its rule."""

from __future__ import annotations

import torch

from afbs_compile.kernels.blocks import BlockLists
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.band import selection_refusal
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.base import Policy
from afbs_compile.kernels.policies.registry import heads_by, policy_named
from afbs_compile.kernels.select import plain
from afbs_compile.kernels.select.mass_triton import select_by_mass
from afbs_compile.kernels.select.plain import in_order
from afbs_compile.kernels.select.strength_triton import select_by_strength


def select(operands: Operands, call: SparseCall) -> BlockLists:
    """The live blocks of a call, whatever the device.

    Deterministic. It may be captured in a CUDA graph once it has run with the same constants. Heads that differ in
    policy are copied together by policy, and so are their lists.

    Args:
        operands: of the call; call: its constants. What no kernel selects by, PyTorch does.
    """
    if selection_refusal(operands, call.shape) is not None:
        return plain.select(operands, call)
    by_policy = heads_by(call.policy)
    parts = []
    for name, heads in by_policy.items():
        mine = call.taken(heads, operands.k.shape[1])
        parts.append(_select(policy_named(name), operands.taken(heads), mine))
    return BlockLists(*(in_order(list(x), list(by_policy.values())) for x in zip(*parts, strict=True)))


def _select(policy: Policy, operands: Operands, call: SparseCall) -> BlockLists:
    """The lists of heads that share a policy."""
    batch, heads = operands.q.shape[:2]
    lists = BlockLists.empty(batch, heads, operands.grid(call.shape), operands.device)
    if lists.indices.numel() == 0:
        return lists
    with_similarity = max(call.theta) >= 0.0
    similarity = policy.write_scores(operands, call.shape, lists.indices, with_similarity=with_similarity)
    if policy.rule == "mass":
        if similarity is None:
            count_q, count_k = lists.indices.shape[2:]
            blocks = batch * (heads * count_q + operands.k.shape[1] * count_k)
            similarity = torch.ones(blocks, dtype=torch.float32, device=operands.device)
        select_by_mass(lists, similarity, operands, call)
    else:
        select_by_strength(lists, operands, call, share=policy.rule == "share")
    return lists
