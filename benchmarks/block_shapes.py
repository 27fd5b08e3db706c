"""Block shape against quality and speed at equal tolerance: the paper's Fig. 4, on a model's own activations.

    python benchmarks/block_shapes.py                                     the shipped model
    python benchmarks/block_shapes.py --model M --text A.txt --length 32768 --dtype bfloat16

For every head and every block shape ``tau`` is raised until the head's relative L1 error is within the tolerance
(theta and lambda off); a head that never gets there is DENSE. Small blocks follow the attention more closely and skip
more; large blocks keep the matrix units busy. Writes JSON, CSV and, where matplotlib is installed, a PNG.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, SHIPPED_MODEL, empty_figure, load, save, settings, text_windows
from timing import times
from torch import Tensor

from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.operands import Operands

BISECTIONS = 8


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a causal language model")
    parser.add_argument("--text", default="topics", help="text file; 'topics' is Python's own help")
    parser.add_argument("--length", type=int, default=16384 if gpu else 4096)
    parser.add_argument("--tolerance", type=float, default=0.055, help="largest relative L1 error of a head")
    parser.add_argument("--blocks", nargs="+", default=["32x32", "64x64", "128x64", "128x128"], metavar="QxK")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default=f"block_shapes_{'gpu' if gpu else 'cpu'}", help="name of the result files")
    arguments = parser.parse_args()

    device = "cuda" if gpu else "cpu"
    model, tokenizer = load(arguments.model, device, getattr(torch, arguments.dtype))
    (ids,) = text_windows(tokenizer, arguments.text, arguments.length, 1, device)
    with torch.no_grad():
        layers = captured(model, ids)
        rows = [measure(layers, _blocks(name), arguments.tolerance) for name in arguments.blocks]
    save(arguments.name, arguments.out, {"settings": settings(arguments), "shapes": rows})
    with (arguments.out / f"{arguments.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, arguments.out / f"{arguments.name}.png")


def _blocks(name: str) -> BlockShape:
    return BlockShape(*map(int, name.split("x")))


def captured(model: Any, ids: Tensor) -> list[Operands]:
    """The operands of every attention call of one forward pass, all of them causal."""
    plain, calls = F.scaled_dot_product_attention, []

    def record(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(Operands(q, k, v, Causal(), q.shape[-1] ** -0.5))
        return plain(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = record
    try:
        model(ids, logits_to_keep=1)
    finally:
        F.scaled_dot_product_attention = plain
    return calls


def measure(layers: list[Operands], shape: BlockShape, tolerance: float) -> dict[str, Any]:
    """Sparsity, error and time of all attention calls of the model with one block shape."""
    sparsities, errors, dense_ms, sparse_ms = [], [], 0.0, 0.0
    for layer in layers:
        heads, dense = layer.heads, dense_attention(layer)
        low, high = torch.zeros(heads).double(), torch.ones(heads).double()
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fits = _error(_sparse(layer, middle, shape)[0], dense) <= tolerance
            low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
        tau = torch.where(high < 1, high, KEEP_ALL)
        out, counts = _sparse(layer, tau, shape)
        valid = int(layer.mask.visibility(layer.grid(shape), torch.device("cpu")).visible.sum())
        sparsities.append(1 - counts[0].sum(-1).double().cpu() / valid)
        errors.append(_error(out, dense))
        measured = times(_calls(layer, tau, shape), rounds=5)
        dense_ms += measured["dense"].median
        sparse_ms += measured["sparse"].median
    error = torch.cat(errors)
    row = {
        "blocks": str(shape),
        "sparsity": float(torch.cat(sparsities).mean()),
        "mean_error": float(error.mean()),
        "worst_error": float(error.max()),
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
        "ratio": dense_ms / sparse_ms,
    }
    print(
        "{blocks:8} sparsity {sparsity:.1%}, error mean {mean_error:.4f} worst {worst_error:.4f}, attention "
        "{sparse_ms:.2f} ms against {dense_ms:.2f} ms dense: {ratio:.2f}x".format(**row),
        flush=True,
    )
    return row


def _sparse(layer: Operands, tau: Tensor, shape: BlockShape) -> tuple[Tensor, Tensor]:
    return run(layer, SparseCall.uniform(layer.heads, 0.0, shape=shape).with_tau(tau))


def _calls(layer: Operands, tau: Tensor, shape: BlockShape) -> dict[str, Any]:
    return {"dense": lambda: dense_attention(layer), "sparse": lambda: _sparse(layer, tau, shape)}


def _error(out: Tensor, dense: Tensor) -> Tensor:
    """Relative L1 of each head (Eq. 1)."""
    difference = (out.double() - dense.double()).abs().sum((0, 2, 3))
    return (difference / dense.double().abs().sum((0, 2, 3))).cpu()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Sparsity and speed over block shape."""
    figure = empty_figure((6, 3.5))
    if figure is None:
        return
    left = figure.subplots()
    names = [row["blocks"] for row in rows]
    left.bar(names, [100 * row["sparsity"] for row in rows], color="tab:blue", alpha=0.5)
    left.set_xlabel("block shape (queries x keys)")
    left.set_ylabel("sparsity at equal tolerance, %")
    right = left.twinx()
    right.plot(names, [row["ratio"] for row in rows], color="tab:red", marker="o")
    right.set_ylabel("times dense attention")
    right.set_ylim(0, 1.15 * max(row["ratio"] for row in rows))
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
