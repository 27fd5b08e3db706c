"""Engines of vLLM inside this process, with the plugin or without, and recipes for the shipped model."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from afbs_compile.integrations.vllm import RECIPE_VARIABLE, register
from afbs_compile.kernels.call import Kept, SparseCall
from afbs_compile.options import Options
from afbs_compile.recipe import GraphRecipe, HeadRecipe, Recipe, SampleRecord, SiteRecipe
from afbs_compile.sketch import sketched
from afbs_compile.tuner.graph import recipe_of

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, where it can be watched
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

MODEL = Path(__file__).parents[2] / "examples" / "model-7m"

KEEP_ALL = 0.9999999
"""Below what makes a head DENSE, so that the sparse kernels compute it, and above what any block falls short of."""


def recipe_for(folder: Path, *taus: float, heads: int = 0, min_length: int = 256, device: str = "cpu") -> Recipe:
    """A recipe of a saved model: heads of these taus in turn, ``heads`` of them, if not as many as it has."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    heads = heads or config.num_attention_heads
    call = SparseCall.uniform(heads, 1.0, policy="cumulant", min_length=min_length, kept=Kept(64, 64))
    call = call.with_tau(torch.tensor(taus, dtype=torch.float64).repeat(heads)[:heads])
    measured = (HeadRecipe("sparse", 0.5, 0.01, (0.01,)),) * heads
    sites = tuple(
        SiteRecipe(
            f"model.layers.{layer}.self_attn",
            "sparse",
            mask="causal",
            head_dim=config.head_dim,
            kv_heads=config.num_key_value_heads,
            dtype="float32",
            call=call,
            heads=measured,
            validated_lengths=(256, 32768),
        )
        for layer in range(config.num_hidden_layers)
    )
    sketches = sketched([*model.named_parameters(), *model.named_buffers()])
    samples = SampleRecord("samples", 1, 1, (4096, 4096), "")
    graph = GraphRecipe("", "", "", samples, 0.0, 0.0, sites, tensors=sketches)
    recipe = recipe_of(graph, Options.parse().tuning, torch.device("cpu"))
    return recipe if device == "cpu" else Recipe(**{**vars(recipe), "device": device})


@contextmanager
def engine(recipe: Path | None, model: Path = MODEL, **options: Any) -> Iterator[Any]:
    """An engine, with the plugin where a recipe is named."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    selector._cached_get_attn_backend.cache_clear()
    AttentionBackendEnum.CPU_ATTN.clear_override()
    os.environ[RECIPE_VARIABLE] = "" if recipe is None else str(recipe)
    register()
    given = {
        "dtype": "float32",
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "enforce_eager": True,
        "disable_log_stats": False,
        "seed": 0,
    }
    try:
        llm = LLM(str(model), **given | options)
        yield llm
        llm.llm_engine.engine_core.shutdown()
        del llm
    finally:
        os.environ.pop(RECIPE_VARIABLE, None)
        AttentionBackendEnum.CPU_ATTN.clear_override()
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(llm: Any, prompts: list[list[int]], tokens: int = 16) -> list[list[int]]:
    """The tokens that follow each prompt."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in made]
