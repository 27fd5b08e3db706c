"""vLLM on a CPU with the plugin against vLLM alone: time to first token, perplexity, pass keys.

    afbs-compile calibrate examples/model-7m --data first.txt --seq-len 16384 --samples 3 -o model.recipe.json
    python benchmarks/vllm_cpu.py --recipe model.recipe.json

The two engines are two processes that live side by side and take turns, prompt by prompt; each prompt is computed from
nothing. So are three windows for the perplexity, and ten prompts with a pass key, all of that length. The text is the
second half of Python's help topics: calibrate on the first. Both seconds on the clock and seconds of the processor are
kept, because other work on the machine moves the former alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, SHIPPED_MODEL, save, settings

PASSKEY_PROMPTS, WINDOWS = 10, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--tokens", type=int, default=16384, help="of a prompt")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--runs", type=int, default=5, help="timed prompts of each engine")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="vllm_cpu")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return

    names = ("native", "plugin")
    engines = {name: start(arguments, name) for name in names}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for run in range(-1, arguments.runs):  # the first one warms up
        for name in names if run % 2 else names[::-1]:
            row = ask(engines[name], "time", run % WINDOWS)
            print(f"{name:>6} {'warm-up' if run < 0 else run}: {row['seconds']:.2f} s, processor {row['cpu']:.2f} s")
            if run >= 0:
                times[name].append(row)
    result: dict[str, Any] = {"settings": settings(arguments), "runs": times}
    for kind in ("seconds", "cpu"):
        columns = {name: [row[kind] for row in times[name]] for name in names}
        medians = {name: statistics.median(column) for name, column in columns.items()}
        ratios = [a / b for a, b in zip(columns["native"], columns["plugin"], strict=True)]
        ratio = medians["native"] / medians["plugin"]
        result[kind] = {**medians, "ratio": ratio, "ratios": ratios}
        print(
            f"time to first token of {arguments.tokens:,} tokens, {kind}: native {medians['native']:.2f}, plugin "
            f"{medians['plugin']:.2f}: {ratio:.2f}x ({min(ratios):.2f}x to {max(ratios):.2f}x)"
        )
    for name in names:
        quality = result[name] = ask(engines[name], "quality")
        print(f"{name}: perplexity {quality['perplexity']:.3f}, pass keys {quality['passkeys']} of {PASSKEY_PROMPTS}")
        print(f"{name}: {quality['stats']}")
        engines[name].stdin.close()
        engines[name].wait()
    save(arguments.name, arguments.out, result)


def start(arguments: argparse.Namespace, name: str) -> Any:
    """An engine in a process of its own."""
    surroundings = {
        **os.environ,
        "AFBS_VLLM_RECIPE": str(arguments.recipe) if name == "plugin" else "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": str(arguments.threads),
        "HF_HUB_OFFLINE": "1",
    }
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *sys.argv, "--serve"], env=surroundings, **pipes)


def ask(engine: Any, *question: Any) -> dict[str, Any]:
    print(json.dumps(question), file=engine.stdin, flush=True)
    for line in engine.stdout:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise SystemExit("an engine ended")


def serve(arguments: argparse.Namespace) -> None:
    """Answer questions from standard input."""
    from vllm import LLM, SamplingParams

    from afbs_compile.integrations.vllm.stats import STATS

    llm = LLM(
        str(arguments.model),
        dtype=arguments.dtype,
        max_model_len=arguments.tokens + 16,
        max_num_batched_tokens=arguments.chunk,
        enforce_eager=True,
    )
    tokenizer = llm.get_tokenizer()
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text[len(text) // 2 :], add_special_tokens=False, verbose=False).input_ids
    step = (len(ids) - arguments.tokens) // (WINDOWS - 1)
    windows = [ids[step * number :][: arguments.tokens] for number in range(WINDOWS)]

    def generated(prompts: list[list[int]], **asked: Any) -> list[Any]:
        llm.reset_prefix_cache()
        sampling = SamplingParams(temperature=0, **asked)
        return list(llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False))

    def timed(window: int) -> dict[str, float]:
        began, cpu = time.perf_counter(), time.process_time()
        generated([windows[window]], max_tokens=1)
        return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}

    def quality() -> dict[str, Any]:
        losses = []
        for window in windows:
            (output,) = generated([window], max_tokens=1, prompt_logprobs=0)
            losses += [
                -entry[token].logprob for entry, token in zip(output.prompt_logprobs, window, strict=True) if entry
            ]
        sys.path.append(str(ROOT / "examples"))
        import passkey

        right = 0
        for row, answer in passkey.prompts(tokenizer, ids, arguments.tokens, PASSKEY_PROMPTS):
            (output,) = generated([row[0, : -len(answer)].tolist()], max_tokens=len(answer), ignore_eos=True)
            right += list(output.outputs[0].token_ids) == answer.tolist()
        return {"perplexity": math.exp(statistics.mean(losses)), "passkeys": right, "stats": vars(STATS)}

    for line in sys.stdin:
        kind, *given = json.loads(line)
        print(json.dumps(timed(*given) if kind == "time" else quality()), flush=True)


if __name__ == "__main__":
    main()
