"""Every way to write an attention call that is accepted."""

import pytest
import torch
import torch.nn.functional as F

from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.passes.find import find
from afbs_compile.passes.site import canonical

sdpa = F.scaled_dot_product_attention
aten = torch.ops.aten.scaled_dot_product_attention

SPELLINGS = {
    "F": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "torch._C._nn": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, is_causal=True),
    "aten packet": lambda q, k, v: aten(q, k, v, is_causal=True),
    "aten overload": lambda q, k, v: aten.default(q, k, v, None, 0.0, True),
    "all positional": lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
    "all by name": lambda q, k, v: sdpa(value=v, is_causal=True, key=k, dropout_p=0, attn_mask=None, query=q),
    "some by name": lambda q, k, v: sdpa(q, k, v, None, is_causal=True, scale=None, enable_gqa=False),
}


@pytest.mark.parametrize("call", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spelling_is_found(look, qkv, call):
    site = look(call, *qkv).site
    assert (site.batch, site.heads, site.kv_heads, site.q_len, site.k_len, site.head_dim, site.rank) == (
        2,
        4,
        4,
        24,
        24,
        16,
        4,
    )
    assert site.mask == Causal()
    assert site.scale == 0.25
    assert (site.dtype, site.device) == (torch.float32, torch.device("cpu"))
    assert [node.op for node in (site.q, site.k, site.v)] == ["placeholder"] * 3
    assert [node.target for node in (site.q, site.k, site.v)] == ["L_q_", "L_k_", "L_v_"]


def test_full_attention_is_found_as_not_causal(look, qkv):
    assert look(lambda q, k, v: sdpa(q, k, v), *qkv).site.mask == Full()


@pytest.mark.parametrize(
    ("shape", "batch", "heads"), [((24, 16), 1, 1), ((3, 24, 16), 3, 1), ((2, 3, 4, 24, 16), 6, 4)]
)
def test_other_ranks_have_a_canonical_form(look, shape, batch, heads):
    x = torch.randn(shape)
    site = look(lambda x: sdpa(x, x, x), x).site
    assert (site.batch, site.heads, site.q_len, site.k_len, site.rank) == (batch, heads, 24, 24, len(shape))
    assert canonical(x, site.rank).shape == (batch, heads, 24, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype(look, dtype):
    assert look(lambda x: sdpa(x, x, x), torch.randn(1, 2, 16, 16, dtype=dtype)).site.dtype == dtype


def test_strides_do_not_matter(look):
    x = torch.randn(2, 24, 4, 16)
    assert look(lambda x: sdpa(*(x.transpose(1, 2),) * 3), x).site.heads == 4


def test_scale(look, qkv):
    assert look(lambda q, k, v: sdpa(q, k, v, scale=2), *qkv).site.scale == 2.0


def test_scale_that_the_graph_computes_stays_a_node(look, qkv):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 0.3

        def forward(self, q, k, v):
            return sdpa(q, k, v, scale=self.scale)

    assert isinstance(look(Scaled(), *qkv, dynamic=True).site.scale, torch.fx.Node)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(look, qkv, kv_heads):
    q, k, v = qkv
    site = look(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), q, k[:, :kv_heads], v[:, :kv_heads]).site
    assert (site.heads, site.kv_heads) == (4, kv_heads)


def test_one_key_head_is_broadcast_without_the_flag(look, qkv):
    q, k, v = qkv
    assert look(lambda q, k, v: sdpa(q, k, v), q, k[:, :1], v[:, :1]).site.kv_heads == 1


def test_a_graph_without_attention_has_neither_sites_nor_refusals(look):
    found = look(lambda x: x.relu(), torch.randn(4))
    assert (found.sites, found.refusals) == ([[]], [[]])


def test_calls_come_in_graph_order_with_names_of_their_own(look, qkv):
    found = look(lambda q, k, v: sdpa(sdpa(q, k, v), sdpa(k, v, q), v), *qkv)
    assert [site.name for site in found.sites[0]] == ["attention", "attention#2", "attention#3"]


def test_find_leaves_the_graph_alone(look, qkv):
    def fn(q, k, v):
        mask = torch.ones(24, 24, dtype=torch.bool).tril()
        return sdpa(q, k.repeat_interleave(1, 1), v, attn_mask=mask)

    found = look(fn, *qkv)
    (gm,) = found.graphs
    before = gm.print_readable(print_output=False)
    find(gm, min_length=1)
    assert gm.print_readable(print_output=False) == before


class Attention(torch.nn.Module):
    def forward(self, x):
        return sdpa(x, x, x, is_causal=True)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_graph(strict):
    model = torch.nn.ModuleDict({"block": Attention()})
    model.forward = lambda x: model["block"](x)
    exported = torch.export.export(model, (torch.randn(2, 4, 24, 16),), strict=strict)
    for gm in (exported.graph_module, exported.module()):
        (site,), refusals = find(gm, min_length=1)
        assert (site.name, site.mask, site.q_len, refusals) == ("block", Causal(), 24, [])


class TestDynamicShapes:
    def test_sizes_stay_symbolic(self, look, qkv):
        site = look(lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv, dynamic=True).site
        assert isinstance(site.q_len, torch.SymInt)
        assert isinstance(site.batch, torch.SymInt)
        assert (site.heads, site.head_dim) == (4, 16)

    def test_one_graph_serves_all_lengths(self, compile_with, qkv):
        found = compile_with(lambda q, k, v: sdpa(q, k, v, is_causal=True), dynamic=True)
        with torch.no_grad():
            found.call(*qkv)
            found.call(*(torch.randn(3, 4, 40, 16) for _ in range(3)))
        assert len(found.graphs) == 1

    def test_a_length_under_the_minimum_is_compiled_for_itself(self, compile_with):
        found = compile_with(lambda x: sdpa(x, x, x), dynamic=True, min_length=30)
        with torch.no_grad():
            for length in (24, 25, 40, 50):
                found.call(torch.randn(2, 4, length, 16))
        assert [len(sites) for sites in found.sites] == [0, 1]
        assert found.refusals[0][0].reason.startswith("too short: 24 tokens")

    @pytest.mark.parametrize("bounds", [{}, {"min": 2, "max": 4096}], ids=["free", "bounded"])
    @pytest.mark.parametrize("min_length", [1, 30, 1000])
    def test_a_length_that_the_user_keeps_free(self, compile_with, bounds, min_length):
        """A guard on a bounded size would fail the compilation; the operator checks the length when it runs."""
        found = compile_with(lambda x: sdpa(x, x, x), dynamic=None, min_length=min_length)
        x = torch.randn(2, 4, 40, 16)
        torch._dynamo.mark_dynamic(x, 2, **bounds)
        found.call(x)
        assert len(found.sites[0]) == (1 if bounds or min_length <= 40 else 0)

    def test_exported_dynamic_length_is_left_to_the_operator(self):
        length = torch.export.Dim("length", min=2, max=4096)
        exported = torch.export.export(Attention(), (torch.randn(2, 4, 24, 16),), dynamic_shapes=({2: length},))
        sites, refusals = find(exported.module(), min_length=1000)
        assert (len(sites), refusals) == (1, [])
