"""Models that write their attention out, from the first call to an export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import afbs_compile
from afbs_compile.export import load, to_pt2
from tests.export.helpers import recipe_for
from tests.toy import HEAD_DIM, HEADS, Attention, Toy, drifting

LENGTH = 512


class WrittenOut(Attention):
    """The toy's attention as Gemma 2 and gpt-oss compute theirs: capped, with sinks, masked in place."""

    def __init__(self, softcap: float = 0.0, sinks: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.softcap, self.inplace = softcap, inplace
        self.sinks = torch.nn.Parameter(torch.linspace(-2.0, 2.0, HEADS)) if sinks else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = torch.matmul(q * self.sharpness, k.transpose(2, 3)) * HEAD_DIM**-0.5
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if self.inplace:
            scores.masked_fill_(hidden, float("-inf"))
        else:
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        if self.sinks is not None:
            sinks = self.sinks.reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = torch.nn.functional.dropout(weights, 0.1, self.training)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


KINDS = {
    "plain": {},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
    "inplace": {"inplace": True},
}


def model_of(kind: str) -> Toy:
    model = Toy()
    torch.manual_seed(0)
    model.layers = torch.nn.ModuleList(WrittenOut(**KINDS[kind]) for _ in range(2))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_calibrated_and_runs_sparse(kind: str, fresh_dynamo: None, sparse_is_faster: None) -> None:
    model, x = model_of(kind), drifting(LENGTH)
    expected = model(x)
    sparse = torch.compile(model, backend="afbs", fullgraph=True, options={"min_length": 128, "tolerance": 0.1})
    out = sparse(x)
    explanation = afbs_compile.explain(sparse)
    assert [row.outcome for row in explanation.rows] == ["sparse", "sparse"]
    after = [line for line in explanation.after[0].splitlines() if "#" not in line or "afbs." in line]
    assert sum("afbs.sparse_attention" in line and "mask = 'causal'" in line for line in after) == 2
    error = float((out - expected).abs().sum() / (expected - x).abs().sum())
    assert 0.0 < error < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_computes_what_the_compiled_model_computes(kind: str, tmp_path, fresh_dynamo: None) -> None:
    model, x = model_of(kind), drifting(LENGTH)
    recipe = recipe_for(model, x, tau=0.6)
    recipe.save(tmp_path / "recipe.json")
    to_pt2(model, recipe, x, tmp_path / "model.pt2", dynamic=True)
    compiled = torch.compile(model, backend="afbs", options={"recipe": tmp_path / "recipe.json", "min_length": 1})
    with torch.no_grad():
        for other in (x, drifting(LENGTH - 100, seed=1)):
            (out,) = load(tmp_path / "model.pt2")(other)
            torch.testing.assert_close(out, compiled(other), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(out, model(other), rtol=1e-4, atol=1e-5)
