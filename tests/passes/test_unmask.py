"""Calls that stay dense say ``is_causal=True`` where their mask is proven to say just that, and only there."""

import pytest
import torch
import torch.nn.functional as F

from afbs_compile.passes.find import find
from afbs_compile.passes.operands import Call, is_sdpa
from afbs_compile.passes.rewrite import rewrite
from afbs_compile.passes.unmask import has_needless_mask, unmask

sdpa = F.scaled_dot_product_attention
INF = float("inf")


def lower_triangle(q):
    rows = torch.arange(q.shape[-2])
    return rows[:, None] >= rows


def additive(q):
    return torch.full((q.shape[-2], q.shape[-2]), -INF).triu(1)


def lowest(q):
    return torch.zeros(q.shape[-2], q.shape[-2]).masked_fill(~lower_triangle(q), torch.finfo(q.dtype).min)


def one_key_more(q, k, v):
    return sdpa(q, k, v, attn_mask=torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(1))


CAUSAL = {
    "bool": lambda q, k, v: sdpa(q, k, v, attn_mask=lower_triangle(q)),
    "four dimensions": lambda q, k, v: sdpa(q, k, v, attn_mask=lower_triangle(q)[None, None].expand(2, 1, 24, 24)),
    "additive": lambda q, k, v: sdpa(q, k, v, attn_mask=additive(q)),
    "lowest number": lambda q, k, v: sdpa(q, k, v, attn_mask=lowest(q)),
    "scale": lambda q, k, v: sdpa(q, k, v, attn_mask=lower_triangle(q), scale=0.7),
    "by position": lambda q, k, v: sdpa(q, k, v, lower_triangle(q), 0.0, False),
    "grouped": lambda q, k, v: sdpa(q, k[:, :2], v[:, :2], attn_mask=lower_triangle(q), enable_gqa=True),
    "three dimensions": lambda q, k, v: sdpa(q[0], k[0], v[0], attn_mask=lower_triangle(q)),
    "strides are read": lambda q, k, v: sdpa(q, k, v, attn_mask=lower_triangle(q)).view(8, -1),
    "mask is read again": lambda q, k, v: sdpa(q, k, v, attn_mask=lower_triangle(q)) * lower_triangle(q).sum(),
}
OTHERS = {
    "no mask": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "all true": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones(24, 24, dtype=torch.bool)),
    "one key more": one_key_more,
    "window": lambda q, k, v: sdpa(q, k, v, attn_mask=lower_triangle(q) & ~lower_triangle(q).tril(-5)),
    "causal up to one key": lambda q, k, v: sdpa(q, k, v, attn_mask=lower_triangle(q) | (torch.arange(24) == 3)),
    "of an input": lambda q, k, v: sdpa(q, k, v, attn_mask=lower_triangle(q) & (v[0, 0, :, 0] < INF)),
    "bias": lambda q, k, v: sdpa(q, k, v, attn_mask=additive(q) + 1),
    # PyTorch's CPU kernels return NaN for is_causal=True with such a scale.
    "negative scale": lambda q, k, v: sdpa(q, k, v, attn_mask=lower_triangle(q), scale=-0.7),
    "no scale": lambda q, k, v: sdpa(q, k, v, attn_mask=lower_triangle(q), scale=0.0),
    "more keys": lambda q, k, v: sdpa(q[:, :, :8], k, v, attn_mask=lower_triangle(q)[:8]),
}  # fmt: skip


def compiled(fn, dynamic=False):
    """Compile with every droppable mask dropped; the list gets each graph and how many its calls lost."""
    graphs = []

    def backend(gm, example_inputs):
        sites, _ = find(gm, min_length=1)
        masked = [site for site in sites if has_needless_mask(site)]
        rewrite(gm, {}, masked)
        graphs.append((gm, len(masked)))
        return gm.forward

    return torch.compile(fn, backend=backend, dynamic=dynamic), graphs


@torch.no_grad()
@pytest.mark.parametrize("fn", CAUSAL.values(), ids=CAUSAL.keys())
def test_a_causal_mask_is_dropped(qkv, fn):
    call, graphs = compiled(fn)
    out, expected = call(*qkv), fn(*qkv)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    ((gm, dropped),) = graphs
    (attention,) = [Call.of(node) for node in gm.graph.nodes if is_sdpa(node)]
    assert (dropped, attention.mask, attention.is_causal) == (1, None, True)


