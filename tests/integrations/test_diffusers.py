"""Models and pipelines of diffusers with the backend "afbs", against the backend "native"."""

# ruff: noqa: E402

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import afbs_compile
import afbs_compile.integrations.diffusers as afbs
from afbs_compile.errors import AfbsError, OptionError, RecipeError
from afbs_compile.integrations.diffusers.dispatcher import active_backend, attention_dispatch
from afbs_compile.integrations.diffusers.models import CHECKED_STEPS
from afbs_compile.integrations.served import ServedModel
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.recipe import SiteRecipe
from tests.integrations.diffusers_models import FAMILIES, TEXT, output, sharpened, smooth, text, tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def native_again() -> Any:
    """diffusers' choice of a backend is one for the whole process."""
    afbs.register()
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> dict[str, Operands]:
    """Every call that is handed over runs as a sparse one that keeps every block; what came, by name."""
    seen: dict[str, Operands] = {}

    def kept(self: ServedModel, name: str, operands: Operands) -> SparseCall:
        seen[name] = operands
        return SparseCall.uniform(operands.heads, KEEP_ALL)

    monkeypatch.setattr(ServedModel, "_call", kept)
    return seen


def rows(model: Any) -> dict[str, SiteRecipe]:
    """Of what explain knows."""
    served = afbs.served(model)
    assert served is not None
    assert [row.site for row in afbs_compile.explain(model).rows] == [row.name for row in served.rows]
    return {row.name: row for row in served.rows}


def difference(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().sum() / wanted.abs().sum()).item()


# Families.


@pytest.mark.parametrize("name", FAMILIES)
def test_with_every_block_kept_a_model_says_what_it_said(name: str, keep_all: dict[str, Operands]) -> None:
    model, inputs = tiny(name), FAMILIES[name].inputs(0)
    wanted = output(model, inputs)
    model.set_attention_backend("afbs")
    afbs.use(model, min_length=16)
    torch.testing.assert_close(output(model, inputs), wanted, atol=1e-5, rtol=1e-5)
    assert set(keep_all) == FAMILIES[name].calls
    padded = {name for name, operands in keep_all.items() if operands.valid is not None}
    if name in ("hunyuan_video", "qwen_image"):  # joint attention with a mask of text: a vector, no matrix
        assert {call for call in FAMILIES[name].calls if "transformer_blocks" in call} <= padded


QUICK = ("wan", "sd3")
"""Of these ways to the attention of a model there is one each: through the dispatcher, and past it."""


@pytest.mark.usefixtures("sparse_is_faster")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_calibrated_model_is_sparse_and_says_nearly_what_it_said(name: str) -> None:
    model, inputs = sharpened(tiny(name)), FAMILIES[name].inputs(0)
    unseen = FAMILIES[name].inputs(1)
    wanted = output(model, unseen)
    afbs.use(model, min_length=512)
    output(model, inputs)
    error = difference(output(model, unseen), wanted)
    sparse = [row for row in rows(model).values() if row.outcome == "sparse"]
    assert sparse
    assert all(row.error <= 1.5 * 0.055 for row in sparse)
    assert 0 < error < 0.02


# Switching on and off.


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_set_attention_backend_switches_a_model_on_and_off(name: str, keep_all: dict[str, Operands]) -> None:
    model, inputs = tiny(name), FAMILIES[name].inputs(0)
    if name == "wan":
        inputs["hidden_states"] = inputs["hidden_states"].repeat(1, 1, 2, 1, 1)[:, :, :5]  # 1,280 tokens
    else:
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat(1, 4, 1)
    model.set_attention_backend("afbs")
    output(model, inputs)
    assert keep_all
    keep_all.clear()
    model.set_attention_backend("native")
    output(model, inputs)
    model.set_attention_backend("afbs")
    model.reset_attention_backend()
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)
    output(model, inputs)
    assert not keep_all
    assert afbs.served(model) is None


def test_a_context_manager_serves_from_the_second_call_on(keep_all: dict[str, Operands]) -> None:
    model, inputs = tiny("flux"), FAMILIES["flux"].inputs(0)
    with attention_dispatch.attention_backend("afbs"):
        output(model, inputs)
        assert set(keep_all) == {"single_transformer_blocks.0.attn"}  # the first call said which model it is
        output(model, inputs)
    assert set(keep_all) == FAMILIES["flux"].calls


