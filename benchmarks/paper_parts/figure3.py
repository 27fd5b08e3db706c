"""Fig. 3: memory by length, measured: what a prefill allocates for its attention, and what a cache holds after it.

A mask over a prefill frees no cache: every key is still there for the rows to come. H2O's eviction frees it. What
block-sparse attention saves against masks that are tensors is the mask, of N x N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import save
from torch.utils._python_dispatch import TorchDispatchMode

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.tuner import measure
from paper_parts.head import width_for
from paper_parts.setting import Setting

NAME = "figure3"
SPARSITY = 0.707


class _Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def run(setting: Setting) -> None:
    """Measure, print, write ``paper_figure3``."""
    config = setting.model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = setting.model.dtype
    rows: list[dict[str, int]] = []
    length = 1024
    while length <= setting.arguments.longest:
        q, k, v = (
            torch.randn(1, n, length, dim, dtype=dtype, device=setting.device) for n in (heads, kv_heads, kv_heads)
        )
        operands = Operands(q, k, v, mask_of("causal"), dim**-0.5)
        call = SparseCall.uniform(heads, 0.5, policy="sink_window", shape=BlockShape(64, 64))
        forms: dict[str, Callable[[], Any]] = {
            "a mask of N x N": partial(_by_mask, q, k, v),
            "block lists": partial(measure.run, operands, call),
        }
        cache = 2 * config.num_hidden_layers * kv_heads * length * dim * q.element_size()
        kept = width_for(length, SPARSITY)
        row = {
            "length": length,
            "cache, dense or masked": cache,
            "cache, H2O evicting": cache * kept // length,
        }
        for name, form in forms.items():
            form()  # what is compiled once is not counted
            with _Allocations() as seen:
                form()
            row[f"largest tensor, {name}"] = seen.largest
        rows.append(row)
        sizes = {name: f"{value / 2**20:.1f} MiB" for name, value in row.items() if name != "length"}
        print(length, sizes, flush=True)
        length *= 2
    last, before = rows[-1], rows[-2]
    exponents = {name: round(math.log2(last[name] / before[name]), 2) for name in last if name != "length"}
    print("growth, as a power of the length:", exponents)
    result = {"settings": setting.describe(), "rows": rows, "exponents": exponents}
    save(f"paper_figure3_{setting.arguments.name}", setting.arguments.out, result)


def _by_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] > k.shape[1])
