"""``attn_implementation="afbs"``: every mask of transformers, generation, recipes, and what stays dense."""

from __future__ import annotations

import copy
import gc
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import afbs_compile
from afbs_compile.errors import AfbsWarning, CalibrationError, OptionError, RecipeError
from afbs_compile.integrations.served import ServedModel, served_model
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.monitor.rows import RowErrors
from afbs_compile.revalidate import checked
from tests.toy import without_a_clock

transformers = pytest.importorskip("transformers")


import afbs_compile.integrations.transformers as afbs  # noqa: E402

LENGTH = 96
ASKED: dict[str, Any] = {"min_length": 128, "tolerance": 0.5}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def llama(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **more})).eval()


def made(name: str, **more: Any) -> Any:
    """A tiny model of an architecture."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def ids(batch: int = 1, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str, batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    count = length // 3
    if side == "left":
        mask[1, :count] = 0
    elif side == "right":
        mask[1, -count:] = 0
    return mask


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    afbs.register()
    without_a_clock(monkeypatch)


@pytest.fixture
def every_block(monkeypatch: pytest.MonkeyPatch) -> list[Operands]:
    """Every long call runs on the sparse engine with all blocks kept; the operands that came."""
    came: list[Operands] = []

    def keep_all(self: ServedModel, name: str, operands: Operands) -> SparseCall:
        came.append(operands)
        return SparseCall.uniform(operands.heads, 0.9999999, shape=BlockShape(32, 16))

    monkeypatch.setattr(ServedModel, "_call", keep_all)
    return came


def both(model: Any, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states or logits under the model's own implementation and under ours."""
    own = copy.deepcopy(model)
    afbs.use(model, min_length=32)
    with torch.no_grad():
        return own(**inputs)[0], model(**inputs)[0]


MODELS: dict[str, Any] = {
    "llama": lambda: llama(),
    "mistral": lambda: made("Mistral", sliding_window=24),
    "qwen2, mixed windows": lambda: made("Qwen2", use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "gemma2, softcap": lambda: made("Gemma2", sliding_window=24, query_pre_attn_scalar=16, attn_logit_softcapping=5.0),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, sliding_window=24, query_pre_attn_scalar=16)
    ).eval(),
    "gpt-oss, sinks": lambda: made("GptOss", sliding_window=24, num_local_experts=2, num_experts_per_tok=1),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=512)
    ).eval(),
}


@pytest.mark.parametrize("side", ["none", "all", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_every_mask_gives_what_the_model_itself_gives(name, side, every_block):
    mask = None if side == "none" else padding(side)
    expected, found = both(MODELS[name](), input_ids=ids(2), attention_mask=mask)
    assert len(every_block) == 2
    if side == "none" or side == "all":
        assert all(operands.valid is None and operands.attn_mask is None for operands in every_block)
    else:
        assert all(operands.attn_mask is None and operands.valid is not None for operands in every_block)
    rows = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(found[rows], expected[rows], rtol=1e-4, atol=1e-4)


def test_masks_reach_the_engine_as_formulas(every_block):
    for name, kinds in (
        ("llama", ["causal", "causal"]),
        ("mistral", ["window(24)", "window(24)"]),
        ("gemma3", ["window(24)", "window(24)"]),
        ("gpt-oss, sinks", ["window(24)", "causal"]),
    ):
        every_block.clear()
        both(MODELS[name](), input_ids=ids())
        assert [str(operands.mask).replace("_end", "") for operands in every_block] == kinds


def test_chunks_of_llama_4(every_block):
    config = transformers.Llama4TextConfig(
        **SIZES, attention_chunk_size=32, intermediate_size_mlp=96, num_local_experts=1, no_rope_layers=[1, 0]
    )
    torch.manual_seed(0)
    expected, found = both(transformers.Llama4ForCausalLM(config).eval(), input_ids=ids())
    assert "chunk(32)" in {str(operands.mask) for operands in every_block}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_packed_sequences_are_kept_apart(every_block):
    positions = torch.cat([torch.arange(40), torch.arange(LENGTH - 40)])[None]
    expected, found = both(llama(), input_ids=ids(), position_ids=positions, use_cache=False)
    assert all(operands.attn_mask is not None for operands in every_block)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_asks_whether_there_is_a_mask_stays_causal(every_block):
    torch.manual_seed(0)
    config = transformers.MoonshineConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
        encoder_num_attention_heads=4, decoder_num_attention_heads=4,
    )  # fmt: skip
    sound = {"input_values": torch.randn(1, 40_000), "decoder_input_ids": ids(1, 64)}
    model = transformers.MoonshineModel(config).eval()
    expected, found = both(copy.deepcopy(model), **sound)
    assert "causal_end" in {str(operands.mask) for operands in every_block}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    afbs.use(model, min_length=32, first_call="dense")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServedModel, "_call", lambda *_: None)
        torch.testing.assert_close(model(**sound)[0], expected, rtol=1e-5, atol=1e-5)