def test_use_leaves_other_models_alone() -> None:
    before = active_backend()
    afbs.use(tiny("wan"))
    assert active_backend() is before


def test_the_environment_variable_works_where_ours_is_imported_before_diffusers() -> None:
    code = """
import afbs_compile.integrations.diffusers as afbs
afbs.register()
from tests.integrations.diffusers_models import FAMILIES, output, tiny
model = tiny("wan")
inputs = FAMILIES["wan"].inputs(0)
inputs["hidden_states"] = inputs["hidden_states"].repeat(1, 1, 2, 1, 1)[:, :, :5]
for _ in range(2):
    output(model, inputs)
print(sorted(row.name for row in afbs.served(model).rows))
"""
    environment = {**os.environ, "DIFFUSERS_ATTN_BACKEND": "afbs", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("['blocks.0.attn1', 'blocks.1.attn1']"), done.stderr


def test_a_copy_of_a_model_is_a_model_of_its_own(keep_all: dict[str, Operands]) -> None:
    model, inputs = tiny("sd3"), FAMILIES["sd3"].inputs(0)
    afbs.use(model, min_length=16)
    other = copy.deepcopy(model)
    output(other, inputs)
    assert not keep_all  # nobody asked for it
    afbs.use(other, min_length=16)
    output(other, inputs)
    assert set(keep_all) == FAMILIES["sd3"].calls


def test_a_second_call_of_a_module_has_a_name_of_its_own(keep_all: dict[str, Operands]) -> None:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
        image_dim=8,
        added_kv_proj_dim=48,
    ).eval()
    inputs = FAMILIES["wan"].inputs(0)
    inputs["encoder_hidden_states"] = torch.randn(2, 512, 32)
    inputs["encoder_hidden_states_image"] = torch.randn(2, 40, 8)
    wanted = output(model, inputs)
    afbs.use(model, min_length=16)
    torch.testing.assert_close(output(model, inputs), wanted, atol=1e-5, rtol=1e-5)
    assert {name: operands.k_len for name, operands in keep_all.items()} == {
        "blocks.0.attn1": 1024,
        "blocks.0.attn2": 40,
        "blocks.0.attn2#2": 512,
    }


def test_only_models_and_pipelines_of_diffusers_are_taken() -> None:
    with pytest.raises(OptionError, match="model: got a Linear; accepted: a model or a pipeline of diffusers"):
        afbs.use(torch.nn.Linear(2, 2))
    with pytest.raises(OptionError, match="unknown option 'tolerence'"):
        afbs.use(tiny("wan"), tolerence=0.1)


# Calls that are not sparse.

Q = torch.randn(2, 64, 2, 16, generator=torch.Generator().manual_seed(0))


