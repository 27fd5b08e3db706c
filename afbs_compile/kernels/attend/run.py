"""Run a sparse call: choose its blocks and attend, some heads at a time, each head in its precision."""

from __future__ import annotations

import torch
from torch import Tensor

from afbs_compile.kernels.attend.engines import engine_of, engines_on, parts_of
from afbs_compile.kernels.attend.machine import without_autocast
from afbs_compile.kernels.blocks import BlockLists
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands, empty_output, taken


def run(operands: Operands, call: SparseCall) -> tuple[Tensor, Tensor]:
    """Block-sparse attention, whatever the length and the constants, and how much it computed.

    Args:
        operands: of the call; call: constants that fit them.

    Returns:
        The output ``[B, H, q_len, D]``, which lies in memory as ``[B, q_len, H, D]``, and the number of live key
        blocks of each query block, int32 ``[B, H, n_q]``.

    Raises:
        ValueError: no engine takes the call; it says why.
    """
    given, operands = operands, operands.padded
    out, counts = empty_output(operands.q, operands.v), []
    if out.numel() == 0 or operands.k.numel() == 0:
        none = out.new_zeros(*out.shape[:2], operands.grid(call.shape).count_q, dtype=torch.int32)
        return empty_output(given.q, given.v).zero_(), none
    with without_autocast(operands.device):
        step = engines_on(operands.device)[0].heads_at_once(operands, call)
        for first in range(0, operands.heads, step):
            last = min(first + step, operands.heads)
            part, mine = operands, call
            if step < operands.heads:
                part = operands.grouped(first, last)
                mine = call.grouped(first, last, operands.k.shape[1])
            counts.append(_attend(part, mine, out[:, first:last] if step < operands.heads else out))
    if given is not operands:
        out = empty_output(given.q, given.v).copy_(out[..., : given.v.shape[3]])
    return out, counts[0] if len(counts) == 1 else torch.cat(counts, 1)


def _attend(operands: Operands, call: SparseCall, out: Tensor) -> Tensor:
    """All heads at once; the number of live blocks.

    Where heads of several precisions occur, the operands of either are copied beside each other, a key head for each
    query head.
    """
    # Refused before anything is computed.
    parts = [(heads, part, engine_of(operands, part)[0]) for heads, part in parts_of(operands, call)]
    lists = parts[0][2].select(operands, call)
    for heads, part, engine in parts:
        if len(heads) == operands.heads:
            engine.attend(operands, part, lists, out)
            continue
        mine = operands.taken(heads)
        result = torch.empty_like(mine.q)
        engine.attend(mine, part, BlockLists(*(taken(x, heads) for x in lists)), result)
        for place, head in enumerate(heads):
            out[:, head].copy_(result[:, place])
    return lists.counts
