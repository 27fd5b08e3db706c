"""Blocks of models of transformers and diffusers compiled one by one, and models under accelerate's hooks."""

from __future__ import annotations

import warnings

import pytest
import torch

import afbs_compile
from afbs_compile.errors import AfbsWarning
from tests.toy import without_a_clock

LENGTH = 384
LAYERS = 10
"""More than Dynamo compiles a function for."""
OPTIONS = {"min_length": 128, "tolerance": 0.3}
NAMES = [f"model.layers.{i}.self_attn" for i in range(LAYERS)]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, fresh_dynamo):
    without_a_clock(monkeypatch)


@pytest.fixture
def without_inductor(monkeypatch):
    found = []
    monkeypatch.setattr("afbs_compile.backend.lower", lambda gm, *_, **__: found.append(gm) or gm)
    return found


def llama(layers=LAYERS):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(length=LENGTH):
    return torch.randint(64, (1, length), generator=torch.Generator().manual_seed(0))


def difference(found, expected):
    return float((found - expected).abs().sum() / expected.abs().sum())


def shared(graphs):
    return sum("shared_attention" in gm.code for gm in graphs)


@torch.no_grad()
def test_layers_of_a_llama_share_a_compilation(without_inductor):
    model, ids = llama(), tokens()
    expected = model(ids, use_cache=False).logits
    for layer in model.model.layers:
        layer.compile(backend="afbs", fullgraph=True, options=OPTIONS)
    assert 1e-6 < difference(model(ids, use_cache=False).logits, expected) < 0.3
    assert {row.site: row.outcome for row in afbs_compile.explain(model).rows} == dict.fromkeys(NAMES, "sparse")
    assert shared(without_inductor) == 1
    # A cache is asked for by a layer's number, which Dynamo guards: a compilation for each, and no failure.
    assert 1e-6 < difference(model(ids).logits, expected) < 0.3
    assert shared(without_inductor) == 1 + LAYERS
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)  # a decoding step stays dense, which nobody needs to be told
        model.generate(ids, max_new_tokens=3, do_sample=False)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_what_layers_share():
    model, ids = llama(3), tokens()
    expected = model(ids, use_cache=False).logits
    for layer in model.model.layers:
        layer.compile(backend="afbs", fullgraph=True, options=OPTIONS)
    for length in (LENGTH, LENGTH, LENGTH + 64):
        longer = tokens(length)
        assert model(longer, use_cache=False).logits.isfinite().all()
    assert 1e-6 < difference(model(ids, use_cache=False).logits, expected) < 0.3
    explanation = afbs_compile.explain(model)
    assert {row.site: row.outcome for row in explanation.rows} == dict.fromkeys(NAMES[:3], "sparse")
    assert len(explanation.after) <= 2


@torch.no_grad()
def test_every_call_under_dispatch_hooks_is_found(without_inductor):
    accelerate = pytest.importorskip("accelerate", reason="accelerate, whose hooks these are, is not installed")
    model, ids = llama(), tokens()
    expected = model(ids).logits
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys((*rest, *(f"model.layers.{i}" for i in range(LAYERS))), "cpu")
    model = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    model.compile(backend="afbs", options=OPTIONS)
    assert 1e-6 < difference(model(ids).logits, expected) < 0.3
    rows = afbs_compile.explain(model).rows
    assert {row.site: row.outcome for row in rows} == dict.fromkeys(NAMES, "sparse")
    assert len({row.error for row in rows}) > 1, "each call has thresholds of its own"


def qwen2_vl():
    from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl

    config = configuration_qwen2_vl.Qwen2VLVisionConfig(
        depth=LAYERS, embed_dim=64, hidden_size=64, num_heads=4, mlp_ratio=2
    )
    return modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config), config


def glm4v():
    from transformers.models.glm4v import configuration_glm4v, modeling_glm4v

    config = configuration_glm4v.Glm4vVisionConfig(
        depth=LAYERS, hidden_size=64, num_heads=4, intermediate_size=96, out_hidden_size=64, image_size=448
    )
    return modeling_glm4v.Glm4vVisionModel(config), config


@torch.no_grad()
@pytest.mark.parametrize("tower", [qwen2_vl, glm4v])
def test_every_call_of_a_tower_that_breaks_in_every_block_is_found(tower, without_inductor):
    pytest.importorskip("transformers")
    model, config = tower()
    pixels = torch.randn(1024, 3 * config.temporal_patch_size * config.patch_size**2)
    compiled = torch.compile(model.eval(), backend="afbs", options={"min_length": 128, "first_call": "dense"})
    with pytest.warns(AfbsWarning, match=r"no attention call of blocks\.0\.attn is sparse: 1 x not calibrated") as told:
        compiled(pixels, grid_thw=torch.tensor([[1, 32, 32]]))
    assert len([one for one in told if issubclass(one.category, AfbsWarning)]) == 1
    assert [row.site for row in afbs_compile.explain(compiled).rows] == [f"blocks.{i}.attn" for i in range(LAYERS)]
    assert shared(without_inductor) == 1


@pytest.mark.slow
@torch.no_grad()
def test_repeated_blocks_of_a_diffusion_transformer(without_inductor):
    diffusers = pytest.importorskip("diffusers")
    from tests.integrations.diffusers_models import output, sharpened, wan_inputs

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=LAYERS,
        rope_max_seq_len=32,
    )
    model = sharpened(model.eval())
    inputs = wan_inputs(0)
    expected = output(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="afbs", options=OPTIONS)
    found = output(model, inputs)
    assert 1e-6 < difference(found, expected) < 0.3
    rows = {row.site: row.outcome for row in afbs_compile.explain(model).rows}
    assert all(rows[f"blocks.{i}.attn1"] == "sparse" for i in range(LAYERS))
    assert shared(without_inductor) == 1