class Asking(torch.nn.Module):
    """Makes one call, through the dispatcher."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.processor = torch.nn.Identity()
        if not direct:
            self.processor._attention_backend = None
        self.direct = direct

    def forward(self, given: dict[str, Any]) -> Tensor:
        q, k, v = (given.get(name, Q) for name in "qkv")
        rest = {key: value for key, value in given.items() if key not in ("q", "k", "v")}
        if self.direct:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, **rest).transpose(1, 2)
        return attention_dispatch.dispatch_attention_fn(q, k, v, **rest)


def asking(direct: bool = False) -> Any:
    """A model of diffusers around it."""

    class Model(diffusers.ModelMixin, diffusers.ConfigMixin):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Asking(direct)
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, given: dict[str, Any]) -> Tensor:
            return self.attn(given)

    return Model()


def said(given: dict[str, Any], direct: bool = False) -> tuple[Tensor, Tensor, str | None]:
    """What afbs and native give for a call, and the reason that was remembered."""
    model = asking(direct)
    wanted = model(given)
    afbs.use(model, min_length=1)
    with attention_dispatch.attention_backend("afbs"):
        found = model(given)
    reasons = [row.reason for row in rows(model).values() if row.outcome == "refused"]
    return found, wanted, reasons[0] if reasons else None


MASKS = {
    "keys": torch.arange(64) < torch.tensor([[40], [64]]),
    "rows and keys": torch.arange(64)[:, None] >= torch.arange(64),
    "heads": torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(1)) < 0.5,
    "a bias": torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(2)),
    "a bias for keys": torch.where(torch.arange(64) < 40, 0.0, -10000.0).expand(2, 1, 1, 64),
    "all": torch.arange(64).expand(2, 1, 1, 64) < torch.tensor([40, 64])[:, None, None, None],
    "nothing": torch.zeros(2, 1, 1, 64, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_every_kind_are_taken(mask: str, keep_all: dict[str, Operands]) -> None:
    found, wanted, reason = said({"attn_mask": MASKS[mask]})
    assert reason is None
    assert set(keep_all) == {"attn"}
    torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.parametrize("direct", [False, True])
def test_scale_causality_and_groups_are_taken(direct: bool, keep_all: dict[str, Operands]) -> None:
    key = Q[:, :, :1].flip(1)
    given = {"k": key, "v": key, "scale": 0.5, "is_causal": True, "enable_gqa": True}
    found, wanted, reason = said(given, direct)
    assert reason is None
    assert keep_all["attn"].scale == 0.5
    torch.testing.assert_close(found, wanted)


DENSE = {
    "dropout": ({"dropout_p": 1e-9}, "dropout of 1e-09: sparse attention has none"),
    "dtype": ({name: Q.double() for name in "qkv"}, "q has dtype torch.float64; accepted"),
    "wide heads": ({name: Q.repeat(1, 1, 1, 33) for name in "qkv"}, "q has head_dim 528; accepted: 1 to 512"),
    "causal, few keys": ({"k": Q[:, :20], "v": Q[:, :20], "is_causal": True}, "is_causal with 64 rows over 20 keys"),
    "a mask of one column": ({"attn_mask": torch.zeros(2, 1, 64, 1)}, "attn_mask has size 1 in dimension 3"),
    "gradients": ({"q": Q.clone().requires_grad_()}, "gradients are asked for: sparse attention has none"),
}


@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("direct", [False, True])
def test_what_cannot_be_sparse_is_native_and_has_a_reason(case: str, direct: bool, keep_all: Any) -> None:
    given, expected = DENSE[case]
    found, wanted, reason = said(given, direct)
    assert reason is not None
    assert reason.startswith(expected)
    torch.testing.assert_close(found, wanted)
    assert not keep_all


def test_an_error_of_native_stays_that_error(keep_all: Any) -> None:
    model = asking()
    afbs.use(model, min_length=1)
    with attention_dispatch.attention_backend("afbs"):
        with pytest.raises(RuntimeError, match="size"):
            model({"attn_mask": torch.zeros(2, 1, 64, 7)})
        model({})  # and the module is not thought to run still
    assert set(keep_all) == {"attn"}


def test_torch_compile_sees_native_attention(fresh_dynamo: None) -> None:
    model, inputs = tiny("wan"), FAMILIES["wan"].inputs(0)
    wanted = output(model, inputs)
    afbs.use(model, min_length=16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, inputs), wanted)
    assert not rows(model)


# Context parallel.


def test_context_parallel_is_refused() -> None:
    model = tiny("wan")
    model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(
        AfbsError, match=r"WanTransformer3DModel stays as it is, context parallel: a device sees a part"
    ):
        afbs.use(model)
    with pytest.raises(ValueError, match="'afbs' does not support context parallelism"):
        model.set_attention_backend("afbs")
    assert afbs.served(model) is None


def test_a_call_in_context_parallel_is_left_to_native(monkeypatch: pytest.MonkeyPatch, keep_all: Any) -> None:
    model = asking()
    afbs.use(model, min_length=1)
    came = []
    monkeypatch.setattr(
        "afbs_compile.integrations.diffusers.attention.native", lambda q, *_, **rest: came.append(rest) or q
    )
    with attention_dispatch.attention_backend("afbs"):
        model({"parallel_config": "two devices"})
    assert came[0]["_parallel_config"] == "two devices"
    assert "context parallel" in (rows(model)["attn"].reason or "")


# Steps and recipes.


@pytest.mark.usefixtures("sparse_is_faster")
def test_thresholds_that_fail_at_a_later_step_are_raised() -> None:
    model, inputs = sharpened(tiny("flux")), FAMILIES["flux"].inputs(0)
    afbs.use(model, min_length=512)
    output(model, inputs)
    served = afbs.served(model)
    assert served is not None
    assert served.recipe is not None
    for site in served._sites.values():  # as if the first step had let through far more than others can bear
        dense = dataclasses.replace(site.row.heads[1], outcome="dense", sparsity=0.0, error=0.0)
        call = site.row.calibrated.with_tau(torch.tensor([0.3, KEEP_ALL]))
        site.row = dataclasses.replace(site.row, call=call, heads=(site.row.heads[0], dense))
        site.calls.clear()
    output(model, inputs)
    assert 2 in CHECKED_STEPS
    raised = {row.name: row for row in served.rows}
    for row in raised.values():
        assert row.outcome == "sparse"
        assert 0.3 < row.calibrated.tau[0] < row.calibrated.tau[1] == KEEP_ALL
        assert row.heads[0].error <= 0.055
    assert {row.name: row.call for row in served.recipe.sites} == {name: row.call for name, row in raised.items()}
    again = afbs.use(copy.deepcopy(model), min_length=512)
    output(again, inputs)
    assert {name: row.call for name, row in rows(again).items()} == {name: row.call for name, row in raised.items()}


@pytest.mark.usefixtures("sparse_is_faster")
def test_a_recipe_serves_another_process_and_refuses_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = FAMILIES["sd3"].inputs(0)
    model = afbs.use(sharpened(tiny("sd3")), min_length=512)
    output(model, inputs)
    served = afbs.served(model)
    assert served is not None
    recipe = served.recipe
    monkeypatch.setattr(
        "afbs_compile.integrations.served.tune_site", lambda *_, **__: pytest.fail("calibrated all the same")
    )
    again = afbs.use(sharpened(tiny("sd3")), recipe=recipe, min_length=512)
    wanted = output(model, inputs)
    torch.testing.assert_close(output(again, inputs), wanted)
    cached = afbs.use(sharpened(tiny("sd3")), min_length=512)
    torch.testing.assert_close(output(cached, inputs), wanted)
    with pytest.raises(RecipeError, match="other weights"):
        afbs.use(tiny("wan"), recipe=recipe)


# Pipelines.


def wan_pipeline() -> Any:
    """Text to video, guided by a second pass at each step."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=sharpened(tiny("wan")),
    )


