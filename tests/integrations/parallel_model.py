"""A tiny Llama on two ranks, in every way to share it: what torchrun starts in test_parallel.py.

torchrun --nproc-per-node 2 -m tests.integrations.parallel_model WAY
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import afbs_compile
import afbs_compile.integrations.transformers as afbs
from afbs_compile import Recipe
from afbs_compile.errors import AfbsWarning, CalibrationError, OptionError, RecipeError
from tests.toy import without_a_clock

ASKED: dict[str, Any] = {"min_length": 128, "tolerance": 0.5}
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def sharp_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)
    return model


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (1, 512), generator=torch.Generator().manual_seed(seed))


def tensor_parallel() -> Any:
    mesh, model = init_device_mesh("cpu", (2,)), sharp_llama()
    plan = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return model


def loaded(**plan: Any) -> Any:
    """By transformers, in shards as its configuration says."""
    from transformers.distributed import DistributedConfig

    with shared_folder() as folder:
        sharp_llama().save_pretrained(folder)  # the first rank writes
        dist.barrier()
        config = DistributedConfig(**plan)
        return transformers.LlamaForCausalLM.from_pretrained(folder, distributed_config=config).eval()


def fully_sharded() -> Any:
    mesh, model = init_device_mesh("cpu", (2,)), sharp_llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """An empty folder that the ranks share."""
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    yield Path(folder[0])
    dist.barrier()


@contextmanager
def own_cache() -> Iterator[Path]:
    """The same for our cache."""
    with shared_folder() as folder:
        os.environ["AFBS_CACHE_DIR"] = str(folder)
        yield folder


def heard(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call gives, and our warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = call()
    return value, [str(each.message) for each in caught if issubclass(each.category, AfbsWarning)]


def rows(model: Any) -> list[Any]:
    return [(row.site, row.outcome, row.heads) for row in afbs_compile.explain(model).rows]


def constants(recipe: Recipe) -> list[Any]:
    return [(site.name, len(site.heads), site.kv_heads, site.calibrated.tau) for site in recipe.sites]


def eager(make: Callable[[], Any], said: dict[str, Any]) -> None:
    """Calibrated by the first call: one recipe, which serves the model in one piece, and the other way round."""
    whole = sharp_llama()
    exact = whole(ids()).logits
    with own_cache() as cache:
        model = make()
        afbs.use(model, **ASKED)
        out, said["first call"] = heard(lambda: model(ids()).logits)
        said["error"] = float((out - exact).norm() / exact.norm())
        said["rows"], recipe = rows(model), afbs.recipe_of(model)
        said["constants"], said["weights"] = constants(recipe), recipe.graphs[0].weights
        dist.barrier()
        (file,) = cache.iterdir()
        said["saved is gathered"] = constants(Recipe.load(file)) == constants(recipe)
        again = make()
        afbs.use(again, **ASKED)
        said["same from the cache"] = bool(torch.equal(again(ids()).logits, out))
        said["files"] = len(list(cache.iterdir()))
    whole = sharp_llama()
    (one, said["on one device"]) = heard(lambda: afbs.use(whole, recipe=recipe, min_length=128)(ids()).logits)
    said["as on one device"] = float((out - one).norm() / one.norm())
    alone = sharp_llama()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AFBS_CACHE_DIR"] = folder  # each rank calibrates the whole model by itself
        afbs.use(alone, **ASKED)
        alone_out = alone(ids()).logits
    of_one = afbs.recipe_of(alone)
    said["weights of one device"] = of_one.graphs[0].weights
    model = make()
    (out, said["by a recipe of one device"]) = heard(
        lambda: afbs.use(model, recipe=of_one, min_length=128)(ids()).logits
    )
    said["rows by it"] = rows(model)
    said["error by it"] = float((out - alone_out).norm() / alone_out.norm())


def compiled(said: dict[str, Any]) -> None:
    """The same by the backend, and by calibrate()."""
    exact = sharp_llama()(ids()).logits
    with own_cache() as cache:
        model = torch.compile(tensor_parallel(), backend="afbs", options=ASKED)
        out, said["first call"] = heard(lambda: model(ids()).logits)
        said["error"], said["rows"] = float((out - exact).norm() / exact.norm()), rows(model)
        dist.barrier()
        (file,) = cache.iterdir()
        recipe = Recipe.load(file)
    said["constants"], said["weights"] = constants(recipe), recipe.graphs[0].weights
    said["by calibrate"] = constants(afbs_compile.calibrate(tensor_parallel(), [ids()], **ASKED))
    torch._dynamo.reset()
    options = {"recipe": recipe, "min_length": 128}
    whole = torch.compile(sharp_llama(), backend="afbs", options=options)
    one, said["on one device"] = heard(lambda: whole(ids()).logits)
    said["as on one device"], said["rows there"] = float((out - one).norm() / one.norm()), rows(whole)
    torch._dynamo.reset()
    of_one = afbs_compile.calibrate(sharp_llama(), [ids()], **ASKED)
    said["weights of one device"] = of_one.graphs[0].weights
    model = torch.compile(tensor_parallel(), backend="afbs", options={**options, "recipe": of_one})
    out, said["by a recipe of one device"] = heard(lambda: model(ids()).logits)
    said["rows by it"], said["error by it"] = rows(model), float((out - exact).norm() / exact.norm())


def pipeline(said: dict[str, Any]) -> None:
    """Two stages of transformers' own pipeline."""
    exact = sharp_llama()(ids()).logits
    with own_cache():
        model = loaded(pp_size=2)
        afbs.use(model, **ASKED)
        out, said["first call"] = heard(lambda: model(ids()).logits)
    said["error"], said["rows"] = float((out - exact).norm() / exact.norm()), rows(model)
    recipe = afbs_compile.gather(afbs.recipe_of(model))
    said["constants"] = constants(recipe)
    again = loaded(pp_size=2)
    out, said["by the gathered"] = heard(lambda: afbs.use(again, recipe=recipe, min_length=128)(ids()).logits)
    said["rows by it"] = rows(again)
    whole = sharp_llama()
    one, said["on one device"] = heard(lambda: afbs.use(whole, recipe=recipe, min_length=128)(ids()).logits)
    said["rows there"], said["as on one device"] = rows(whole), float((out - one).norm() / one.norm())
    misnamed = replace(recipe, graphs=(recipe.graphs[dist.get_rank()],))
    sites = tuple(replace(site, name="model.layers.0.self_attn") for site in misnamed.graphs[0].sites)
    misnamed = replace(misnamed, graphs=(replace(misnamed.graphs[0], sites=sites),))
    with pytest.raises(RecipeError, match="processes 0 and 1 both have a call named model.layers.0.self_attn"):
        afbs_compile.gather(misnamed)


