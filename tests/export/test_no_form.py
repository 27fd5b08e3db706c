"""Calls that a format has no form for stay dense in its file, with a sentence."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afbs_compile.export import onnx, tensorrt
from afbs_compile.export.program import rewritten_program
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.causal import CausalEnd
from afbs_compile.kernels.masks.window import Around, Chunk, Window
from afbs_compile.passes.find import find
from tests.export.helpers import recipe_for

SDPA = torch.ops.aten.scaled_dot_product_attention.default
SPARSE = torch.ops.afbs.sparse_attention.default
N = 130


class Attention(nn.Module):
    """One call of four heads on its inputs, ``[batch, length, 4 * head_dim]``, as they come."""

    def __init__(self, mask=None, causal=False, value_dim=16):
        super().__init__()
        self.eval()
        self.mask, self.causal, self.dims = mask, causal, (16, 16, value_dim)

    def forward(self, q, k, v, given=None):
        mask = given if self.mask is None else self.mask(q.shape[1])
        q, k, v = (x.unflatten(-1, (4, dim)).transpose(1, 2) for x, dim in zip((q, k, v), self.dims, strict=True))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)


def x(length=N, dim=16):
    return torch.randn(1, length, 4 * dim)


def window(n):
    rows = torch.arange(n)
    return (rows <= rows[:, None]) & (rows[:, None] - rows < 40)


class OwnKeys(Attention):
    """Of one input: its lengths are one, also where it is free."""

    def forward(self, q):
        return super().forward(q, q, q)


PLAIN = {"causal": OwnKeys(causal=True), "full": OwnKeys()}
MORE = {
    "130 query rows over 200 keys; calls of as many rows as keys have one": (Attention(), (x(), x(200), x(200))),
    "keys that are not valid; calls of q, k, v and a formula for the mask have one": (
        Attention(), (x(), x(), x(), (torch.arange(N) < 100)[None, None, None])
    ),
    "a dense mask; calls of q, k, v and a formula for the mask have one": (
        Attention(), (x(), x(), x(), torch.randn(N, N))
    ),
    "v has head_dim 24, q and k have 16; calls of one head_dim have one": (
        Attention(value_dim=24), (x(), x(), x(dim=24))
    ),
}  # fmt: skip


def decided(model, inputs, refuse, dynamic=False):
    """The only call's row, and how many calls of the program are dense and sparse."""
    program = rewritten_program(model, recipe_for(model, inputs), inputs, dynamic=dynamic, refuse=refuse)
    (row,) = program.rows
    graph = program.exported.graph
    return row, *(len(graph.find_nodes(op="call_function", target=target)) for target in (SDPA, SPARSE))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("refuse", [onnx.no_form, tensorrt.no_form])
@pytest.mark.parametrize("model", PLAIN.values(), ids=PLAIN.keys())
def test_plain_calls_have_a_form(model, refuse, dynamic):
    row, dense, sparse = decided(model, (x(),), refuse, dynamic)
    assert (row.outcome, dense, sparse) == ("sparse", 0, 1)


@pytest.mark.parametrize(("refuse", "file"), [(onnx.no_form, "ONNX"), (tensorrt.no_form, "TensorRT")])
@pytest.mark.parametrize(("sentence", "case"), MORE.items(), ids=MORE.keys())
def test_calls_of_more_than_that_stay_dense(sentence, case, refuse, file):
    row, dense, sparse = decided(*case, refuse)
    assert (row.outcome, row.reason) == ("dense", f"no form in {file}: {sentence}")
    assert (dense, sparse) == (1, 0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_window_has_a_form_in_tensorrt_alone(dynamic):
    model, inputs = OwnKeys(window), (x(),)
    row, dense, sparse = decided(model, inputs, onnx.no_form, dynamic)
    assert (row.outcome, dense, sparse) == ("dense", 1, 0)
    assert row.reason == "no form in ONNX: mask window(40); causal and full ones have one"
    assert decided(model, inputs, tensorrt.no_form, dynamic)[1:] == (0, 1)


@pytest.fixture
def site():
    exported = torch.export.export(Attention(causal=True), (x(), x(), x()))
    ((site,), _) = find(exported.module(), min_length=1)
    return site


@pytest.mark.parametrize("refuse", [onnx.no_form, tensorrt.no_form])
def test_what_becomes_of_scores_has_no_form(site, refuse):
    call = SparseCall.uniform(4, 0.5)
    assert refuse(site, call) is None
    assert ": a softcap; " in refuse(replace(site, softcap=20.0), call)
    assert ": sinks; " in refuse(replace(site, sinks=site.q), call)
    both = refuse(replace(site, softcap=20.0, sinks=site.q, valid=site.q), call)
    assert ": keys that are not valid and a softcap and sinks; " in both


@pytest.mark.parametrize("mask", [Window(40), Chunk(40), Around(5, 0), Around(5, 3)])
def test_a_band_with_another_edge_has_no_form_in_onnx(site, mask):
    assert f"mask {mask}; " in onnx.no_form(replace(site, mask=mask), SparseCall.uniform(4, 0.5))


def test_heads_that_kernels_would_pad_have_no_form_in_onnx(site):
    reason = onnx.no_form(replace(site, head_dim=8, value_dim=8), SparseCall.uniform(4, 0.5))
    assert reason == "no form in ONNX: head_dim 8; 16 and more have one"


def test_causal_at_the_end_is_causal_over_as_many_rows_as_keys(site):
    assert onnx.no_form(replace(site, mask=CausalEnd()), SparseCall.uniform(4, 0.5)) is None