def wan_arguments() -> dict[str, Any]:
    return {
        "height": 256,
        "width": 256,
        "num_frames": 13,
        "latents": smooth(1, 4, 4, 32, 32),
        "prompt_embeds": text(0)[:1],
        "negative_prompt_embeds": text(1)[:1],
    }


def flux_pipeline() -> Any:
    """Text to picture."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), latent_channels=1, norm_num_groups=1, sample_size=32, shift_factor=0.0
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=sharpened(tiny("flux")),
    )


def flux_arguments() -> dict[str, Any]:
    return {
        "height": 64,
        "width": 64,
        "latents": smooth(1, 4, 32, 32).flatten(2).transpose(1, 2),
        "prompt_embeds": text(0)[:1],
        "pooled_prompt_embeds": text(0)[:1, 0, :8],
    }


def cogvideox_pipeline() -> Any:
    """Text to video by a model whose processors do not use the dispatcher."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=sharpened(tiny("cogvideox")),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def cogvideox_arguments() -> dict[str, Any]:
    return {
        "height": 256,
        "width": 256,
        "num_frames": 13,
        "latents": smooth(1, 4, 4, 32, 32).transpose(1, 2),
        "prompt_embeds": text(0)[:1],
        "negative_prompt_embeds": text(1)[:1],
        "max_sequence_length": TEXT,
    }


PIPELINES = {
    "wan": (wan_pipeline, wan_arguments),
    "flux": (flux_pipeline, flux_arguments),
    "cogvideox": (cogvideox_pipeline, cogvideox_arguments),
}


@pytest.mark.usefixtures("sparse_is_faster")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_whole_pipeline(name: str) -> None:
    build, arguments = PIPELINES[name]
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    given = {**arguments(), "num_inference_steps": 4, "output_type": "pt", "return_dict": False}
    wanted = pipeline(**given)[0]
    assert afbs.use(pipeline, min_length=512) is pipeline
    found = pipeline(**given)[0]
    outcomes = {name: row.outcome for name, row in rows(pipeline.transformer).items()}
    assert {outcome for name, outcome in outcomes.items() if "attn2" not in name} == {"sparse"}
    assert afbs.served(pipeline.vae) is None
    assert 0 < difference(found, wanted) < 0.05
