"""Masked calls against PyTorch's attention with the same mask, and against our own unmasked speed, per live block.

    python benchmarks/masks.py                 on a GPU: 32 heads of 128, bf16, 32,768 keys, 70 % of the blocks dead
    python benchmarks/masks.py --quick         an eighth of the length

Predictor included. Thresholds of each head are found by bisection on the sparsity that the predictor gives on that very
call. "Per live block" is the attention alone over its lists, divided by the number of live blocks, against the causal
call without a mask: 1.00 is as fast. All calls of a row take turns in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save, settings
from kernel_cases import BISECTIONS, Case
from kernel_cases import operands as structured
from timing import times
from torch import Tensor

from afbs_compile.kernels.attend.engines import engine_of, engines_on, kernel_of
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands, empty_output
from afbs_compile.tuner.measure import visible_count

SHAPE = BlockShape(128, 128)
DEAD = 0.7


@dataclass(frozen=True)
class Row:
    """One line of the table: what is asked of its times dense attention, and of its speed per live block."""

    name: str
    operands: Operands
    at_least: float | None
    per_block: float | None


def rows(length: int, device: str) -> list[Row]:
    """The calls, all of the same numbers."""
    plain = structured(Case("masks", length, "causal", DEAD), device)
    places = torch.arange(length, device=device)
    q, k, v = (torch.cat([x, x.flip(1)]) for x in (plain.q, plain.k, plain.v))
    pair = replace(plain, q=q, k=k, v=v)
    padded = replace(pair, valid=torch.stack([places >= 0, places >= length // 4]))
    causal = (places[:, None] >= places)[None, None]
    chunk = replace(plain, q=plain.q[:, :, -length // 4 :], mask=mask_of("causal_end"))
    return [
        Row("causal", plain, None, None),
        Row("causal, batch of 2", pair, None, None),
        Row("left-padded batch of 2", padded, 3.0, 0.97),
        Row("window of a quarter", replace(plain, mask=mask_of(f"window({length // 4})")), None, 0.95),
        Row("chunk of a quarter behind the rest", chunk, 2.8, None),
        Row("dense bool mask (causal)", replace(plain, mask=mask_of("full"), attn_mask=causal), 2.0, None),
    ]


def steered(operands: Operands) -> tuple[SparseCall, BlockLists]:
    """The call in which every head skips the wanted share of what it sees, and its lists."""
    heads = operands.heads
    engine = engines_on(operands.device)[0]
    visible = visible_count(operands, SHAPE)
    low, high = torch.zeros(heads), torch.ones(heads)
    call = SparseCall.uniform(heads, 0.5, shape=SHAPE)
    for _ in range(BISECTIONS):
        call = call.with_tau((low + high) / 2)
        dead = 1 - engine.select(operands, call).counts.float().mean(0).sum(-1).cpu() / visible
        low = torch.where(dead > DEAD, (low + high) / 2, low)  # a larger tau keeps more
        high = torch.where(dead > DEAD, high, (low + high) / 2)
    return call, engine.select(operands, call)


def attention(operands: Operands, call: SparseCall, lists: BlockLists) -> Callable[[], Tensor]:
    """The attention alone."""
    engine = engine_of(operands, call)[0]

    def attend() -> Tensor:
        out = empty_output(operands.q, operands.v)
        engine.attend(operands, call, lists, out)
        return out

    return attend


def measured(row: Row, rounds: int, unmasked: tuple[Callable[[], Tensor], float]) -> dict[str, Any]:
    """Times of one row, beside the unmasked call's attention, in turns; ``unmasked`` has its live blocks as well."""
    operands = row.operands
    call, lists = steered(operands)
    live, (plain, plain_live) = float(lists.counts.sum()), unmasked
    exact = dense_attention(operands).float()
    error = (run(operands, call)[0].float() - exact).abs().sum() / exact.abs().sum()
    del exact

    def sparse() -> Tensor:
        # As in a model: nothing that an earlier call found out about the mask is there.
        return run(replace(operands), call)[0]

    found = times(
        {
            "dense": lambda: dense_attention(operands),
            "sparse": sparse,
            "attention": attention(operands, call, lists),
            "unmasked": plain,
        },
        rounds,
    )
    per_block = (found["unmasked"].median / plain_live) / (found["attention"].median / live)
    return {
        "name": row.name,
        "kernel": kernel_of(operands, call).name,
        "dead": 1 - live / (visible_count(operands, SHAPE) * lists.counts[..., 0].numel()),
        "error": float(error),
        "dense_ms": found["dense"].median,
        "sparse_ms": found["sparse"].median,
        "attention_ms": found["attention"].median,
        "ratio": found["dense"].median / found["sparse"].median,
        "range": [found["dense"].low / found["sparse"].high, found["dense"].high / found["sparse"].low],
        "asked": row.at_least,
        "per_live_block": per_block,
        "per_live_block_asked": row.per_block,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768, help="keys")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each call")
    parser.add_argument("--quick", action="store_true", help="an eighth of the length")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="masks_gpu", help="name of the result file")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = rows(arguments.length // (8 if arguments.quick else 1), device)
    call, lists = steered(lines[0].operands)
    unmasked = attention(lines[0].operands, call, lists), float(lists.counts.sum())
    table = []
    for row in lines:
        table.append(measured(row, arguments.rounds, unmasked))
        print(
            "{name:36} {kernel:28} {dead:.1%} dead, error {error:.3f}, dense {dense_ms:8.3f} ms, sparse "
            "{sparse_ms:8.3f} ms: {ratio:.2f}x (asked {asked}), per live block {per_live_block:.3f} (asked "
            "{per_live_block_asked})".format(**table[-1]),
            flush=True,
        )
        save(arguments.name, arguments.out, {"settings": settings(arguments), "masks": table})


if __name__ == "__main__":
    main()