def layer_by_layer(said: dict[str, Any]) -> None:
    """FSDP2's hooks break the graph at every layer: each finds its own calls of a recipe of the whole model."""
    exact = sharp_llama()(ids()).logits
    with own_cache():
        whole = sharp_llama()
        recipe = afbs_compile.calibrate(whole, [ids()], **ASKED)
        torch._dynamo.reset()
        options = {"recipe": recipe, "min_length": 128}
        model = torch.compile(fully_sharded(), backend="afbs", options=options)
        out, said["said"] = heard(lambda: model(ids()).logits)
    said["error"] = float((out - exact).norm() / exact.norm())
    said["sparsity"] = [row.sparsity for row in afbs_compile.explain(model).rows]
    said["recorded"] = [site.sparsity for site in recipe.sites]


def refused(said: dict[str, Any]) -> None:
    """What calibrate() cannot do in several processes."""
    with own_cache():
        with pytest.raises(CalibrationError, match="FSDP2 frees the weights of each layer that has run"):
            afbs_compile.calibrate(fully_sharded(), [ids()], **ASKED)
        with pytest.raises(OptionError, match="a budget on the output needs all heads of a call in one process"):
            afbs_compile.calibrate(tensor_parallel(), [ids()], min_length=128, tolerance={"perplexity": 0.01})
        model = fully_sharded()
        afbs.use(model, **ASKED)
        model(ids(dist.get_rank()))
    said["own"] = constants(afbs.recipe_of(model))
    said["constants"] = constants(afbs_compile.gather(afbs.recipe_of(model)))


def failing(said: dict[str, Any]) -> None:
    """One rank cannot calibrate: neither may the other wait for it, nor calibrate alone."""
    from afbs_compile.integrations import served

    exact = sharp_llama()(ids()).logits
    with own_cache():
        model = tensor_parallel()
        if dist.get_rank() == 1:

            def no_memory(*_: Any, **__: Any) -> Any:
                raise RuntimeError("no memory")

            served.tune_site = no_memory
        afbs.use(model, **ASKED)
        out = model(ids()).logits
    said["rows"], said["error"] = rows(model), float((out - exact).norm() / exact.norm())
    said["reason"] = afbs_compile.explain(model).rows[0].reason


def main(way: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    without_a_clock(pytest.MonkeyPatch())
    said: dict[str, Any] = {"rank": dist.get_rank()}
    with torch.no_grad():
        WAYS[way](said)
    print(json.dumps(said), flush=True)
    dist.destroy_process_group()


WAYS: dict[str, Callable[[dict[str, Any]], None]] = {
    "eager": lambda said: eager(tensor_parallel, said),
    "tp_plan": lambda said: eager(lambda: loaded(tp_plan="auto"), said),
    "fsdp": lambda said: eager(fully_sharded, said),
    "compile": compiled,
    "pipeline": pipeline,
    "layer by layer": layer_by_layer,
    "failing": failing,
    "refused": refused,
}

if __name__ == "__main__":
    main(sys.argv[1])
