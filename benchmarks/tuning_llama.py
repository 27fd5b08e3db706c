"""What calibration costs in the shape of Llama-2-7B: 32 heads of dimension 128, 32,768 tokens, causal.

    python benchmarks/tuning_llama.py --model M --calibrate A.txt --dtype bfloat16

Per layer, Q, K and V of 32 heads of dimension 128 at 32,768 tokens are made from what the model captures
(of heads h, dimension d, on windows of 32,768 tokens): head i is captured head ``i mod h``, each row mapped by a random
matrix ``[d, 128]`` with orthonormal rows (the same one for Q and K, so that scores are kept; another one for V) that
differs for each i, and scaled so that the softmax sees the same logits. Several inputs are several windows.

``seconds`` is wall-clock time, ``gpu_seconds`` what the device works in a second sweep over the layers, under PyTorch's
profiler; the first sweep is preceded by a layer that compiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SHIPPED_MODEL, load, sample_runs, save, settings, text_windows
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tuning import now

from afbs_compile.kernels.operands import Operands
from afbs_compile.passes.capture import capture
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.site import tune_site
from afbs_compile.tuner.speed import Stopwatch

LLAMA_HEADS, LLAMA_DIM, LLAMA_LENGTH = 32, 128, 32768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a causal language model")
    parser.add_argument("--calibrate", default="topics", help="text file to calibrate on")
    parser.add_argument("--inputs", type=int, default=5, help="windows to calibrate on")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 32])
    parser.add_argument("--tolerance", type=float, default=0.055)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="tuning_llama", help="name of the result file")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(arguments.model, device, getattr(torch, arguments.dtype))
    windows = text_windows(tokenizer, arguments.calibrate, LLAMA_LENGTH, arguments.inputs, device)
    rows = llama(model, windows, arguments.layers, arguments.tolerance)
    save(arguments.name, arguments.out, {"settings": settings(arguments), "rows": rows})


def llama(model: Any, windows: Sequence[Tensor], layers: Sequence[int], tolerance: float) -> list[dict[str, Any]]:
    """Cost of the default search on operands of Llama-2-7B's shape."""
    with closing(capture(sample_runs(model.model, windows))) as walk:
        captured = [[replace(o, q=o.q.cpu(), k=o.k.cpu(), v=o.v.cpu()) for o in operands] for _, operands in walk]
    rows = []
    for name, split in {
        "one input, 5 windows of it": lambda operands: operands[:1],
        f"{len(windows)} inputs": lambda operands: operands,
    }.items():
        tuning = TuneSettings(tolerance=tolerance)
        make = partial(_layer, [split(operands) for operands in captured])
        tune_site(make(-1), tuning, stopwatch=Stopwatch())  # compiles
        stopwatch, spent = Stopwatch(), []
        sparsity, evaluations, peak = [], [], 0.0
        for number in range(max(layers)):
            operands = make(number)
            held = now() and _reset_peak(windows[0].device)
            began = now()
            result = tune_site(operands, tuning, stopwatch=stopwatch)
            spent.append(now() - began)
            sparsity.append(float(result.measured.sparsity.mean()))
            evaluations.append(result.evaluations)
            peak = max(peak, _peak(windows[0].device) - held)
            del operands, result
        stopwatch = Stopwatch()
        busy = [
            gpu_seconds(partial(tune_site, make(number), tuning, stopwatch=stopwatch)) for number in range(max(layers))
        ]
        one = 4 * LLAMA_HEADS * LLAMA_DIM * LLAMA_LENGTH * 2  # Q, K, V, O of one input in half precision
        for count in layers:
            row = {
                "inputs": name,
                "layers": count,
                "seconds": sum(spent[:count]),
                "gpu_seconds": sum(busy[:count]),
                "mean_sparsity": sum(sparsity[:count]) / count,
                "dense_equivalents_per_site": sum(evaluations[:count]) / count,
                "peak_beyond_operands_in_qkvo_of_one_input": peak / one,
                "peak_in_qkvo_of_all_inputs": (peak + held) / (one * len(split(list(windows)))),
            }
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            rows.append(row | {"seconds_by_layer": spent[:count], "gpu_seconds_by_layer": busy[:count]})
    return rows


def _layer(captured: Sequence[Sequence[Operands]], number: int) -> list[Operands]:
    return [enlarged(operands, number) for operands in captured[number % len(captured)]]


def gpu_seconds(call: Callable[[], object]) -> float:
    """What the kernels and copies of a call take, one after the other on the device; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.time_range.elapsed_us() for event in seen.events() if event.device_type == DeviceType.CUDA) / 1e6


def enlarged(operands: Operands, seed: int) -> Operands:
    """Operands of 32 heads of dimension 128 with the structure of captured ones; the module's docstring says how."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed % 1000)

    def mapped(x: Tensor, maps: Tensor, size: float) -> Tensor:
        x = x.to(device)
        heads = torch.arange(LLAMA_HEADS) % x.shape[1]
        return (x[:, heads.to(device)].float() @ maps.to(device) * size).to(x.dtype)

    dim = operands.q.shape[-1]
    same, other = (
        torch.linalg.qr(torch.randn(LLAMA_HEADS, LLAMA_DIM, dim, generator=generator)).Q.mT for _ in range(2)
    )
    k, v = (x.repeat_interleave(operands.groups, 1) for x in (operands.k, operands.v))
    size = (operands.scale * LLAMA_DIM**0.5) ** 0.5
    return Operands(
        mapped(operands.q, same, size), mapped(k, same, size), mapped(v, other, 1.0), operands.mask, LLAMA_DIM**-0.5
    )


def _reset_peak(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated())


def _peak(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0.0


if __name__ == "__main__":
    main()
