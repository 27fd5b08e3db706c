"""When masks are evaluated: once, in bounded memory, for one length at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch._C import _functorch

from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.masks.window import Window
from afbs_compile.passes import constants
from afbs_compile.passes.find import find
from afbs_compile.passes.mask_proof import classify

N = 24
sdpa = F.scaled_dot_product_attention


def causal():
    return torch.arange(N)[:, None] >= torch.arange(N)


def causal_with_literals():
    return torch.where(causal(), torch.tensor(0.0), torch.tensor(float("-inf")))


def causal_in_place():
    mask = torch.ones(N, N, dtype=torch.bool)
    for row in range(N):
        mask[row][row + 1 :] = False
    return mask


def causal_by_vmap():
    rows = torch.arange(N)
    return torch.vmap(torch.vmap(lambda i, j: i >= j, (None, 0)), (0, None))(rows, rows)


def test_layers_share_the_evaluation(look, qkv, monkeypatch):
    runs = []
    monkeypatch.setattr("afbs_compile.passes.mask_proof.run", lambda *args: runs.append(1) or constants.run(*args))

    def fn(q, k, v):
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        return sdpa(sdpa(q, k, v, attn_mask=mask), k, v, attn_mask=mask)

    assert len(look(fn, *qkv).sites[0]) == 2
    assert len(runs) == 1


def test_a_mask_too_large_to_evaluate_is_read_when_the_graph_runs(same, qkv, monkeypatch):
    monkeypatch.setattr(constants, "LARGEST_TENSOR", N * N - 1)
    site = same(lambda q, k, v: sdpa(q, k, v, attn_mask=causal()), *qkv).site
    assert (site.mask, site.attn_mask is not None) == (Full(), True)


def test_vmap_levels_are_left_after_a_failure(look, qkv):
    def fn(q, k, v):
        i = torch.arange(N)
        mask = torch.vmap(lambda row: torch.empty(N, dtype=torch.bool) & (row >= i))(i)
        return sdpa(q, k, v, attn_mask=mask)

    assert look(fn, *qkv).site.attn_mask is not None
    assert not _functorch.maybe_current_level()


class TestDynamicShapes:
    def masked(self, q, k, v):
        rows = torch.arange(q.shape[2])
        return sdpa(q, k, v, attn_mask=rows[:, None] >= rows)

    def up_to_32(self, q, k, v):
        """Causal up to 32 tokens; beyond, nobody attends to the first keys."""
        n = q.shape[2]
        rows = torch.arange(n)
        return sdpa(q, k, v, attn_mask=(rows[:, None] >= rows) & (rows[:, None] - rows < 32))

    def inputs(self, length):
        return [torch.randn(2, 4, length, 16) for _ in range(3)]

    def by_the_length(self, q, k, v):
        """Causal in one of two ways: that is no formula of the positions."""
        n = q.shape[2]
        rows = torch.arange(n)
        return sdpa(q, k, v, attn_mask=(rows[:, None] >= rows) & (rows[:, None] * rows < 30 * n))

    def test_one_graph_serves_all_lengths_of_a_formula(self, compile_with):
        for fn, mask in ((self.masked, Causal()), (self.up_to_32, Window(32))):
            found = compile_with(fn, dynamic=True, change=True)
            with torch.no_grad():
                for length in (24, 40, 30, 41):
                    inputs = self.inputs(length)
                    torch.testing.assert_close(found.call(*inputs), fn(*inputs))
            assert len(found.graphs) == 1
            assert found.site.mask == mask

    def test_what_has_no_formula_is_proven_at_each_length(self, compile_with):
        found = compile_with(self.by_the_length, dynamic=True, change=True)
        with torch.no_grad():
            for length in (24, 40, 30, 41):
                inputs = self.inputs(length)
                torch.testing.assert_close(found.call(*inputs), self.by_the_length(*inputs))
        assert [(site.mask, site.attn_mask is None) for (site,) in found.sites] == [
            (Causal(), True),
            (Full(), False),
            (Causal(), True),
            (Full(), False),
        ]

    def test_a_short_call_is_not_pinned_to_its_length(self, compile_with):
        found = compile_with(self.masked, dynamic=True, min_length=100)
        with torch.no_grad():
            for length in (24, 40, 30):
                found.call(*self.inputs(length))
        assert len(found.graphs) == 1

    def test_an_unproven_mask_is_not_pinned_to_its_length(self, compile_with):
        found = compile_with(lambda q, m: sdpa(q, q, q, attn_mask=m), dynamic=True)
        with torch.no_grad():
            for length in (24, 40, 30):
                found.call(self.inputs(length)[0], torch.ones(length, length, dtype=torch.bool))
        assert len(found.graphs) == 1

    def test_a_length_that_the_user_keeps_free_is_not_pinned(self, compile_with):
        found = compile_with(self.masked, dynamic=None)
        for length in (24, 40):
            inputs = self.inputs(length)
            for x in inputs:
                torch._dynamo.mark_dynamic(x, 2)
            found.call(*inputs)
        assert len(found.graphs) == 1
        assert found.site.mask == Causal()

    def test_a_free_length_without_a_formula_is_not_pinned_either(self, compile_with):
        found = compile_with(self.by_the_length, dynamic=None, change=True)
        for length in (24, 40):
            inputs = self.inputs(length)
            for x in inputs:
                torch._dynamo.mark_dynamic(x, 2)
            torch.testing.assert_close(found.call(*inputs), self.by_the_length(*inputs))
        assert len(found.graphs) == 1
        assert (found.site.mask, found.site.attn_mask is not None) == (Full(), True)

    def test_an_exported_graph_whose_mask_is_causal_at_some_lengths(self):
        class Masked(torch.nn.Module):
            forward = TestDynamicShapes.up_to_32

        length = torch.export.Dim("length", min=2, max=4096)
        exported = torch.export.export(Masked(), tuple(self.inputs(24)), dynamic_shapes=({2: length},) * 3)
        (site,), _ = find(exported.module(), min_length=1)
        assert (site.mask, site.attn_mask) == (Window(32), None)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [causal, causal_with_literals, causal_in_place, causal_by_vmap])
def test_exported_graph(make, strict):
    class Masked(torch.nn.Module):
        def forward(self, q):
            return sdpa(q, q, q, attn_mask=make())

    (site,), _ = find(torch.export.export(Masked(), (torch.randn(2, 4, N, 16),), strict=strict).module(), min_length=1)
    assert site.mask == Causal()


def test_exported_buffer_is_no_constant():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", causal())
            self.plain = causal()

        def forward(self, q):
            return sdpa(q, q, q, attn_mask=self.mask & self.plain)

    exported = torch.export.export(Masked(), (torch.randn(2, 4, N, 16),))
    for gm in (exported.module(), exported.graph_module):
        (site,), _ = find(gm, min_length=1)
        assert (site.mask, site.attn_mask is not None) == (Full(), True)


class TestClassify:
    @pytest.mark.parametrize("length", [1, 2, 63, 5000])
    @pytest.mark.parametrize("chunk", [1, 100, 2**24])
    def test_patterns(self, length, chunk, monkeypatch):
        if length * length > chunk * 10**6:
            pytest.skip("many tiny chunks")
        monkeypatch.setattr("afbs_compile.passes.mask_proof.CHUNK", chunk)
        ones = torch.ones(length, length, dtype=torch.bool)
        assert classify(ones, length, length) == Full()
        assert classify(ones.tril(), length, length) == (Causal() if length > 1 else Full())
        assert classify(~ones, length, length) is None

    def test_every_slice_counts(self):
        mask = torch.ones(3, 2, 8, 8, dtype=torch.bool).tril()
        assert classify(mask, 8, 8) == Causal()
        mask[2, 1, 5, 1] = False
        assert classify(mask, 8, 8) is None

    def test_slices_of_two_patterns_have_none(self):
        ones = torch.ones(8, 8, dtype=torch.bool)
        assert classify(torch.stack([ones, ones.tril()]), 8, 8) is None

    def test_an_empty_batch_has_no_pattern(self):
        assert classify(torch.ones(0, 1, 8, 8, dtype=torch.bool), 8, 8) is None
