"""Calibrate, write one ONNX file, and run it with onnxruntime alone, in a process that knows nothing of us or PyTorch.

    pip install 'afbs-compile[export,hf]'
    python examples/export_onnx.py

The model and the text come with the repository or with Python. Takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quickstart import MODEL, read_topics, windows
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import afbs_compile
from afbs_compile.export import to_onnx

CALIBRATION_LENGTH = 2048
SIZES = ((1, 512), (2, 512), (1, 1024), (2, 1024), (1, 2048), (2, 2048))
"""Batches and lengths that the one file is run at."""

RUN_ALONE = """
import sys, time
import numpy, onnxruntime
model, given, out = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
results, seconds = {}, []
for name, ids in numpy.load(given).items():
    session.run(None, {"input_ids": ids})
    began = time.perf_counter()
    results[name], = session.run(None, {"input_ids": ids})
    seconds.append(time.perf_counter() - began)
numpy.savez(out, seconds=seconds, **results)
assert not {"torch", "onnx", "afbs_compile"} & set(sys.modules)
"""

console = Console(highlight=False, width=max(100, Console().width))


def main() -> None:
    """Calibrate, export, compare, and print what came out."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokens = read_topics(AutoTokenizer.from_pretrained(MODEL))
    calibration, *unseen = windows(tokens, CALIBRATION_LENGTH, 3)
    console.print(f"calibrating on {CALIBRATION_LENGTH:,} tokens ...")
    recipe = sparse_everywhere(afbs_compile.calibrate(model, [{"input_ids": calibration}]))
    with tempfile.TemporaryDirectory() as folder:
        written, rows = export_and_compare(model, recipe, torch.cat(unseen), SIZES, Path(folder))
    for row in written.rows:
        console.print(f"  {row.name}: {row.outcome}" + (f" ({row.reason})" if row.reason else ""))
    console.print(f"one file for every size: {dict(written.inputs)}")
    table = Table("batch", "tokens", "difference from PyTorch", "same next token", "dense ms", "sparse ms")
    for batch, length, difference, agreement, dense_ms, sparse_ms in rows:
        table.add_row(
            str(batch), f"{length:,}", f"{difference:.1e}", f"{agreement:.1%}", f"{dense_ms:.0f}", f"{sparse_ms:.0f}"
        )
    console.print(table)
    console.print("difference: largest difference of a logit over the largest logit; ms: onnxruntime, one run each")


def export_and_compare(
    model: Any, recipe: afbs_compile.Recipe, ids: Tensor, sizes: Sequence[tuple[int, int]], folder: Path
) -> tuple[Any, list[tuple[int, int, float, float, float, float]]]:
    """Write the sparse and the dense file, run both alone, and compare the sparse one with the compiled model.

    Args:
        model: a language model; recipe: made for it.
        ids: token ids, at least as large as the largest of the sizes.
        sizes: (batch, length) to run; folder: for the files.

    Returns:
        What the export wrote, and for each size: batch, length, largest difference over the largest logit, share of
        positions with the same most probable token, milliseconds of the dense file and of the sparse one.
    """
    example = {"input_ids": ids[:1, : min(length for _, length in sizes)]}
    written = to_onnx(model, recipe, example, folder / "sparse.onnx", dynamic=True)
    to_onnx(model, left_alone(recipe), example, folder / "dense.onnx", dynamic=True)
    inputs = {f"{batch}x{length}": ids[:batch, :length] for batch, length in sizes}
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    dense, sparse = (run_alone(folder, name) for name in ("dense.onnx", "sparse.onnx"))
    compiled = torch.compile(model, backend="afbs", options={"recipe": recipe, "min_length": 1}, dynamic=False)
    rows = []
    for place, ((batch, length), (name, value)) in enumerate(zip(sizes, inputs.items(), strict=True)):
        with torch.no_grad():
            expected = compiled(value).logits
        found = torch.from_numpy(sparse[name])
        difference = float((found - expected).abs().max() / expected.abs().max())
        agreement = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
        milliseconds = (1000 * float(run["seconds"][place]) for run in (dense, sparse))
        rows.append((batch, length, difference, agreement, *milliseconds))
    return written, rows


def sparse_everywhere(recipe: afbs_compile.Recipe) -> afbs_compile.Recipe:
    """The recipe with every calibrated call sparse at every length.

    A recipe leaves a call dense, or dense below some length, where the kernel of this package did not pay on the
    machine that calibrated. onnxruntime is another engine; the thresholds are the same.
    """

    def everywhere(site: Any) -> Any:
        return replace(site, outcome="sparse", reason=None, call=replace(site.call, min_length=1))

    return with_sites(recipe, everywhere)


def left_alone(recipe: afbs_compile.Recipe) -> afbs_compile.Recipe:
    """The recipe with every call dense: its file is the model as it was."""
    return with_sites(recipe, lambda site: replace(site, outcome="dense", reason="for comparison"))


def with_sites(recipe: afbs_compile.Recipe, change: Callable[[Any], Any]) -> afbs_compile.Recipe:
    """The recipe with its calibrated calls changed."""
    graphs = [
        replace(graph, sites=tuple(change(site) if site.heads else site for site in graph.sites))
        for graph in recipe.graphs
    ]
    return replace(recipe, graphs=tuple(graphs))


def run_alone(folder: Path, name: str) -> dict[str, Any]:
    """Run a file on the inputs in the folder, in a process with onnxruntime and numpy only."""
    out = folder / f"{name}.npz"
    command = [sys.executable, "-c", RUN_ALONE, str(folder / name), str(folder / "inputs.npz"), str(out)]
    subprocess.run(command, check=True)
    return dict(np.load(out))


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    console.print(f"all of this took {time.perf_counter() - began:.0f} s")
