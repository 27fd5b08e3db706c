"""The whole way in one run: a real language model, found, calibrated, rewritten, compiled, and measured.

    python examples/quickstart.py

Everything comes with the repository or with Python: the model in examples/model-7m, and the text of Python's own
help topics. Takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import passkey
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import afbs_compile

MODEL = Path(__file__).parent / "model-7m"
LENGTH = 8192
PASSKEY_LENGTH = 4096
TEST_WINDOWS = 3
PASSKEY_PROMPTS = 10
TIMED_RUNS = 5

console = Console(highlight=False, width=max(100, Console().width))


def main() -> None:
    """Run every step and print what it shows."""
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval().to(device)
    tokens = read_topics(AutoTokenizer.from_pretrained(MODEL))
    calibration, *unseen = windows(tokens.to(device), LENGTH, 1 + TEST_WINDOWS)

    console.rule(f"1  torch.compile(model, backend='afbs') and a first call of {LENGTH:,} tokens on {device}")
    sparse = torch.compile(model, backend="afbs")
    dense = torch.compile(model)
    with torch.no_grad():
        sparse(calibration)
        dense(calibration)
    explanation = afbs_compile.explain(sparse)
    console.print(explanation)

    console.rule("2  the rewritten graph, one line per attention call")
    for line in sparse_calls(explanation.after[0]):
        console.print(line, soft_wrap=True, markup=False)

    console.rule("3  the same quality? (text that was not used in calibration)")
    for name, compiled in (("dense", dense), ("sparse", sparse)):
        console.print(
            f"perplexity over {len(unseen)} x {LENGTH:,} tokens, {name:>6}: {perplexity(compiled, unseen):.2f}"
        )
    tests = passkeys(device)
    for name, compiled in (("dense", dense), ("sparse", sparse)):
        score = passkey.recall(compiled, tests)
        console.print(f"passkey recall at {PASSKEY_LENGTH:,} tokens, {len(tests)} prompts, {name:>6}: {score:.0%}")

    console.rule("4  faster?")
    dense_s, sparse_s = prefill_seconds([dense, sparse], unseen[0])
    console.print(
        f"prefill of {LENGTH:,} tokens: dense {dense_s:.2f} s, sparse {sparse_s:.2f} s: "
        f"[bold]{dense_s / sparse_s:.2f}x[/bold] (medians of {TIMED_RUNS} alternating runs)"
    )
    console.print(f"all of this took {time.perf_counter() - began:.0f} s")


def read_topics(tokenizer: Any) -> Tensor:
    """Python's help topics as one row of tokens, ``[n]``."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def windows(tokens: Tensor, length: int, count: int) -> list[Tensor]:
    """``count`` disjoint windows ``[1, length]``, spread over the text."""
    starts = torch.linspace(0, len(tokens) - length, count).long().tolist()
    return [tokens[None, start : start + length].contiguous() for start in starts]


def passkeys(device: str) -> list[tuple[Tensor, Tensor]]:
    """Retrieval prompts in Python's help topics."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    made = passkey.prompts(tokenizer, read_topics(tokenizer).tolist(), PASSKEY_LENGTH, PASSKEY_PROMPTS)
    return [(ids.to(device), answer) for ids, answer in made]


def sparse_calls(graph: str) -> Iterator[str]:
    """The lines of a graph's text that call the sparse operator."""
    for line in graph.splitlines():
        if "afbs.sparse_attention" in line:
            yield line.strip().split("  #")[0]


@torch.no_grad()
def perplexity(model: Callable[..., Any], texts: list[Tensor]) -> float:
    """Exponential of the mean next-token loss."""
    losses = [F.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]).item() for ids in texts]
    return math.exp(statistics.mean(losses))


@torch.no_grad()
def prefill_seconds(models: list[Callable[..., Any]], ids: Tensor) -> list[float]:
    """Median seconds of a forward pass, the models taking turns so that a slow moment of the machine hits all."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(TIMED_RUNS):
        for model, spent in zip(models, times, strict=True):
            began = time.perf_counter()
            model(ids).logits[0, -1].sum().item()
            spent.append(time.perf_counter() - began)
    return [statistics.median(spent) for spent in times]


if __name__ == "__main__":
    main()
