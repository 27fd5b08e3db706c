"""Fig. 3: memory by length: what attention takes in a prefill, measured, and what a cache holds after it, computed.

On a CPU it is measured by what Linux says of a process. A mask over a prefill frees no cache: every key is still there
for the rows to come. H2O's eviction frees it. What block-sparse attention saves against masks that are tensors is the
mask, of N x N.
"""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from common import process_bytes

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.tuner import measure
from paper_parts.head import width_for
from paper_parts.setting import Setting

NAME = "figure3"
SHORTEST = 1024
SPARSITY = 0.707
"""The paper's."""

FORMS = ("a mask of N x N", "block lists", "dense")


def run(setting: Setting) -> None:
    """Measure, print, write ``paper_figure3``."""
    config = setting.model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows: list[dict[str, int]] = []
    length = SHORTEST
    while length <= setting.arguments.longest:
        cache = 2 * config.num_hidden_layers * kv_heads * length * dim * setting.model.dtype.itemsize
        kept = width_for(length, SPARSITY)
        row = {"length": length, "cache, dense or masked": cache, "cache, H2O evicting": cache * kept // length}
        for form in FORMS:
            row[f"one call, {form}"] = in_a_process(form, (heads, kv_heads, length, dim), setting)
        rows.append(row)
        sizes = {name: f"{value / 2**20:.1f} MiB" for name, value in row.items() if name != "length"}
        print(length, sizes, flush=True)
        length *= 2
    last, before = rows[-1], rows[-2] if len(rows) > 1 else rows[-1]
    names = [name for name in last if name != "length" and min(last[name], before[name]) > 0]
    growth = {name: round(math.log2(last[name] / before[name]), 2) for name in names}
    print("growth, as a power of the length:", growth)
    setting.save(NAME, rows=rows, growth=growth)


def in_a_process(form: str, sizes: tuple[int, int, int, int], setting: Setting) -> int:
    """:func:`peak`, in a process of its own: the most that one has taken never falls."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, form, sizes, setting.device, setting.arguments.dtype).result()


@torch.no_grad()
def peak(form: str, sizes: tuple[int, int, int, int], device: str, dtype: str) -> int:
    """Bytes that one call takes at most, its operands not counted.

    Args:
        form: one of :data:`FORMS`; sizes: query heads, key heads, length, head_dim; device, dtype: of the operands.
    """
    heads, kv_heads, length, dim = sizes
    attend(form, heads, kv_heads, SHORTEST, dim, device, dtype)  # what is compiled once is not counted
    return attend(form, heads, kv_heads, length, dim, device, dtype)


def attend(form: str, heads: int, kv_heads: int, length: int, dim: int, device: str, dtype: str) -> int:
    """Run one call; the bytes by which it raised what the process takes at most."""
    counts = (heads, kv_heads, kv_heads)
    q, k, v = (torch.ones(1, n, length, dim, dtype=getattr(torch, dtype), device=device) for n in counts)
    before = _forget_the_most(device)
    if form == "a mask of N x N":
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=heads > kv_heads)
    elif form == "dense":
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads > kv_heads)
    else:
        call = SparseCall.uniform(heads, 0.5, policy="meansim", shape=BlockShape(64, 64))
        measure.run(Operands(q, k, v, mask_of("causal"), dim**-0.5), call)
    return max(0, _most(device) - before)


def _forget_the_most(device: str) -> int:
    """Begin anew to note the most that the process takes; what it takes now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
    return _most(device)


def _most(device: str) -> int:
    """Bytes: the most since the last :func:`_forget_the_most`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return process_bytes("VmHWM")
