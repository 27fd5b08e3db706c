"""The rewritten graph: same results where everything is kept, constants in the call, nothing else lost."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import LAMBDA_OFF, THETA_OFF, Kept, SparseCall
from afbs_compile.passes.find import find
from afbs_compile.passes.rewrite import dump, rewrite

sdpa = F.scaled_dot_product_attention
OP = torch.ops.afbs.sparse_attention.default


def causal_mask(q):
    rows = torch.arange(q.shape[-2])
    return rows[:, None] >= rows


def doubled(k):
    return k[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)


def in_memory_order(q, k, v):
    return sdpa(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2).reshape(2, 24, -1)


SAME = {
    "2-D": (lambda x: sdpa(x, x, x), [(24, 16)]),
    "3-D": (lambda x: sdpa(x, x, x, is_causal=True), [(3, 24, 16)]),
    "4-D": (lambda q, k, v: sdpa(q, k, v), [(2, 4, 24, 16)] * 3),
    "5-D": (lambda q, k, v: sdpa(q, k, v, is_causal=True), [(2, 3, 4, 24, 16)] * 3),
    "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), [(2, 4, 24, 16)] * 3),
    "scale": (lambda q, k, v: sdpa(q, k, v, scale=0.7), [(2, 4, 24, 16)] * 3),
    "GQA": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), [(2, 4, 24, 16), (2, 2, 24, 16), (2, 2, 24, 16)]),
    "GQA 5-D": (lambda q, k: sdpa(q, k, k, enable_gqa=True), [(2, 3, 4, 24, 16), (2, 3, 2, 24, 16)]),
    "one key head": (lambda q, k: sdpa(q, k, k), [(2, 4, 24, 16), (2, 1, 24, 16)]),
    "proven mask": (lambda q, k, v: sdpa(q, k, v, attn_mask=causal_mask(q)), [(2, 4, 24, 16)] * 3),
    "repeated heads": (lambda q, k: sdpa(q, doubled(k), doubled(k)), [(2, 4, 24, 16), (2, 2, 24, 16)]),
    "transposed": (in_memory_order, [(2, 24, 4, 16)] * 3),
    "view of the output": (lambda x: sdpa(x, x, x).view(8, -1), [(2, 4, 24, 16)]),
    "view of a view of the output": (lambda x: sdpa(x, x, x)[1:].unsqueeze(0).view(4, -1), [(2, 4, 24, 16)]),
    "view of the output, 3-D": (lambda x: sdpa(x, x, x).view(-1, 16), [(3, 24, 16)]),
    "view of the output, 5-D": (lambda x: sdpa(x, x, x).view(2, -1), [(2, 3, 4, 24, 16)]),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("fn", "shapes"), SAME.values(), ids=SAME.keys())
def test_keeping_everything_changes_nothing(compile_with, fn, shapes, dynamic):
    inputs = [torch.randn(shape) for shape in shapes]
    found = compile_with(fn, change=True, dynamic=dynamic)
    torch.testing.assert_close(found.call(*inputs), fn(*inputs))
    (gm,) = found.graphs
    assert found.rewrites[0].changed == 1
    assert [node.target for node in gm.graph.nodes].count(OP) == 1
    assert "scaled_dot_product" not in found.rewrites[0].after


CHAINED = {
    "q": (lambda q, k, v: sdpa(sdpa(q, k, v, is_causal=True), k, v), [(2, 4, 24, 16)] * 3),
    "k": (lambda q, k, v: sdpa(q, sdpa(q, k, v), v, is_causal=True), [(2, 4, 24, 16)] * 3),
    "v": (lambda q, k, v: sdpa(q, k, sdpa(q, k, v)), [(2, 4, 24, 16)] * 3),
    "all three": (lambda x: sdpa(*[sdpa(x, x, x)] * 3), [(2, 4, 24, 16)]),
    "read by others too": (lambda x: (y := sdpa(x, x, x)) + sdpa(y, x, y) + y.sin(), [(2, 4, 24, 16)]),
    "2-D": (lambda x: sdpa(sdpa(x, x, x), x, x), [(24, 16)]),
    "3-D": (lambda x: sdpa(sdpa(x, x, x), x, x, is_causal=True), [(3, 24, 16)]),
    "5-D": (lambda x: sdpa(x, sdpa(x, x, x), x), [(2, 3, 4, 24, 16)]),
    "repeated heads": (lambda q, k: sdpa(q, *[doubled(sdpa(k, k, k))] * 2), [(2, 4, 24, 16), (2, 2, 24, 16)]),
    "under a mask": (lambda x: sdpa(sdpa(x, x, x), x, x, attn_mask=causal_mask(x)), [(2, 4, 24, 16)]),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("fn", "shapes"), CHAINED.values(), ids=CHAINED.keys())
def test_an_operand_may_be_the_output_of_another_rewritten_call(compile_with, fn, shapes, dynamic):
    inputs = [torch.randn(shape) for shape in shapes]
    found = compile_with(fn, change=True, dynamic=dynamic)
    torch.testing.assert_close(found.call(*inputs), fn(*inputs))
    assert found.rewrites[0].changed == 2
    assert "scaled_dot_product" not in found.rewrites[0].after


@pytest.mark.parametrize("sparse", [0, 1], ids=["first", "second"])
def test_of_two_calls_in_a_row_either_may_stay(look, qkv, sparse):
    def fn(q, k, v):
        return sdpa(sdpa(q, k, v, is_causal=True), k, v, attn_mask=causal_mask(q))

    (gm,) = (found := look(fn, *qkv)).graphs
    sites = found.sites[0]
    unmasked = [site for site in sites[1:] if sparse == 0]
    assert rewrite(gm, {sites[sparse]: SparseCall.uniform(4, 1.0)}, unmasked).changed == 1
    (out,) = gm(*qkv)
    torch.testing.assert_close(out, fn(*qkv))


def test_the_output_of_the_graph_keeps_its_strides(compile_with, qkv):
    for inputs in (qkv, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]):
        found = compile_with(lambda q, k, v: sdpa(q, k, v), change=True)
        with torch.no_grad():
            assert found.call(*inputs).stride() == sdpa(*inputs).stride()


def test_no_copy_where_nothing_reads_the_strides(look, qkv):
    gm, _ = rewritten(look, lambda q, k, v: sdpa(q, k, v).transpose(1, 2).reshape(2, 24, 64) + 1, *qkv)
    assert "contiguous" not in gm.code


def test_sizes_stay_dynamic(compile_with):
    found = compile_with(lambda x: sdpa(x, x, x), change=True, dynamic=True)
    for a, b, length in ((2, 3, 24), (3, 4, 30), (4, 2, 41)):
        x = torch.randn(a, b, 4, length, 16)
        torch.testing.assert_close(found.call(x), sdpa(x, x, x))
    assert len(found.graphs) == 1


def rewritten(look, fn, *inputs, constants=None):
    """Find in a captured graph, rewrite it outside of the backend, and return both."""
    (gm,) = (found := look(fn, *inputs)).graphs
    plans = {site: constants(site) if constants else keep(site) for site in found.sites[0]}
    return gm, rewrite(gm, plans)


def keep(site, tau=1.0):
    return SparseCall.uniform(site.heads, tau, shape=BlockShape(64, 32), min_length=1000)


def nodes_of(gm):
    return [node.name for node in gm.graph.nodes]


def test_constants_stand_in_the_call(look, qkv):
    def constants(site):
        return SparseCall(
            tau=(0.9, 0.5, 1.0, 1 / 3),
            theta=(-1.0, 0.2, -1.0, 2 / 3),
            lam=(-8.0, -1000.0, -1.0, -10 / 3),
            policy=("meansim",) * 4,
            shape=BlockShape(64, 32),
            min_length=2048,
        )

    gm, result = rewritten(look, lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv, constants=constants)
    (call,) = [node for node in gm.graph.nodes if node.target is OP]
    assert call.kwargs == {
        "tau": [0.9, 0.5, 1.0, 0.333333],
        "theta": [-1.0, 0.2, -1.0, 0.666667],
        "lam": [-8.0, -1000.0, -1.0, -3.33333],
        "mask": "causal",
        "scale": 0.25,
        "block_q": 64,
        "block_k": 32,
        "min_length": 2048,
    }
    assert "tau = [0.9, 0.5, 1.0, 0.333333]" in result.after


@pytest.mark.parametrize("names", [("meansim",) * 4, ("meansim", "cumulant", "meansim", "sink_window")])
def test_policies_stand_in_the_call_where_they_are_not_the_default(look, qkv, names):
    def constants(site):
        return replace(SparseCall.uniform(4, 0.5), policy=names)

    gm, _ = rewritten(look, lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv, constants=constants)
    (call,) = [node for node in gm.graph.nodes if node.target is OP]
    assert call.kwargs.get("policy") == (list(names) if "cumulant" in names else None)
    assert ("policy" in call.kwargs) == ("cumulant" in names)


@pytest.mark.parametrize("kept", [Kept(), Kept(64, 128), Kept(last_rows=64)])
def test_kept_blocks_stand_in_the_call_where_there_are_any(look, qkv, kept):
    def constants(site):
        return SparseCall.uniform(4, 0.5, kept=kept)

    gm, _ = rewritten(look, lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv, constants=constants)
    (call,) = [node for node in gm.graph.nodes if node.target is OP]
    for name, value in kept._asdict().items():
        assert call.kwargs.get(name) == (value or None)


def test_rounding_is_idempotent():
    call = SparseCall(
        (0.123456789, 2 / 3), (THETA_OFF, 2 / 3), (LAMBDA_OFF, -2 / 3), ("meansim",) * 2, BlockShape(64, 64)
    )
    once = call.rounded()
    assert once.tau[0] == 0.123457
    assert once.rounded() == once
    assert once.lam[0] == -1000.0


def test_texts_before_and_after(look, qkv):
    gm, result = rewritten(look, lambda q, k, v: sdpa(q, k, v), *qkv)
    assert "scaled_dot_product_attention" in result.before
    assert "afbs.sparse_attention" not in result.before
    assert "afbs.sparse_attention" in result.after
    assert result.after == gm.print_readable(print_output=False)


def test_no_plan_changes_nothing(look, qkv):
    (gm,) = look(lambda q, k, v: sdpa(q, k, v), *qkv).graphs
    code = gm.code
    result = rewrite(gm, {})
    assert (result.changed, result.before, gm.code) == (0, result.after, code)


def test_unplanned_sites_stay(look, qkv):
    (gm,) = (found := look(lambda q, k, v: sdpa(sdpa(q, k, v), k, v), *qkv)).graphs
    second = found.sites[0][1]
    assert rewrite(gm, {second: keep(second)}).changed == 1
    assert sum("scaled_dot_product" in str(node.target) for node in gm.graph.nodes) == 1


def test_constants_must_match_the_heads(look, qkv):
    (gm,) = (found := look(lambda q, k, v: sdpa(q, k, v), *qkv)).graphs
    code = gm.code
    with pytest.raises(ValueError, match=r"attention: 3 values of tau for 4 heads"):
        rewrite(gm, {found.site: SparseCall.uniform(3, 1.0)})
    assert gm.code == code
    with pytest.raises(ValueError, match="theta has 4 constants; accepted: one for each of the 3 query heads"):
        SparseCall((1.0,) * 3, (-1.0,) * 4, (0.0,) * 4, ("meansim",) * 3, BlockShape(64, 64))


def test_new_nodes_carry_what_a_tracer_records(look):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.Module()
            self.block.forward = lambda x: sdpa(x, x, x)

        def forward(self, x):
            return self.block(x)

    for shape in ((24, 16), (3, 24, 16), (2, 4, 24, 16), (2, 3, 4, 24, 16)):
        gm, _ = rewritten(look, Model(), torch.randn(shape))
        new = [node for node in gm.graph.nodes if node.op == "call_function"]
        assert new[-1].meta["example_value"].shape == shape
        for node in new:
            assert isinstance(node.meta["example_value"], torch._subclasses.FakeTensor)
            assert list(node.meta["nn_module_stack"].values())[-1][0] == "L['self'].block"
            assert "stack_trace" in node.meta


class TestErasing:
    def test_a_proven_mask_goes(self, look, qkv):
        gm, _ = rewritten(look, lambda q, k, v: sdpa(q, k, v, attn_mask=causal_mask(q)).sin(), *qkv)
        assert [node.op for node in gm.graph.nodes] == ["placeholder"] * 3 + ["call_function", "call_method", "output"]

    def test_repeated_heads_go(self, look):
        def fn(q, k):
            wide = k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, 24, 16)
            return sdpa(q, wide, wide).sin()

        gm, _ = rewritten(look, fn, torch.randn(2, 4, 24, 16), torch.randn(2, 2, 24, 16))
        assert [node.op for node in gm.graph.nodes] == ["placeholder"] * 2 + ["call_function", "call_method", "output"]

    def test_a_mask_that_something_else_uses_stays(self, look, qkv):
        def fn(q, k, v):
            mask = causal_mask(q)
            return sdpa(q, k, v, attn_mask=mask), mask.sum()

        gm, _ = rewritten(look, fn, *qkv)
        assert any("arange" in name or "rows" in name for name in nodes_of(gm))

    def test_a_mask_that_a_refused_call_uses_stays(self, look, qkv):
        def fn(q, k, v):
            mask = causal_mask(q)
            return sdpa(q, k, v, attn_mask=mask) + sdpa(q, k, v, attn_mask=mask, dropout_p=0.5)

        (gm,) = (found := look(fn, *qkv)).graphs
        (site,) = found.sites[0]
        rewrite(gm, {site: keep(site)})
        (dense,) = [node for node in gm.graph.nodes if "scaled_dot_product" in str(node.target)]
        assert dense.kwargs["attn_mask"] in gm.graph.nodes

    def test_random_numbers_stay(self, compile_with, qkv):
        """Erasing a draw would give every later one other numbers."""

        def fn(q, k, v):
            unused = torch.rand(3)  # noqa: F841
            q.sigmoid().bernoulli()
            noise = F.dropout(q, 0.5, True)
            mask = torch.ones_like(noise[0, 0, :, :1]) * torch.ones(24, 24)
            return sdpa(q, k, v, attn_mask=mask.tril() > 0) + torch.rand(1)

        found = compile_with(fn, change=True)
        torch.manual_seed(1)
        result = found.call(*qkv)
        torch.manual_seed(1)
        torch.testing.assert_close(result, fn(*qkv))
        assert found.rewrites[0].changed == 1

    def test_writes_stay(self, compile_with, qkv):
        def fn(q, k, v, cache):
            cache.index_copy_(2, torch.arange(24), k)
            cache[0, 0, 0] += 1
            mask = torch.ones(24, 24, dtype=torch.bool)
            mask.tril_()
            return sdpa(q, k, v, attn_mask=mask)

        found = compile_with(fn, change=True)
        caches = [torch.zeros(2, 4, 32, 16) for _ in range(2)]
        torch.testing.assert_close(found.call(*qkv, caches[0]), fn(*qkv, caches[1]))
        assert found.rewrites[0].changed == 1
        assert torch.equal(*caches)
        assert caches[0].any()

    def test_placeholders_stay(self, look, qkv):
        gm, _ = rewritten(look, lambda q, k, v: sdpa(q, q, q, attn_mask=torch.ones_like(k[0, 0, :, :1]) > 0), *qkv)
        assert [node.op for node in gm.graph.nodes].count("placeholder") == 2


def test_exported_graph(qkv):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return sdpa(q, k, v, attn_mask=causal_mask(q)).transpose(1, 2).flatten(2)

    gm = torch.export.export(Model(), qkv).module()
    sites, _ = find(gm, min_length=1)
    rewrite(gm, {site: keep(site) for site in sites})
    torch.testing.assert_close(gm(*qkv), Model()(*qkv))
    assert not any("aten.arange" in str(node.target) for node in gm.graph.nodes)
    (call,) = [node for node in gm.graph.nodes if node.target is OP]
    assert "val" in call.meta
    torch.export.export(gm, qkv)


class TestDump:
    def test_files(self, look, qkv, tmp_path):
        _, result = rewritten(look, lambda q, k, v: sdpa(q, k, v), *qkv)
        dump(result, tmp_path / "new" / "folder", "graph_0")
        folder = tmp_path / "new" / "folder"
        assert sorted(path.name for path in folder.iterdir()) == ["graph_0.after.py", "graph_0.before.py"]
        assert (folder / "graph_0.before.py").read_text() == result.before
        assert (folder / "graph_0.after.py").read_text() == result.after

    def test_a_second_dump_replaces_the_first(self, look, qkv, tmp_path):
        for tau in (0.5, 0.75):
            _, result = rewritten(
                look, lambda q, k, v: sdpa(q, k, v), *qkv, constants=lambda site, tau=tau: keep(site, tau)
            )
            dump(result, str(tmp_path), "graph")
        assert "0.75" in (tmp_path / "graph.after.py").read_text()