def test_encoders_and_cross_attention(every_block):
    torch.manual_seed(0)
    bart = transformers.BartModel(
        transformers.BartConfig(
            vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=512,
        )
    ).eval()  # fmt: skip
    expected, found = both(
        bart, input_ids=ids(2), attention_mask=padding("right"), decoder_input_ids=ids(2, 64, seed=1)
    )
    assert sorted((operands.q_len, operands.k_len) for operands in every_block) == [(64, 64), (64, 96), (96, 96)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=80,
            patch_size=8,
        )
    ).eval()  # fmt: skip
    expected, found = both(vit, pixel_values=torch.randn(1, 3, 80, 80))
    assert str(every_block[-1].mask) == "full"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 48},
        {"num_beams": 3},
        {"cache_implementation": "quantized_is_absent"},
    ],
    ids=["dynamic", "static", "chunks", "beams", "assisted"],
)
@pytest.mark.parametrize("side", ["all", "left"])
def test_generate_gives_the_same_tokens(settings, side, every_block):
    model = llama()
    own = copy.deepcopy(model)
    afbs.use(model, min_length=32)
    settings = dict(settings)
    batch = 2
    if "absent" in settings.get("cache_implementation", ""):  # assisted decoding takes one prompt
        settings, batch = {"assistant_model": llama(seed=1)}, 1
    given = {"max_new_tokens": 12, "do_sample": False, "attention_mask": padding(side)[-batch:], **settings}
    expected, found = own.generate(ids(2)[-batch:], **given), model.generate(ids(2)[-batch:], **given)
    assert torch.equal(found, expected)
    assert every_block, "the prefill went through"
    assert all(operands.q_len >= 16 for operands in every_block), "no decode step did"
    assert all(operands.attn_mask is None for operands in every_block), "and none with a dense mask"


