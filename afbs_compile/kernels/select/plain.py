"""Block lists in PyTorch, for devices without Triton: :func:`spec.selection.live_blocks` with less work."""

from __future__ import annotations

import torch
from torch import Tensor

from afbs_compile.kernels.blocks import BlockLists, lists_of, shared
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands, taken
from afbs_compile.kernels.policies.base import Policy
from afbs_compile.kernels.policies.registry import heads_by, policy_named
from afbs_compile.kernels.policies.rules import levels, select_by_mass, softmax
from afbs_compile.kernels.sight import resolved, sight_of
from afbs_compile.kernels.spec.selection import kept_blocks, live_blocks, per_head


def select(operands: Operands, call: SparseCall) -> BlockLists:
    """The live blocks of a call; it may wait for the device.

    Args:
        operands: of the call; call: its constants.

    Returns:
        The lists. Engines agree up to fp32 rounding: a block whose preceding mass lies within about 1e-5 of ``tau``
        may be live on one and not on the other.
    """
    operands = resolved(operands, call.shape)
    sight = sight_of(operands, call.shape)
    always = kept_blocks(operands, call.shape, call.kept)
    by_policy = heads_by(call.policy)
    parts = []
    for name, heads in by_policy.items():
        mine = call.taken(heads, operands.k.shape[1])
        places = tuple(x if x.shape[1] == 1 else taken(x, heads) for x in (sight.visible, always, sight.blurred))
        parts.append(_live(policy_named(name), operands.taken(heads), mine, *places))
    live = in_order(parts, list(by_policy.values()))
    return lists_of(shared(live, call.shape.heads) & sight.visible, sight.whole)


def in_order(parts: list[Tensor], heads: list[list[int]]) -> Tensor:
    """Put results of some heads each, ``[B, heads, ...]``, back into the order of the heads."""
    if len(parts) == 1:
        return parts[0]
    order = {head: place for place, head in enumerate(head for mine in heads for head in mine)}
    return taken(torch.cat(parts, 1), [order[head] for head in range(len(order))])


def _live(
    policy: Policy, operands: Operands, call: SparseCall, visible: Tensor, always: Tensor, blurred: Tensor
) -> Tensor:
    """Live blocks of heads that share a policy."""
    scores = policy.scores(operands, call.shape)
    # A block with an infinite or NaN entry, which reaches its scores, is not similar to itself.
    if policy.has_theta and (max(call.theta) >= 0.0 or not bool(scores.isfinite().all())):
        operands.derived["is resolved"] = True  # with the other heads, which may see other keys
        return live_blocks(operands, call)
    tau = per_head(call.tau, operands.device)
    if policy.rule == "mass":
        chosen = select_by_mass(softmax(scores, visible & ~blurred), tau) | (tau >= 1.0)
    else:
        chosen = levels(scores, policy.rule, visible & ~blurred) < tau.clamp_max(1.0)
    return (chosen | always) & visible
