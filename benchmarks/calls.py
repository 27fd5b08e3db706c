"""Real calls: masks, padding, caches, chunks, windows and packed documents, against ``torch.compile(model)``.

    python benchmarks/calls.py                          the shipped model at 4,096 tokens, and three modules
    python benchmarks/calls.py --forms default ones     some of them

Every form is one row: how many attention calls it has and how many are sparse, the relative L1 distance of its output
from the dense model's over the rows that are not padding, and its time against ``torch.compile(model)`` on the same
inputs, in turns in one process. The language model is calibrated once, by the first form: its recipe serves the
others. Padded rows are nobody's output and are left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, SHIPPED_MODEL, load, save, settings, text_windows
from torch import Tensor, nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

import afbs_compile

MIN_SECONDS, MIN_RUNS = 4.0, 5


@dataclass
class Form:
    """One way to call a model.

    Attributes:
        name: of the row.
        model: to compile, dense and sparse.
        inputs: its keyword arguments.
        before: called before every run, untimed: a call may leave its cache longer.
        counted: bool, of the output's leading dimensions: the rows that are no padding; ``None`` for all.
        beside: other inputs, which the sparse model is given in the same turns: how much longer does the form take?
    """

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    before: Callable[[], None] = lambda: None
    counted: Tensor | None = None
    beside: dict[str, Any] | None = None


class Attention(nn.Module):
    """One layer of attention over rows, or of rows over others; with T5's bias by relative position if asked for."""

    def __init__(self, width: int = 512, heads: int = 8, *, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.relative = nn.Embedding(32, heads) if bias else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """``[B, N, width]``; keys and values are of ``memory`` where that is given."""
        source = x if memory is None else memory
        q, k, v = (
            layer(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, rows in ((self.q, x), (self.k, source), (self.v, source))
        )
        mask = None if self.relative is None else self.bias(q.shape[2], k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))

    def bias(self, rows: int, keys: int) -> Tensor:
        """``[1, heads, rows, keys]``: a number for each bucket of distances."""
        assert self.relative is not None
        distance = torch.arange(keys)[None] - torch.arange(rows)[:, None]
        far = 8 + (distance.abs().clamp_min(1).float() / 8).log().clamp_min(0).mul(1.7).long().clamp_max(7)
        bucket = torch.where(distance.abs() < 8, distance.abs(), far) + 16 * (distance > 0)
        return self.relative(bucket).permute(2, 0, 1)[None]


def language_forms(length: int) -> Iterator[Form]:
    """The shipped model, called in every way that prefill arrives."""
    model, tokenizer = load(SHIPPED_MODEL, "cpu", torch.float32)
    ids, other = text_windows(tokenizer, "topics", length, 2, "cpu")
    both = torch.cat([ids, other])
    left, right = (torch.ones_like(both) for _ in range(2))
    left[1, : length // 3], right[1, -length // 3 :] = 0, 0
    chunk = length // 4

    yield Form("default", model, {"input_ids": ids})
    ones = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    yield Form("attention_mask of ones", model, ones, beside={"input_ids": ids})
    yield Form("left-padded batch of 2", model, {"input_ids": both, "attention_mask": left}, counted=left.bool())
    yield Form("right-padded batch of 2", model, {"input_ids": both, "attention_mask": right}, counted=right.bool())
    for name, cache in (
        ("dynamic cache", DynamicCache(config=model.config)),
        (f"static cache of {2 * length:,}", StaticCache(config=model.config, max_cache_len=2 * length)),
    ):
        with torch.no_grad():
            model(ids[:, :-chunk], past_key_values=cache, logits_to_keep=1)
        named = f"chunk of {chunk:,} behind {length - chunk:,}, {name}"
        yield Form(named, model, {"input_ids": ids[:, -chunk:], "past_key_values": cache}, before=rewinding(cache))
    yield Form(f"sliding window of {length // 4:,}", windowed(model, length // 4), {"input_ids": ids})
    places = torch.cat([torch.arange(length // 4), torch.arange(length // 2), torch.arange(length - 3 * length // 4)])
    # With a cache transformers does not look for documents.
    packed = {"input_ids": ids, "position_ids": places[None], "use_cache": False}
    yield Form("packed documents", model, packed)


def rewinding(cache: Any) -> Callable[[], None]:
    """What brings a cache back to how it is now, in the memory that it has."""
    kept = [{name: copied(value) for name, value in vars(layer).items()} for layer in cache.layers]

    def rewind() -> None:
        for layer, values in zip(cache.layers, kept, strict=True):
            for name, value in values.items():
                now = getattr(layer, name)
                if isinstance(value, Tensor) and isinstance(now, Tensor) and now.shape == value.shape:
                    now.copy_(value)
                else:
                    setattr(layer, name, copied(value))

    return rewind


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def windowed(model: Any, width: int) -> nn.Module:
    """A Mistral with the same weights, whose layers see a sliding window."""
    ours = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "rms_norm_eps")
    given = {name: getattr(ours, name) for name in (*names, "tie_word_embeddings")}
    other = MistralForCausalLM(MistralConfig(**given, sliding_window=width)).eval()
    other.load_state_dict(model.state_dict())
    return other


def module_forms(length: int) -> Iterator[Form]:
    """Modules without a mask of their own: bidirectional, cross attention, and with a bias."""
    torch.manual_seed(0)
    drift = torch.randn(1, length // 64, 512).repeat_interleave(64, 1)
    x, memory = drift + 0.5 * torch.randn(1, length, 512), drift + 0.5 * torch.randn(1, length, 512)
    yield Form("bidirectional", Attention().eval(), {"x": x})
    yield Form("cross attention", Attention().eval(), {"x": x[:, : length // 2], "memory": memory})
    yield Form("T5's bias", Attention(bias=True).eval(), {"x": x})


def output_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.logits


def measured(form: Form) -> dict[str, Any]:
    """One row of the table."""
    torch._dynamo.reset()
    dense, sparse = torch.compile(form.model), torch.compile(form.model, backend="afbs")
    turns = [(dense, form.inputs), (sparse, form.inputs)]
    turns += [] if form.beside is None else [(sparse, form.beside)]
    outputs, times = [], [list[float]() for _ in turns]
    with torch.no_grad():
        for compiled, inputs in turns:
            form.before()
            outputs.append(output_of(compiled(**inputs)).clone())
        until = time.perf_counter() + MIN_SECONDS
        while len(times[0]) < MIN_RUNS or time.perf_counter() < until:
            for (compiled, inputs), spent in zip(turns, times, strict=True):
                form.before()
                began = time.perf_counter()
                compiled(**inputs)
                spent.append(time.perf_counter() - began)
    exact, out = ((x if form.counted is None else x[form.counted]).double() for x in outputs[:2])
    rows = afbs_compile.explain(sparse).rows
    rows = rows[: len(rows) // (len(turns) - 1)]  # the graph of the form itself comes first
    seconds = [statistics.median(spent) for spent in times]
    return {
        "form": form.name,
        "calls": len(rows),
        "sparse": sum(row.outcome == "sparse" for row in rows),
        "dense": sorted({row.reason for row in rows if row.outcome == "dense"}),
        "refused": sorted({row.reason for row in rows if row.outcome == "refused"}),
        "error": float((out - exact).abs().sum() / exact.abs().sum()),
        "dense_ms": seconds[0] * 1e3,
        "sparse_ms": seconds[1] * 1e3,
        "ratio": seconds[0] / seconds[1],
        "beside_ms": seconds[2] * 1e3 if form.beside is not None else None,
        "over_beside": seconds[1] / seconds[2] if form.beside is not None else None,
        "runs": len(times[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens, or rows of the modules")
    parser.add_argument("--forms", nargs="+", help="words that begin the names of the wanted rows; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="calls_7m_cpu", help="name of the result file")
    arguments = parser.parse_args()
    os.environ["AFBS_CACHE_DIR"] = tempfile.mkdtemp()
    rows = []
    for form in (*language_forms(arguments.length), *module_forms(arguments.length)):
        if arguments.forms and not any(form.name.startswith(word) for word in arguments.forms):
            continue
        row = measured(form)
        print(
            "{form:48} {sparse} of {calls} sparse, error {error:.3f}, dense {dense_ms:7.0f} ms, sparse "
            "{sparse_ms:7.0f} ms: {ratio:.2f}x  {dense} {refused}".format(**row),
            flush=True,
        )
        if row["over_beside"] is not None:
            print(f"{'':48} {row['over_beside']:.2f} of the time of the call without it", flush=True)
        rows.append(row)
    save(arguments.name, arguments.out, {"settings": settings(arguments), "calls": rows})


if __name__ == "__main__":
    main()
