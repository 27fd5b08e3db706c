"""Time to the first token and per further token of ``generate``: ``attn_implementation="afbs"`` against SDPA.

    python benchmarks/generate.py            the shipped model on the CPU, 4,096 and 8,192 tokens
    python benchmarks/generate.py --model M --text books.txt --device cuda --dtype bfloat16 --lengths 16384 32768

SDPA stands twice: as transformers calls it, and without a mask and with is_causal, which is the fastest that it can
be called ("plain"). With --compiled the prefill is compiled as well, dense by inductor and sparse by the backend;
decode steps are not, in any way. The ways take turns; a line says the median and the range. With thresholds that leave
every head dense the tokens must be those of "sdpa". The recipe is calibrated on other windows than the prompts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SHIPPED_MODEL, load, save, settings, text_windows
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import afbs_compile
import afbs_compile.integrations.transformers as afbs
from afbs_compile import Recipe
from afbs_compile.generation import take_part_in_generation
from afbs_compile.integrations.served import served_model

WAYS = ("plain", "sdpa", "afbs")


class Clock(BaseStreamer):
    """When each token came; a token on the host is one that the device is done with."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """A token came."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def inductor(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
    """The backend of the compiled dense way: ``generate`` compiles with it what it does with ours."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs)


def generated(model: Any, way: str, ids: torch.Tensor, new: int) -> tuple[float, float, list[int]]:
    """Seconds to the first token, median seconds of a further one, and the tokens."""
    attention = {"plain, compiled": "plain", "afbs, compiled": "sdpa"}.get(way, way)
    getattr(model, "_orig_mod", model).set_attn_implementation(attention)
    clock, began = Clock(), time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            streamer=clock,
        )
    first, *further = clock.times[1:]  # the prompt itself is put first
    steps = [b - a for a, b in zip([first, *further], further, strict=False)]
    return first - began, statistics.median(steps), out[0, ids.shape[1] :].tolist()


def dense(recipe: Recipe) -> Recipe:
    """The recipe with every head dense."""
    graphs = []
    for graph in recipe.graphs:
        sites = [
            site if site.call is None else replace(site, call=replace(site.call, tau=(1.0,) * site.call.heads))
            for site in graph.sites
        ]
        graphs.append(replace(graph, sites=tuple(sites)))
    return replace(recipe, graphs=tuple(graphs))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def at_length(model: Any, windows: list[torch.Tensor], new: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """What a length gives: a recipe, then the ways in turns."""
    *samples, prompt = windows
    model.set_attn_implementation("sdpa")
    began = time.perf_counter()
    recipe = afbs_compile.calibrate(model, [{"input_ids": sample} for sample in samples])
    seconds = time.perf_counter() - began
    afbs.use(model, recipe=dense(recipe))
    same = generated(model, "afbs", prompt, new)[2] == generated(model, "sdpa", prompt, new)[2]
    afbs.use(model, recipe=recipe)
    models = dict.fromkeys(WAYS, model)
    if compiled:
        torch._dynamo.reset()
        models["plain, compiled"] = torch.compile(model, backend=inductor, dynamic=False)
        models["afbs, compiled"] = torch.compile(model, backend="afbs", options={"recipe": recipe}, dynamic=False)
    for way, each in models.items():
        generated(each, way, prompt, 4)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in models}
    tokens = {}
    for _ in range(rounds):
        for way, each in models.items():
            first, step, tokens[way] = generated(each, way, prompt, new)
            times[way].append((first, step))
    rows = served_model(model).rows
    result: dict[str, Any] = {
        "calibration s": seconds,
        "calls sparse": f"{sum(row.outcome == 'sparse' for row in rows)} of {len(rows)}",
        "sparsity": recipe.sparsity,
        "all calls alone, ms": {
            "dense": sum(r.dense_ms or 0 for r in rows),
            "sparse": sum(r.sparse_ms or 0 for r in rows),
        },
        "tokens of a dense recipe are those of sdpa": same,
        "tokens as sdpa before the first other": _common(tokens["afbs"], tokens["sdpa"]),
    }
    for way in models:
        result[way] = {"first s": spread([f for f, _ in times[way]]), "step s": spread([s for _, s in times[way]])}
    for name in ("first s", "step s"):
        for mine, others in (("afbs", WAYS[:2]), ("afbs, compiled", (*WAYS[:2], "plain, compiled"))):
            if mine in models:
                median = result[mine][name]["median"]
                result[f"x {name} of {mine}"] = {way: result[way][name]["median"] / median for way in others}
    return result


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--text", default="topics", help="text file, or Python's help topics")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--samples", type=int, default=2, help="windows to calibrate on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="compile the prefill, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--name", default="generate_7m_cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    AttentionInterface.register("plain", sdpa_attention_forward)
    AttentionMaskInterface.register("plain", lambda **_: None)
    afbs.register()
    take_part_in_generation(inductor)
    model, tokenizer = load(arguments.model, arguments.device, getattr(torch, arguments.dtype))
    results = {}
    for length in arguments.lengths:
        count = arguments.samples + 1
        windows = text_windows(tokenizer, arguments.text, length, count, arguments.device)
        results[str(length)] = found = at_length(model, windows, arguments.new, arguments.rounds, arguments.compiled)
        print(length, found)
        save(arguments.name, arguments.out, {"settings": settings(arguments), "lengths": results})


if __name__ == "__main__":
    main()
