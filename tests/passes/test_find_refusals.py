"""Every kind of refusal, by the first words of its sentence."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from afbs_compile.passes.find import find

sdpa = F.scaled_dot_product_attention


def x(*shape, dtype=torch.float32):
    return torch.randn(shape or (2, 4, 24, 16)).to(dtype)


REFUSED = {
    "dropout in effect": (lambda q: sdpa(q, q, q, dropout_p=0.1), [x()]),
    "decoding": (lambda q, k: sdpa(q, k, k), [x(2, 4, 1, 16), x()]),
    "unsupported head_dim": (lambda q: sdpa(q, q, q), [x(1, 1, 24, 520)]),
    "unsupported dtype": (lambda q: sdpa(q, q, q), [x(dtype=torch.float64)]),
    "unsupported shape": (lambda q, k: sdpa(q, k, k), [x(), x(1, 4, 24, 16)]),
    "unsupported layout": (lambda q: torch.vmap(lambda y: sdpa(y, y, y))(q), [x()]),
    "flex_attention": (lambda q: flex_attention(q, q, q), [x()]),
    "inside a higher-order operator": (lambda q: checkpoint(lambda y: sdpa(y, y, y), q, use_reentrant=False), [x()]),
}


@pytest.mark.parametrize(("kind", "case"), REFUSED.items(), ids=REFUSED.keys())
def test_kind(look, kind, case):
    call, args = case
    assert look(call, *args).reason.startswith(kind)


MORE = {
    "head_dim of v": ("unsupported head_dim", lambda q, v: sdpa(q, q, v), [x(1, 1, 24, 16), x(1, 1, 24, 520)]),
    "head_dim of v, 5-D": ("unsupported head_dim", lambda q, v: sdpa(q, q, v), [x(1, 1, 1, 24, 8), x(1, 1, 1, 24, 16)]),
    "six dimensions": ("unsupported shape", lambda q: sdpa(q, q, q), [x(1, 1, 1, 2, 24, 16)]),
    "other ranks": ("unsupported shape", lambda q, k: sdpa(q, k, k), [x(), x(4, 24, 16)]),
    "other batch, 3-D": ("unsupported shape", lambda q, k: sdpa(q, k, k), [x(4, 24, 16), x(1, 24, 16)]),
    "broadcast v": ("unsupported shape", lambda q, v: sdpa(q, q, v), [x(), x(2, 1, 24, 16)]),
    "15 query rows": ("decoding: 15 query rows against 24 keys", lambda q, k: sdpa(q, k, k), [x(2, 4, 15, 16), x()]),
    "a mask of another batch": (
        "unsupported mask: shape [3, 4, 24, 24]",
        lambda q, m: sdpa(q, q, q, attn_mask=m),
        [x(2, 3, 4, 24, 16), x(3, 4, 24, 24)],
    ),
}


@pytest.mark.parametrize(("kind", "call", "args"), MORE.values(), ids=MORE.keys())
def test_variant(look, kind, call, args):
    assert look(call, *args).reason.startswith(kind)


def test_gradient(look):
    found = look(lambda q: sdpa(q, q, q), x().requires_grad_(), grad=True)
    assert found.reason.startswith("gradient needed: ")
    assert "torch.no_grad()" in found.reason


def test_no_gradient_where_nothing_requires_it(look):
    assert look(lambda q: sdpa(q, q, q), x(), grad=True).site


def test_too_short(look):
    reason = look(lambda q: sdpa(q, q, q), x(), min_length=25).reason
    assert reason.startswith("too short: 24 tokens")
    assert "25" in reason
    assert look(lambda q: sdpa(q, q, q), x(), min_length=24).site


def test_too_short_is_meant_of_the_work(look):
    """A chunk behind a cache is worth more than its rows alone."""

    def cross(q, k):
        return sdpa(q, k, k)

    chunk, cache = x(), x(2, 4, 54, 16)
    assert look(cross, chunk, cache, min_length=36).site
    reason = look(cross, chunk, cache, min_length=37).reason
    assert reason.startswith("too short: 24 query rows over 54 keys; sparse attention is worth it here from 37 on")


def test_a_dropout_that_is_decided_in_the_graph_is_in_effect(look):
    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = 0.5

        def forward(self, q):
            return sdpa(q, q, q, dropout_p=self.p)

    assert look(Dropping(), x(), dynamic=True).reason.startswith("dropout in effect")


@pytest.mark.parametrize("by", ["attribute", "argument"])
def test_a_plain_zero_is_no_dropout_where_numbers_are_symbols(compile_with, by):
    class Dropping(torch.nn.Module):
        p = 0.0

        def forward(self, q, p=None):
            return sdpa(q, q, q, dropout_p=self.p if p is None else p)

    module, q = Dropping(), x()
    found = compile_with(module, change=True, dynamic=True)

    def run(p):
        module.p = p
        return found.call(q) if by == "attribute" else found.call(q, p)

    with torch.no_grad():
        torch.testing.assert_close(run(0.0), sdpa(q, q, q))
        assert len(found.site.node.graph.nodes) > 0
        assert not torch.equal(run(0.5), run(0.5)), "a graph of its own, which drops"
        assert found.reason == "dropout in effect: dropout_p=0.5; call model.eval() first"
        torch.testing.assert_close(run(0.0), sdpa(q, q, q))
    assert [len(sites) for sites in found.sites] == [1, 0]


def reason_for(call, **values):
    """The refusal of a call that Dynamo cannot capture: its graph is made by hand, with fake values by input name."""
    gm = torch.fx.symbolic_trace(call)
    for node in gm.graph.nodes:
        node.meta["val"] = values.get(str(node.target), values.get("q"))
    _, (refusal,) = find(gm, min_length=1)
    return refusal.reason


def test_heads_that_do_not_divide():
    reason = reason_for(lambda q, k: sdpa(q, k, k, enable_gqa=True), q=x(2, 4, 24, 16), k=x(2, 3, 24, 16))
    assert reason.startswith("unsupported shape: 4 query heads over 3 key heads")


def test_no_heads():
    assert reason_for(lambda q: sdpa(q, q, q), q=x(2, 0, 24, 16)).startswith("unsupported shape: 0 query heads")


def test_a_causal_flag_from_the_graph():
    reason = reason_for(lambda q, flag: sdpa(q, q, q, is_causal=flag), q=x(), flag=True)
    assert reason.startswith("unsupported mask: is_causal is computed")


def test_causal_flag_and_mask_together():
    reason = reason_for(lambda q, mask: sdpa(q, q, q, attn_mask=mask, is_causal=True), q=x(), mask=x(24, 24) > 0)
    assert reason.startswith("unsupported mask: is_causal=True together with attn_mask")


def test_a_graph_without_recorded_shapes():
    assert reason_for(lambda q: sdpa(q, q, q)).startswith("unsupported layout: the graph records no shape")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    nested = torch.nested.nested_tensor([torch.randn(4, 5, 16), torch.randn(4, 7, 16)])
    assert reason_for(lambda q: sdpa(q, q, q), q=nested).startswith("unsupported layout: nested")


def test_operands_on_two_devices():
    reason = reason_for(lambda q, k: sdpa(q, k, k), q=x(), k=x().to("meta"))
    assert reason.startswith("unsupported device: q, k, v are on cpu, meta, meta")


def test_each_call_inside_an_operator_is_named(look):
    class Block(torch.nn.Module):
        def forward(self, q):
            return sdpa(q, q, q)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, q):
            return checkpoint(self.block, self.block(q), use_reentrant=False)

    found = look(Model(), x())
    assert [site.name for site in found.sites[0]] == ["block"]
    (refusal,) = found.refusals[0]
    assert refusal.name == "block#2"
    assert "checkpoint" in refusal.reason