def test_a_pipeline_runs(every_block, tmp_path):
    model = afbs.use(llama(), min_length=32)
    tokenizer = word_tokenizer()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = " ".join(f"w{i % 50}" for i in range(80))
    (out,) = pipe(text, max_new_tokens=4, do_sample=False, return_full_text=False)
    assert out["generated_text"]
    assert every_block


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(60)}}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def sharp(seed: int = 0) -> Any:
    """A model whose heads attend to few keys, so that there is something to skip."""
    model = llama(seed, max_position_embeddings=2048)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)
    return model


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls whose thresholds were checked."""
    done: list[str] = []

    def counted(row: Any, *arguments: Any) -> Any:
        done.append(row.name)
        return checked(row, *arguments)

    monkeypatch.setattr("afbs_compile.integrations.served.checked", counted)
    return done


class TestRecipes:
    @torch.no_grad()
    def test_the_first_long_call_calibrates_and_says_so(self, caplog):
        model = afbs.use(sharp(), **ASKED)
        caplog.set_level(logging.INFO, "afbs_compile")
        model(ids(length=32))
        assert not served_model(model).rows, "a short call decides nothing"
        first = model(ids(length=512)).logits
        rows = served_model(model).rows
        assert [row.name for row in rows] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        assert {row.outcome for row in rows} == {"sparse"}
        assert "calibrating model.layers.0.self_attn" in caplog.text
        caplog.clear()
        assert torch.equal(model(ids(length=512)).logits, model(ids(length=512)).logits)
        assert first.isfinite().all()
        assert caplog.text == ""

    @torch.no_grad()
    def test_a_second_process_takes_the_recipe_from_the_cache(self, monkeypatch):
        afbs.use(sharp(), **ASKED)(ids(length=512))
        again = afbs.use(sharp(), **ASKED)
        monkeypatch.setattr("afbs_compile.integrations.served.tune_site", lambda *_, **__: pytest.fail("calibrated"))
        again(ids(length=512))
        assert {row.outcome for row in served_model(again).rows} == {"sparse"}

    @torch.no_grad()
    def test_one_recipe_serves_both_ways(self, monkeypatch, fresh_dynamo):
        model = sharp()
        recipe = afbs_compile.calibrate(model, [{"input_ids": ids(length=512)}], **ASKED)
        monkeypatch.setattr("afbs_compile.integrations.served.tune_site", lambda *_, **__: pytest.fail("calibrated"))
        options = {"recipe": recipe, "min_length": 128}
        compiled = torch.compile(sharp(), backend="afbs", options=options)(ids(length=512)).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error", AfbsWarning)
            eager = afbs.use(model, **options)(ids(length=512)).logits
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-3)
        assert [row.outcome for row in served_model(model).rows] == [site.outcome for site in recipe.sites]

    @torch.no_grad()
    def test_a_recipe_made_here_serves_torch_compile(self, fresh_dynamo):
        model = afbs.use(sharp(), **ASKED)
        eager = model(ids(length=512)).logits
        recipe = served_model(model).recipe
        compiled = torch.compile(sharp(), backend="afbs", options={"recipe": recipe, "min_length": 128})
        torch.testing.assert_close(compiled(ids(length=512)).logits, eager, rtol=1e-3, atol=1e-3)
        assert {row.outcome for row in afbs_compile.explain(compiled).rows} == {"sparse"}

    @torch.no_grad()
    def test_calibrate_takes_a_model_that_is_switched_already(self):
        model = afbs.use(sharp(), first_call="dense")
        recipe = afbs_compile.calibrate(model, [{"input_ids": ids(length=512)}], **ASKED)
        assert [site.outcome for site in recipe.sites] == ["sparse", "sparse"]

    @torch.no_grad()
    def test_options_may_stand_in_the_config(self, tmp_path):
        recipe = afbs_compile.calibrate(sharp(), [{"input_ids": ids(length=512)}], **ASKED)
        recipe.save(tmp_path / "recipe.json")
        model = sharp()
        model.config.afbs = {"recipe": str(tmp_path / "recipe.json"), "min_length": 128}
        model.save_pretrained(tmp_path / "model")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", attn_implementation="afbs"
        ).eval()
        loaded(ids(length=512))
        assert {row.outcome for row in served_model(loaded).rows} == {"sparse"}

    @torch.no_grad()
    def test_another_form_of_the_model_is_checked_call_by_call(self, checks):
        recipe = afbs_compile.calibrate(sharp(), [{"input_ids": ids(length=512)}], **ASKED)
        model = sharp().bfloat16()
        with pytest.warns(AfbsWarning, match="its weights were float32, here bfloat16"):
            afbs.use(model, recipe=recipe, min_length=128)
        model(ids(length=512))
        assert {row.outcome for row in served_model(model).rows} == {"sparse"}
        assert len(checks) == 2

    @torch.no_grad()
    def test_weights_that_change_are_noticed_once(self):
        model = afbs.use(sharp(), **ASKED)
        model(ids(length=512))
        with warnings.catch_warnings():
            warnings.simplefilter("error", AfbsWarning)
            model.load_state_dict(sharp().state_dict())  # the same values once more
            model(ids(length=512))
        for site in served_model(model)._sites.values():
            site.row = replace(site.row, heads=tuple(replace(head, error=1e-6) for head in site.row.heads))
        served_model(model).recipe = replace(served_model(model).recipe, options={"tolerance": 1e-6, "method": "afbs"})
        model.load_state_dict(llama(max_position_embeddings=2048).state_dict())
        with pytest.warns(AfbsWarning, match="the weights changed"):
            found = model(ids(length=512)).logits
        assert {row.outcome for row in served_model(model).rows} == {"dense"}
        expected = llama(max_position_embeddings=2048)(ids(length=512)).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with warnings.catch_warnings():
            warnings.simplefilter("error", AfbsWarning)
            model(ids(length=512))

    @torch.no_grad()
    def test_weights_that_change_before_the_first_call_are_noticed_too(self, checks):
        recipe = afbs_compile.calibrate(sharp(), [{"input_ids": ids(length=512)}], **ASKED)
        model = afbs.use(sharp(), recipe=recipe, min_length=128)
        model.model.layers[1].self_attn.o_proj.weight.mul_(1.001)
        with pytest.warns(AfbsWarning, match="the weights changed"):
            model(ids(length=512))
        assert len(checks) == 2

    @torch.no_grad()
    def test_what_is_wrong_is_said(self, tmp_path):
        recipe = afbs_compile.calibrate(sharp(), [{"input_ids": ids(length=512)}], **ASKED)
        with pytest.raises(RecipeError, match="the recipe given belongs to another model: other weights"):
            afbs.use(sharp(seed=5), recipe=recipe)
        with pytest.raises(OptionError, match="unknown option 'tolerence'"):
            afbs.use(llama(), tolerence=0.1)
        model = llama()
        model.config.afbs = {"recipe": str(tmp_path / "absent.json")}
        model.set_attn_implementation("afbs")
        with pytest.warns(AfbsWarning, match="attention stays dense: recipe .*absent.json cannot be read"):
            model(ids(length=64))


def test_weights_that_are_elsewhere_share_no_cache(tmp_path):
    from afbs_compile.options import Options

    def made(tensor: torch.Tensor) -> ServedModel:
        return ServedModel(lambda: [("weight", tensor)], lambda: ["layer"], Options.parse())

    assert made(torch.empty(3, 4, device="meta"))._path is None
    assert made(torch.randn(3, 4))._path is not None


class TestWhatStaysDense:
    def test_training_and_gradients(self, every_block):
        model, own = llama(), llama()
        afbs.use(model, min_length=32)
        for each in (model, own):
            each(ids(), labels=ids()).loss.backward()
        assert not every_block
        expected = own.model.layers[0].self_attn.q_proj.weight.grad
        assert torch.equal(model.model.layers[0].self_attn.q_proj.weight.grad, expected)

    @torch.no_grad()
    def test_no_recipe_and_first_call_dense(self):
        model, own = llama(), llama()
        afbs.use(model, min_length=32, first_call="dense")
        assert torch.equal(model(ids()).logits, own(ids()).logits)
        assert all("first_call is 'dense'" in row.reason for row in served_model(model).rows)

    @torch.no_grad()
    def test_a_budget_needs_samples(self):
        model = afbs.use(sharp(), min_length=128, tolerance={"kl": 0.01})
        model(ids(length=512))
        assert all("needs afbs_compile.calibrate" in row.reason for row in served_model(model).rows)

    @torch.no_grad()
    def test_a_calibration_that_fails(self, monkeypatch):
        def out_of_memory(*_: object, **__: object) -> None:
            raise RuntimeError("out of memory\nat length")

        monkeypatch.setattr("afbs_compile.integrations.served.tune_site", out_of_memory)
        model = afbs.use(llama(), min_length=32)
        torch.testing.assert_close(model(ids()).logits, llama()(ids()).logits)
        assert {row.reason for row in served_model(model).rows} == {"calibration failed: out of memory"}

    @torch.no_grad()
    def test_a_model_in_float64(self, every_block):
        model = llama().double()
        afbs.use(model, min_length=32)
        torch.testing.assert_close(model(ids()).logits, llama().double()(ids()).logits)
        assert not every_block
        assert "float64" in served_model(model).rows[0].reason


@torch.no_grad()
def test_no_later_token_reaches_an_earlier_row(every_block):
    model = afbs.use(made("Mistral", sliding_window=24), min_length=32)
    one, other = ids(), ids()
    other[0, 70:] = (other[0, 70:] + 7) % 63 + 1
    torch.testing.assert_close(model(one).logits[:, :64], model(other).logits[:, :64], rtol=0, atol=0)


@torch.no_grad()
def test_code_that_takes_the_mask_apart_gets_the_dense_one():
    from afbs_compile.integrations.transformers.masks import Seen, mask_interface

    seen = mask_interface(
        batch_size=2, q_length=20, kv_length=20, q_offset=0, kv_offset=0,
        mask_function=transformers.masking_utils.causal_mask_function, attention_mask=padding("left", length=20).bool(),
        device="cpu",
    )  # fmt: skip
    assert isinstance(seen, Seen)
    dense = transformers.masking_utils.sdpa_mask(
        batch_size=2, q_length=20, kv_length=20, attention_mask=padding("left", length=20).bool(), device="cpu"
    )
    assert seen.shape == (2, 1, 20, 20)
    assert torch.equal(seen[:, :, :, :7], dense[:, :, :, :7])
    assert torch.equal(torch.where(seen, 1.0, 0.0), dense.float())
    assert math.prod(seen.shape) == seen.numel()


@torch.no_grad()
def test_models_are_let_go_of(every_block):
    def alive() -> Iterator[nn.Module]:
        return (o for o in gc.get_objects() if type(o) is transformers.LlamaForCausalLM)

    gc.collect()
    before = len(list(alive()))
    model = afbs.use(llama(), min_length=32)
    model(ids())
    del model
    every_block.clear()
    gc.collect()
    assert len(list(alive())) == before


class TestMonitor:
    """A served model that is watched."""

    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every look finds every head far off."""

        def far_off(operands: Operands, out: torch.Tensor, *_: Any) -> RowErrors:
            return RowErrors(torch.ones(operands.heads), torch.zeros(operands.heads))

        monkeypatch.setattr("afbs_compile.monitor.monitor.row_errors", far_off)

    @torch.no_grad()
    def test_inputs_like_the_first_raise_no_alarm_and_change_nothing(self):
        plain = afbs.use(sharp(), **ASKED)(ids(length=512)).logits
        model = afbs.use(sharp(), **ASKED, monitor={"share": 1.0})
        for seed in range(20):
            model(ids(length=512, seed=seed))
        (monitor,) = afbs_compile.monitors(model)
        assert monitor.alarms == ()
        assert {row["calls"] for row in monitor.to_records()} == {20}
        assert "monitor: 20 looks at a head" in str(afbs_compile.explain(model))
        assert torch.equal(model(ids(length=512)).logits, plain)

    @torch.no_grad()
    @pytest.mark.usefixtures("broken")
    def test_alarmed_heads_are_dense_and_the_next_inputs_calibrate_them_again(self, tmp_path, monkeypatch):
        monkeypatch.setenv("AFBS_CACHE_DIR", str(tmp_path))
        model = afbs.use(sharp(), **ASKED, monitor={"share": 1.0, "look_every": 1})
        x = ids(length=512)
        with pytest.warns(AfbsWarning, match="afbs monitor: .*dense from now on"):
            [model(x) for _ in range(10)]
        (monitor,) = afbs_compile.monitors(model)
        assert any(row["dense"] for row in monitor.to_records())
        own = copy.deepcopy(model)
        own.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(x).logits, own(x).logits, rtol=1e-3, atol=1e-3)
        (cached,) = tmp_path.glob("*.json")
        before = cached.read_bytes()
        assert monitor.recalibrate() is None
        model(x)
        recipe = served_model(model).recipe
        assert [site.outcome for site in recipe.sites] == ["sparse", "sparse"]
        assert recipe.history[0].heads
        assert afbs_compile.Recipe.load(cached.with_name(f"{cached.stem}.1.json")) == recipe
        assert cached.read_bytes() == before
        assert not any(row["dense"] for row in monitor.to_records())

    @torch.no_grad()
    @pytest.mark.usefixtures("broken")
    def test_by_itself_where_that_is_asked_for(self):
        model = afbs.use(sharp(), **ASKED, monitor={"share": 1.0, "look_every": 1, "recalibrate": "automatically"})
        with pytest.warns(AfbsWarning, match="afbs monitor"):
            [model(ids(length=512)) for _ in range(10)]
        assert served_model(model).recipe.history

    @torch.no_grad()
    @pytest.mark.usefixtures("broken")
    def test_a_budget_cannot_be_spent_again_here(self, fresh_dynamo):
        recipe = afbs_compile.calibrate(
            sharp(), [{"input_ids": ids(length=512)}], min_length=128, tolerance={"kl": 0.5}
        )
        model = afbs.use(sharp(), recipe=recipe, min_length=128, monitor={"share": 1.0, "look_every": 1})
        with pytest.warns(AfbsWarning, match="afbs monitor"):
            [model(ids(length=512)) for _ in range(20)]
        with pytest.raises(CalibrationError, match="monitor: the recipe has a budget on the output, which is not seen"):
            afbs_compile.monitors(model)[0].recalibrate()