def test_what_made_the_mask_goes_with_its_last_reader(qkv):
    for name, left in (("bool", 0), ("mask is read again", 1)):
        call, graphs = compiled(CAUSAL[name])
        with torch.no_grad():
            call(*qkv)
        ((gm, _),) = graphs
        assert sum("arange" in str(node.target) for node in gm.graph.nodes) == left


@torch.no_grad()
@pytest.mark.parametrize("fn", OTHERS.values(), ids=OTHERS.keys())
def test_another_call_is_untouched(qkv, fn):
    call, graphs = compiled(fn)
    out = call(*qkv)
    assert torch.equal(out, fn(*qkv))
    assert out.isfinite().all()
    ((gm, dropped),) = graphs
    assert dropped == 0
    (attention,) = [Call.of(node) for node in gm.graph.nodes if is_sdpa(node)]
    assert (attention.mask is None) == (fn is OTHERS["no mask"])


def test_the_error_of_a_mask_wider_than_the_queries_stays_one(qkv):
    call, graphs = compiled(lambda q, k, v: sdpa(q[:1], k[:1], v[:1], attn_mask=lower_triangle(q).expand(3, 1, 24, 24)))
    with torch.no_grad(), pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        call(*qkv)
    assert [dropped for _, dropped in graphs] == [0]


@torch.no_grad()
def test_a_length_that_changes_is_proven_again(qkv):
    call, graphs = compiled(CAUSAL["bool"], dynamic=True)
    for length in (24, 20, 17, 24):
        cut = [x[:, :, :length] for x in qkv]
        torch.testing.assert_close(call(*cut), CAUSAL["bool"](*cut))
    assert {dropped for _, dropped in graphs} == {1}

    def causal_when_short(q, k, v):
        future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(22)
        return sdpa(q, k, v, attn_mask=lower_triangle(q) | future)

    call, graphs = compiled(causal_when_short, dynamic=True)
    for length in (20, 24, 17, 23, 22):
        cut = [x[:, :, :length] for x in qkv]
        torch.testing.assert_close(call(*cut), causal_when_short(*cut))
    assert {dropped for _, dropped in graphs} == {0, 1}


@torch.no_grad()
@pytest.mark.parametrize(("name", "dropped"), [("bool", 1), ("additive", 1), ("one key more", 0), ("no mask", 0)])
def test_every_length_of_an_exported_graph(name, dropped):
    fn = {**CAUSAL, **OTHERS}[name]

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return fn(q, k, v)

    q, k, v = (torch.randn(2, 4, 40, 16) for _ in range(3))
    length = torch.export.Dim("length", min=2)
    gm = torch.export.export(Model(), (q, k, v), dynamic_shapes=[{2: length}] * 3, strict=False).module()
    masked = [site for site in find(gm, min_length=1)[0] if has_needless_mask(site)]
    assert len(masked) == dropped
    rewrite(gm, {}, masked)
    for length in (40, 33, 2):
        cut = [x[:, :, :length] for x in (q, k, v)]
        torch.testing.assert_close(gm(*cut), fn(*cut))


def test_a_call_without_such_a_mask_is_an_error(look, qkv):
    found = look(OTHERS["no mask"], *qkv)
    with pytest.raises(ValueError, match="no mask that is proven causal"):
        unmask(found.graphs[0], [found.site])


@pytest.mark.parametrize("valid", [torch.ones(2, 24, dtype=torch.bool), torch.arange(24) > torch.tensor([[-1], [6]])])
def test_a_dense_call_with_valid_keys_is_computed_by_the_operator(valid):
    """Which needs no mask where all keys are valid."""
    q, k, v = torch.randn(3, 2, 4, 24, 16)

    def call(q, k, v, valid):
        return sdpa(q, k, v, attn_mask=lower_triangle(q) & valid[:, None, None])

    graphs = []

    def backend(gm, inputs):
        sites, _ = find(gm, min_length=1)
        rewrite(gm, {}, sites)
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(call, backend=backend)(q, k, v, valid)
    targets = [node.target for node in graphs[0].graph.nodes]
    assert torch.ops.afbs.sparse_attention.default in targets
    assert not any(is_sdpa(node) for node in graphs[0].graph.nodes)
    expected = call(q, k, v, valid)
    torch.testing.assert_close(out.transpose(1, 2)[valid], expected.transpose(1, 2)[valid])
