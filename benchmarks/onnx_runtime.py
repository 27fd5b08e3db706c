"""The same ONNX files by onnxruntime: the sparse one against the dense one, and both against PyTorch.

    python benchmarks/onnx_runtime.py --folder files write --recipe model.recipe.json   # once, where this package is
    python benchmarks/onnx_runtime.py --folder files run --provider cpu --out benchmarks/results

``write`` exports the shipped model twice, by a recipe and with every call dense, and keeps what PyTorch computes of the
inputs with both. ``run`` needs onnxruntime and numpy alone: for ``cuda`` the wheel ``onnxruntime-gpu``. Times are
medians, with the smallest and the largest; a provider that leaves nodes to the CPU copies between the two, which is
part of its time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
LENGTHS = (512, 1024, 2048, 4096)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def main() -> None:
    """Write the files, or run them and print a line of JSON for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("--recipe", type=Path, required=True, help="of afbs-compile calibrate examples/model-7m")
    running = commands.add_parser("run")
    running.add_argument("--provider", choices=tuple(PROVIDERS), default="cpu")
    running.add_argument("--runs", type=int, default=5)
    running.add_argument("--out", type=Path, required=True, help="folder of the result file")
    given = parser.parse_args()
    if given.command == "write":
        write(given.folder, given.recipe)
    else:
        rows = run(given.folder, PROVIDERS[given.provider], given.runs)
        about = json.loads((given.folder / "about.json").read_text())
        result = {**about, "provider": PROVIDERS[given.provider], "rows": rows}
        (given.out / f"onnx_runtime_7m_{given.provider}.json").write_text(json.dumps(result, indent=1) + "\n")


def write(folder: Path, recipe_file: Path) -> None:
    """Both files, the inputs, and what PyTorch computes of them."""
    import torch
    from common import environment
    from transformers import AutoModelForCausalLM

    import afbs_compile
    from afbs_compile.export import to_onnx

    sys.path.insert(0, str(ROOT / "examples"))
    from export_onnx import left_alone, sparse_everywhere

    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "model-7m", dtype=torch.float32).eval()
    recipe = sparse_everywhere(afbs_compile.Recipe.load(recipe_file))
    ids = torch.randint(3, 8192, (1, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    folder.mkdir(exist_ok=True)
    arrays = {}
    for name, used in (("sparse", recipe), ("dense", left_alone(recipe))):
        to_onnx(model, used, {"input_ids": ids[:, : LENGTHS[0]]}, folder / f"{name}.onnx", dynamic=True)
        compiled = torch.compile(model, backend="afbs", options={"recipe": used, "min_length": 1}, dynamic=False)
        for length in LENGTHS:
            with torch.no_grad():
                arrays[f"{name}_{length}"] = compiled(ids[:, :length]).logits[:, -1].numpy()
    np.savez(folder / "expected.npz", ids=ids.numpy(), **arrays)
    (folder / "about.json").write_text(json.dumps({**environment(), "sparsity": round(recipe.sparsity, 3)}))


def run(folder: Path, provider: str, runs: int) -> list[dict[str, Any]]:
    """Times of both files in turns, and how far the last logits are from PyTorch's, by length."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise SystemExit(f"--provider: {provider} is not in this onnxruntime; it has the CUDA one as onnxruntime-gpu")
    providers = list(dict.fromkeys((provider, PROVIDERS["cpu"])))
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=providers) for name in ("dense", "sparse")
    }
    rows = []
    expected = np.load(folder / "expected.npz")
    for length in LENGTHS:
        feed = {"input_ids": expected["ids"][:, :length]}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        off = {}
        for name, session in sessions.items():
            (logits,) = session.run(None, feed)
            right = expected[f"{name}_{length}"]
            off[name] = float(np.abs(logits[:, -1] - right).max() / np.abs(right).max())
        for _ in range(runs):
            for name, session in sessions.items():
                began = time.perf_counter()
                session.run(None, feed)
                times[name].append(1000 * (time.perf_counter() - began))
        row: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "length": length}
        for name, values in times.items():
            row[f"{name}_ms"] = [round(x, 2) for x in (statistics.median(values), min(values), max(values))]
        row |= {"ratio": round(row["dense_ms"][0] / row["sparse_ms"][0], 3), "off_from_pytorch": off}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
