"""torch.nn's attention modules, whose calls Dynamo records as one function."""

import pytest
import torch
import torch.nn.functional as F

from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.passes.expand import expand


@pytest.fixture
def x():
    return torch.randn(2, 24, 64)


def attention(**options):
    return torch.nn.MultiheadAttention(64, 4, batch_first=True, **options).eval()


def check_same(compile_with, fn, *args, **options):
    found = compile_with(fn, change=True, **options)
    with torch.no_grad():
        torch.testing.assert_close(found.call(*args), fn(*args))
    return found


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_multihead_attention(compile_with, x, need_weights, dynamic):
    module = attention()
    found = check_same(compile_with, lambda x: module(x, x, x, need_weights=need_weights)[0], x, dynamic=dynamic)
    assert (found.site.heads, found.site.head_dim, found.site.mask) == (4, 16, Full())


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 32, "vdim": 32}], ids=["no bias", "other key size"])
def test_variants_of_the_module(compile_with, x, options):
    module = attention(**options)
    memory = torch.randn(2, 24, options.get("kdim", 64))
    assert check_same(compile_with, lambda x, m: module(x, m, m)[0], x, memory).site.k_len == 24


def test_causal_by_a_mask(compile_with, x):
    module = attention()

    def fn(x):
        mask = torch.ones(24, 24, dtype=torch.bool).triu(1)
        return module(x, x, x, attn_mask=mask)[0]

    assert check_same(compile_with, fn, x).site.mask == Causal()


def test_a_wrong_causal_hint_is_not_believed_where_pytorch_does_not(same, x):
    """With need_weights=True PyTorch applies the mask and ignores the hint."""
    module = attention()

    def fn(x):
        mask = torch.zeros(24, 24, dtype=torch.bool)
        return module(x, x, x, attn_mask=mask, is_causal=True)[0]

    site = same(fn, x).site
    assert (site.mask, site.attn_mask) == (Full(), None)  # PyTorch turns the boolean mask into floating zeros


def test_used_weights_keep_the_call_closed(compile_with, x):
    module = attention()
    found = check_same(compile_with, lambda x: module(x, x, x), x)
    assert found.reason.startswith("fused operator: multi_head_attention_forward")
    assert "need_weights=False" in found.reason


def test_a_call_that_needs_a_gradient_stays_closed(look, x):
    module = attention()
    assert look(lambda x: module(x, x, x)[0], x, grad=True).reason.startswith("gradient needed")


def test_dropout_is_seen(look, x):
    module = attention(dropout=0.5).train()
    assert look(lambda x: module(x, x, x)[0], x).reason.startswith("dropout in effect")
    assert look(lambda x: module.eval()(x, x, x)[0], x).site


def test_autocast_keeps_the_call_closed(look, x):
    module = attention()

    def fn(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x, x, x)[0]

    assert look(fn, x).reason.startswith("fused operator")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer(compile_with, x, norm_first, activation):
    layer = torch.nn.TransformerEncoderLayer(64, 4, 96, activation=activation, norm_first=norm_first, batch_first=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    found = check_same(compile_with, encoder, x)
    assert [site.name for site in found.sites[0]] == ["layers.0", "layers.1"]


def test_encoder_layer_with_a_mask_stays_closed(look, x):
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 1).eval()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(24)
    reason = look(encoder, x, mask, kwargs={"is_causal": True}).reason
    assert reason.startswith("fused operator: _transformer_encoder_layer_fwd")
    assert "set_fastpath_enabled(False)" in reason


def test_the_advice_for_a_masked_encoder_layer_works(compile_with, x):
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 1).eval()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(24)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        found = check_same(compile_with, lambda x: encoder(x, mask, is_causal=True), x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert found.site.mask == Causal()


def test_nothing_to_open_changes_nothing():
    gm = torch.fx.symbolic_trace(lambda x: F.relu(x))
    code = gm.code
    assert expand(gm) == 0
    assert gm.code == code
