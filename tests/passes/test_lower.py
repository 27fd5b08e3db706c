from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from afbs_compile.kernels.call import SparseCall
from afbs_compile.passes import lower as lowering
from afbs_compile.passes.find import find
from afbs_compile.passes.lower import lower
from afbs_compile.passes.rewrite import rewrite


def backend(gm, example_inputs, *, mode=None):
    sites, _ = find(gm, min_length=1)
    ones = {site: SparseCall.uniform(site.heads, 1.0) for site in sites}
    calls = {site: replace(call, lam=(-1.0,) * site.heads) for site, call in ones.items()}
    assert rewrite(gm, calls).changed == len(sites)
    return lower(gm, example_inputs, mode=mode)


def attend(x):
    rows = torch.arange(x.shape[2])
    out = F.scaled_dot_product_attention(x * 2, x, x, attn_mask=rows[:, None] >= rows)
    return out.transpose(1, 2).reshape(*x.shape[:1], x.shape[2], -1) + 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_rewritten_graph_runs_in_inductor(dynamic):
    x = torch.randn(2, 4, 24, 16)
    with torch.no_grad():
        compiled = torch.compile(attend, backend=backend, dynamic=dynamic, fullgraph=True)
        torch.testing.assert_close(compiled(x), attend(x))
        torch.testing.assert_close(compiled(x[:, :, :19]), attend(x[:, :, :19]))


def test_a_graph_without_sites_runs_in_inductor():
    x = torch.randn(8)
    torch.testing.assert_close(torch.compile(torch.sin, backend=backend)(x), x.sin())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_reach_inductor(monkeypatch, mode):
    seen = []

    def fake_compile_fx(gm, inputs, *, config_patches):
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fake_compile_fx)
    torch.compile(torch.sin, backend=lambda gm, inputs: lower(gm, inputs, mode=mode))(torch.randn(3))
    assert seen == [torch._inductor.list_mode_options(mode)]


def test_an_unknown_mode_is_refused():
    gm = torch.fx.symbolic_trace(lambda x: x.sin())
    with pytest.raises(ValueError, match=r"unknown mode 'fastest'; inductor has default, .*max-autotune"):
        lower(gm, [torch.randn(3)], mode="fastest")


def test_inductors_cache_tells_versions_of_the_operator_and_of_the_package_apart(monkeypatch):
    x = torch.randn(2, 4, 24, 16)

    def hits():
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(attend, backend=backend)(x), attend(x))
        return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]

    with fresh_cache():
        assert hits() == 0
        assert hits() > 0
        monkeypatch.setattr(
            lowering, "sparse_attention", torch.library.custom_op("afbs_test::other", mutates_args=())(other)
        )
        assert hits() == 0
        monkeypatch.undo()
        assert hits() > 0
        monkeypatch.setattr(lowering, "__version__", "0.0")
        assert hits() == 0
        monkeypatch.undo()
        assert hits() > 0
        with torch.compiler.config.patch(cache_key_tag="the user's"):
            assert hits() == 0
            assert torch.compiler.config.cache_key_tag == "the user's"


def other(x: torch.Tensor) -> torch.Tensor:
    return x.clone()
