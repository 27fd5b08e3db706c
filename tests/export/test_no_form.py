"""Calls of every kind in the files of each format; what a format has no form for stays dense, with a sentence."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afbs_compile.export import load, to_onnx, to_pt2, to_tensorrt
from afbs_compile.export.onnx import no_form
from afbs_compile.export.program import rewritten_program
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.causal import CausalEnd
from afbs_compile.kernels.masks.window import Around, Chunk, Window
from afbs_compile.passes.find import find
from tests.export.helpers import recipe_for
from tests.export.test_tensorrt import library  # noqa: F401  # a fixture

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


def padded(n=N, keys=100):
    return (torch.arange(n) < keys)[None, None, None]


RANDOM = torch.Generator().manual_seed(0)
CALLS = {
    "causal": (OwnKeys(causal=True), (x(),)),
    "full": (OwnKeys(), (x(),)),
    "window": (OwnKeys(window), (x(),)),
    "more keys": (Attention(), (x(), x(200), x(200))),
    "valid keys": (Attention(), (x(), x(), x(), padded())),
    "a bias": (Attention(), (x(), x(), x(), torch.randn(N, N, generator=RANDOM))),
    "a dense mask": (Attention(), (x(), x(), x(), torch.rand(N, N, generator=RANDOM) < 0.8)),
    "v of another size": (Attention(value_dim=24), (x(), x(), x(dim=24))),
}
EACH_CALL = pytest.mark.parametrize("case", CALLS.values(), ids=CALLS.keys())
FREE = ("causal", "full", "window")


def written(model, inputs):
    """The same as PyTorch runs it from a file, in which the only call is sparse."""
    recipe = recipe_for(model, inputs, tau=0.3)
    program = rewritten_program(model, recipe, inputs, dynamic=False)
    graph = program.exported.graph
    assert [len(graph.find_nodes(op="call_function", target=target)) for target in (SDPA, SPARSE)] == [0, 1]
    return recipe


@EACH_CALL
def test_onnx_computes_what_pytorch_does(case, tmp_path):
    model, inputs = case
    recipe = written(model, inputs)
    assert [row.outcome for row in to_onnx(model, recipe, inputs, tmp_path / "m.onnx").rows] == ["sparse"]
    to_pt2(model, recipe, inputs, tmp_path / "m.pt2")
    changes = []
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = [torch.randn_like(value) if value.dim() == 3 else value for value in inputs]
        (expected,), (out,) = (load(tmp_path / name)(*inputs) for name in ("m.pt2", "m.onnx"))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            changes.append(float((out - model(*inputs)).abs().max()))
    assert max(changes) > 0.01 or model.mask is not None, "nothing was skipped"


@EACH_CALL
def test_the_plugins_of_tensorrt_compute_what_pytorch_does(case, tmp_path, library):  # noqa: F811
    model, inputs = case
    recipe = written(model, inputs)
    assert [row.outcome for row in to_tensorrt(model, recipe, inputs, tmp_path / "m.ep").rows] == ["sparse"]
    to_pt2(model, recipe, inputs, tmp_path / "m.pt2")
    (expected,), (out,) = (load(tmp_path / name)(*inputs) for name in ("m.pt2", "m.ep"))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", FREE)
def test_a_free_length(name, tmp_path):
    model, inputs = CALLS[name]
    recipe = recipe_for(model, inputs, tau=0.5)
    to_onnx(model, recipe, inputs, tmp_path / "m.onnx", dynamic=True)
    to_pt2(model, recipe, inputs, tmp_path / "m.pt2", dynamic=True)
    for length in (70, 300):
        given = torch.randn(2, length, 64)
        (expected,), (out,) = (load(tmp_path / file)(given) for file in ("m.pt2", "m.onnx"))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


class Padded(Attention):
    """A text with padding, of any length: causal, and a mask of the keys."""

    def forward(self, q, kept):
        rows = torch.arange(q.shape[1])
        mask = (rows <= rows[:, None])[None, None] & kept.bool()[:, None, None, :]
        return super().forward(q, q, q, mask)


def test_padded_texts_of_a_free_length(tmp_path):
    model, inputs = Padded(), (x(), torch.ones(1, N, dtype=torch.int64))
    recipe = recipe_for(model, inputs, tau=0.5)
    for name, write in (("m.onnx", to_onnx), ("m.pt2", to_pt2)):
        (row,) = write(model, recipe, inputs, tmp_path / name, dynamic=True).rows
        assert (row.outcome, row.mask) == ("sparse", "causal")
    for length in (90, 300):
        given = torch.randn(2, length, 64)
        kept = torch.ones(2, length, dtype=torch.int64)
        kept[0, : length // 3] = 0
        (expected,), (out,) = (load(tmp_path / file)(given, kept) for file in ("m.pt2", "m.onnx"))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def site():
    exported = torch.export.export(Attention(causal=True), (x(), x(), x()))
    ((site,), _) = find(exported.module(), min_length=1)
    return site


@pytest.mark.parametrize("mask", [CausalEnd(), Window(40), Chunk(40), Around(5, 0), Around(5, 3)])
def test_every_kind_of_mask_has_a_form(site, mask):
    assert no_form(replace(site, mask=mask), SparseCall.uniform(4, 0.5)) is None


class EverySecond(Mask):
    """Of a package of its own: no band."""

    name, words, local = "every_second", "every second key", False

    def sees(self, positions, keys):
        """See :meth:`Mask.sees`."""
        return (positions + keys) % 2 == 0


def test_a_mask_that_is_no_band_has_none_in_onnx(site):
    reason = no_form(replace(site, mask=EverySecond()), SparseCall.uniform(4, 0.5))
    assert reason == (
        "no form in ONNX: mask every_second; those that are bands aligned at the first or the last key have one"
    )
