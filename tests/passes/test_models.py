"""What real models produce: tiny, random transformers and torch.nn modules."""

import logging
from itertools import chain

import pytest
import torch

from afbs_compile.kernels.masks.causal import Causal, CausalEnd
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.masks.window import Window

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
logging.getLogger("torch").setLevel(logging.ERROR)

IDS = torch.randint(1, 64, (2, 24))  # 0 is the padding token
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.fixture
def llama():
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **SMALL)
    return transformers.LlamaForCausalLM(config).eval()


def names(calls):
    return [call.name for call in calls]


@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}], ids=["default", "use_cache=False"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_llama(look, llama, kwargs, dynamic):
    found = look(llama, IDS, kwargs=kwargs, dynamic=dynamic, change=True)
    (sites,) = found.sites
    assert names(sites) == LAYERS
    assert found.refusals == [[]]
    assert {(site.mask, site.heads, site.kv_heads, site.head_dim) for site in sites} == {(Causal(), 4, 2, 16)}
    assert "afbs.sparse_attention" in found.rewrites[0].after


@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}], ids=["default", "use_cache=False"])
def test_rewritten_llama_computes_the_same(compile_with, llama, kwargs):
    found = compile_with(llama, change=True)
    with torch.no_grad():
        torch.testing.assert_close(found.call(IDS, **kwargs).logits, llama(IDS, **kwargs).logits)
    assert found.rewrites[0].changed == 2


@pytest.mark.parametrize("padding", [0, 9], ids=["ones", "left-padded"])
def test_llama_with_an_attention_mask_is_causal_over_valid_keys(compile_with, llama, padding):
    found = compile_with(llama, change=True)
    mask = torch.ones_like(IDS)
    mask[1, :padding] = 0
    with torch.no_grad():
        out, expected = (call(IDS, attention_mask=mask).logits for call in (found.call, llama))
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()])
    assert names(found.sites[0]) == LAYERS
    assert {(site.mask, site.valid is None, site.attn_mask) for site in found.sites[0]} == {(Causal(), False, None)}


def test_one_graph_serves_every_length_under_a_mask(compile_with, llama):
    found = compile_with(llama, dynamic=None)
    with torch.no_grad():
        for length in (24, 20, 18, 30):
            ids = torch.randint(1, 64, (2, length))
            found.call(ids, attention_mask=torch.ones_like(ids))
    assert [[site.mask for site in sites] for sites in found.sites] == [[Causal()] * 2] * 2


def test_llama_with_positions_reads_its_mask(compile_with, llama):
    """Packed sequences: the positions of the user decide what attends what."""
    positions = torch.arange(12).repeat(2)[None].expand(2, -1)
    found = compile_with(llama, change=True)
    with torch.no_grad():
        out, expected = (call(IDS, position_ids=positions, use_cache=False).logits for call in (found.call, llama))
    torch.testing.assert_close(out, expected)
    assert {(site.mask, site.attn_mask is None) for site in found.sites[0]} == {(Full(), False)}


def test_llama_in_training_needs_a_gradient(look, llama):
    found = look(llama.train(), IDS, grad=True)
    assert all(refusal.reason.startswith("gradient needed") for refusal in found.refusals[0])


def test_generate_with_a_static_cache(compile_with, llama):
    """Prefill is found; decoding attends a longer cache with one row."""
    found = compile_with(llama.forward)
    expected = llama.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    llama.forward = found.call
    tokens = llama.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, cache_implementation="static")
    assert torch.equal(tokens, expected)
    assert names(found.sites.pop(0)) == LAYERS
    assert found.refusals.pop(0) == []
    (refusals,) = found.refusals
    assert names(refusals) == LAYERS
    assert all(refusal.reason.startswith("decoding: 1 query rows") for refusal in refusals)


def test_a_chunk_against_a_longer_cache(look, llama):
    cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(IDS, past_key_values=cache)
    found = look(llama, IDS, kwargs={"past_key_values": cache})
    assert [(site.mask, site.q_len, site.k_len) for site in found.sites[0]] == [(CausalEnd(), 24, 48)] * 2


def test_a_sliding_window_is_found_where_it_hides_something(look):
    def model(window):
        config = transformers.MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=window, **SMALL)
        return transformers.MistralForCausalLM(config).eval()

    found = look(model(8), IDS)
    assert [site.mask for site in found.sites[0]] == [Window(8)] * 2
    assert [site.mask for site in look(model(100), IDS).sites[0]] == [Causal()] * 2


def test_bert(look):
    model = transformers.BertModel(transformers.BertConfig(vocab_size=64, **SMALL)).eval()
    (sites,) = look(model, IDS).sites
    assert names(sites) == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    assert all(site.mask == Full() for site in sites)


def test_vit(look):
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)).eval()
    (sites,) = look(model, torch.randn(2, 3, 32, 32)).sites
    assert [(site.q_len, site.mask) for site in sites] == [(17, Full())] * 2


def test_t5_has_a_bias_and_two_lengths(same):
    config = transformers.T5Config(vocab_size=64, d_model=64, d_ff=64, d_kv=16, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    found = same(model, IDS, kwargs={"decoder_input_ids": IDS[:, :18], "use_cache": False})
    sites = list(chain(*found.sites))  # torch 2.12 cannot trace how the decoder copies its configuration
    assert [(site.attn_mask is None, site.q_len, site.k_len) for site in sites] == [
        (False, 24, 24),
        (False, 18, 18),
        (True, 18, 24),
    ]


def test_whisper(look):
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, d_model=64, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=32,
        max_target_positions=32, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.WhisperModel(config).eval()
    found = look(model, torch.randn(2, 16, 64), kwargs={"decoder_input_ids": IDS[:, :18]})
    encoder, decoder, cross = chain(*found.sites)
    assert (encoder.name, encoder.mask, decoder.mask) == ("encoder.layers.0.self_attn", Full(), Causal())
    assert decoder.name.removeprefix("decoder.") == "layers.0.self_attn"  # torch 2.12 captures the decoder by itself
    assert cross.name.removeprefix("decoder.") == "layers.0.encoder_attn"
    assert (cross.mask, cross.q_len, cross.k_len) == (Full(), 18, 32)
