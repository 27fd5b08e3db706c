"""Whole prefill, dense against sparse: ``torch.compile(model)`` and ``torch.compile(model, backend="afbs")``.

    python benchmarks/prefill.py                                    the shipped model at 512 to 8,192 tokens
    python benchmarks/prefill.py --model M --text A.txt --lengths 8192 32768 --dtype bfloat16

Both models run in turns in the same process; a length shorter than the crossover must cost nothing. Calibration is
timed from an empty cache, at the longest length, on the first call's inputs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SHIPPED_MODEL, load, save, settings, text_windows
from torch import Tensor

import afbs_compile

MIN_SECONDS, MIN_RUNS = 2.0, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a causal language model")
    parser.add_argument("--text", default="topics", help="text file; 'topics' is Python's own help")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="prefill", help="name of the result file")
    arguments = parser.parse_args()

    os.environ["AFBS_CACHE_DIR"] = tempfile.mkdtemp()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(arguments.model, device, getattr(torch, arguments.dtype))
    dense = torch.compile(model, dynamic=False)
    sparse = torch.compile(model, backend="afbs", dynamic=False)
    torch._dynamo.config.recompile_limit = 8 * len(arguments.lengths)  # each length is a graph of its own
    rows = []
    for length in sorted(arguments.lengths, reverse=True):
        calibration, unseen = text_windows(tokenizer, arguments.text, length, 2, device)
        with torch.no_grad():
            for compiled in (dense, sparse):
                compiled(calibration, logits_to_keep=1)
            dense_s, sparse_s = seconds([dense, sparse], unseen)
        row = {"tokens": length, "dense_ms": dense_s * 1e3, "sparse_ms": sparse_s * 1e3, "ratio": dense_s / sparse_s}
        print("{tokens:>6} tokens: dense {dense_ms:8.1f} ms, sparse {sparse_ms:8.1f} ms: {ratio:.2f}x".format(**row))
        rows.append(row)
    explanation = afbs_compile.explain(sparse)
    print(explanation)
    recipe = afbs_compile.Recipe.load(next(Path(os.environ["AFBS_CACHE_DIR"]).iterdir()))
    result = {
        "settings": settings(arguments),
        "calibration_seconds": sum(graph.seconds for graph in recipe.graphs),
        "mean_sparsity": recipe.sparsity,
        "prefill": rows,
        "sites": explanation.to_records(),
    }
    save(arguments.name, arguments.out, result)


def seconds(models: Sequence[Callable[..., Any]], ids: Tensor) -> list[float]:
    """Median seconds of a prefill, the models taking turns."""
    times: list[list[float]] = [[] for _ in models]
    until = time.perf_counter() + MIN_SECONDS
    while len(times[0]) < MIN_RUNS or time.perf_counter() < until:
        for model, spent in zip(models, times, strict=True):
            began = time.perf_counter()
            model(ids, logits_to_keep=1).logits[0, -1, 0].item()
            spent.append(time.perf_counter() - began)
    return [statistics.median(spent) for spent in times]


if __name__ == "__main__":
    main()
