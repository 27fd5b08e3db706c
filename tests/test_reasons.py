"""What is said of calls that stay dense: once for each kind, and where nobody expects it."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import afbs_compile
from afbs_compile.errors import AfbsWarning
from afbs_compile.reasons import grouped
from tests.toy import Toy, drifting

LENGTH = 512


def test_reasons_that_differ_by_numbers_alone_are_one():
    reasons = [
        "not faster: 164.5 ms sparse, 2 ms dense",
        "too short: 12 tokens",
        "not faster: 99 ms sparse, 2 ms dense",
    ]
    assert grouped(reasons) == "2 x not faster: 99 to 164.5 ms sparse, 2 ms dense; 1 x too short: 12 tokens"


def test_names_with_digits_and_braces_are_no_numbers():
    reasons = ["a bf16 {call} of 1,024 rows, 1e-05", "a bf16 {call} of 96 rows, 1e-05", None]
    assert grouped(reasons) == "2 x a bf16 {call} of 96 to 1,024 rows, 1e-05; 1 x "


class Windowed(nn.Module):
    """Attention over windows of a sequence, then over all of it, as SAM 2 and Hiera mix them."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows, self.toy = windows, Toy()

    def forward(self, x: Tensor) -> Tensor:
        cut = x.unflatten(1, (self.windows, -1)).flatten(0, 1)
        cut = self.toy.layers[0](cut)
        return self.toy.layers[1](x + 0.1 * cut.unflatten(0, (-1, self.windows)).flatten(1, 2))


@pytest.mark.parametrize("samples", [[(LENGTH, 1)] * 3, [(LENGTH, 2), (2 * LENGTH, 1)]], ids=["equal", "mixed"])
def test_calls_with_batches_of_their_own(samples, fresh_dynamo, sparse_is_faster):
    inputs = [drifting(n, batch, seed=i) for i, (n, batch) in enumerate(samples)]
    recipe = afbs_compile.calibrate(Windowed(2).eval(), inputs, min_length=128, tolerance=0.2)
    (graph,) = recipe.graphs
    assert len(recipe.sites) == 2
    assert all(site.outcome != "refused" for site in recipe.sites)
    # Windows of a sample are no inputs of their own; one sample explores.
    assert graph.samples.validation_inputs == len(samples)
    assert graph.promise is not None
    assert graph.promise.inputs == len(samples) - 1


@torch.no_grad()
def test_a_graph_that_stays_dense_beside_a_sparse_one_is_told_of_once(fresh_dynamo, sparse_is_faster):
    class Chosen(nn.Module):
        """One attention that is taken, and one that is refused, in graphs of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.body = Toy()

        def forward(self, x: Tensor, dropped: bool) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1) if dropped else self.body(x)

    sparse = torch.compile(Chosen().eval(), backend="afbs", options={"min_length": 128, "tolerance": 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)
        sparse(drifting(LENGTH), False)
    assert any(row.outcome == "sparse" for row in afbs_compile.explain(sparse).rows)
    with pytest.warns(AfbsWarning, match="no attention call was rewritten: 1 x dropout in effect"):
        sparse(drifting(LENGTH), True)


@torch.no_grad()
def test_a_model_without_attention_is_told_what_was_looked_for(fresh_dynamo):
    model = nn.Linear(4, 4).eval()
    sparse = torch.compile(model, backend="afbs")
    with pytest.warns(AfbsWarning, match="no attention call was found"):
        sparse(torch.zeros(2, 4))
    assert "scaled_dot_product_attention, varlen_attn, or" in " ".join(str(afbs_compile.explain(sparse)).split())
