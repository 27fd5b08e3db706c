import pytest
import torch
import torch.nn.functional as F

from afbs_compile.passes.names import clean_path


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].model.layers.0.self_attn", "model.layers.0.self_attn"),
        ("L['self'].model.layers[0].self_attn", "model.layers.0.self_attn"),
        ("L['self']._modules['model']._modules['layers']._modules['0']", "model.layers.0"),
        ("L['self']._orig_mod.blocks['first']", "blocks.first"),
        ('L["fn"].layers[12]', "layers.12"),
        ("G['model'].encoder.layer.3.attention.self", "encoder.layer.3.attention.self"),
        ("L['self'].block._checkpoint_wrapped_module.attn", "block.attn"),
        ("L['self'].__dict__['base_model'].__dict__['model'].model.layers[0]", "base_model.model.model.layers.0"),
        ("L['self']", ""),
        ("model.layers.0.self_attn", "model.layers.0.self_attn"),
        ("", ""),
    ],
)
def test_paths_of_all_tracers(source, path):
    assert clean_path(source) == path


class Attention(torch.nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Attention(), Attention()])
        self.named = torch.nn.ModuleDict({"a": Attention()})
        self.chain = torch.nn.Sequential(torch.nn.Sequential(Attention()))

    def forward(self, x):
        for block in self.blocks:
            x = block(block(x))
        x = F.scaled_dot_product_attention(x, x, x)
        return self.chain(self.named["a"](x))


EXPECTED = ["blocks.0", "blocks.0#2", "blocks.1", "blocks.1#2", "attention", "named.a", "chain.0.0"]


def test_names_in_a_model(look):
    assert [site.name for site in look(Model(), torch.randn(1, 1, 16, 16)).sites[0]] == EXPECTED


def test_a_model_that_a_function_calls(look):
    model = Model()
    assert [site.name for site in look(lambda x: model(x), torch.randn(1, 1, 16, 16)).sites[0]] == EXPECTED


def test_refused_calls_take_part_in_the_count(look):
    """A recipe finds its sites by name: a call keeps its name whether the one before it was accepted or not."""

    def fn(x):
        refused = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        return F.scaled_dot_product_attention(refused, x, x)

    found = look(fn, torch.randn(1, 1, 16, 16))
    assert [refusal.name for refusal in found.refusals[0]] == ["attention"]
    assert [site.name for site in found.sites[0]] == ["attention#2"]
