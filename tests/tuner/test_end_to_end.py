"""The model's output under thresholds: dense is unchanged, sparse is what the rewritten graph computes."""

from __future__ import annotations

import math

import pytest
import torch

from afbs_compile.calibration import calibrate
from afbs_compile.errors import OptionError
from afbs_compile.kernels.attend.run import run as run_sparsely
from afbs_compile.kernels.call import SparseCall
from afbs_compile.passes.capture import SampleRun, capture, run_with
from afbs_compile.passes.find import find
from afbs_compile.passes.record import record_graphs
from afbs_compile.tuner.end_to_end import EndToEnd, cost_of_output, find_logits, next_tokens, output_change
from afbs_compile.tuner.measure import LOCAL_KEPT, attend_sparsely
from afbs_compile.tuner.site import tune_site
from tests.toy import HEADS, TOKENS, LanguageToy, always_faster, token_ids

LENGTH = 512


@pytest.fixture
def runs(fresh_dynamo):
    model = LanguageToy(LENGTH).eval()
    (graph,) = record_graphs(model, [token_ids(LENGTH, seed=0), token_ids(LENGTH, seed=1)])
    sites = find(graph.gm, min_length=1)[0]
    return model, [SampleRun(graph.gm, sites, inputs) for inputs in graph.samples]


def at(tau: float) -> SparseCall:
    return SparseCall.uniform(HEADS, tau)


def names(runs) -> list[str]:
    return [site.name for site in runs[0].sites]


@torch.no_grad()
def test_nothing_sparse_is_the_model(runs):
    model, samples = runs
    (logits,) = run_with(samples[1], lambda *_: None)
    torch.testing.assert_close(logits, model(token_ids(LENGTH, seed=1)))


def test_dense_changes_nothing(runs):
    _, samples = runs
    changes = EndToEnd(samples)({name: at(1.0) for name in names(samples)})
    assert [(change.kl, change.loss) for change in changes] == [(0.0, 0.0)] * 2


def test_sparser_is_further_and_each_site_adds(runs):
    _, samples = runs
    meter = EndToEnd(samples)
    first, second = names(samples)
    little, much = (meter({first: at(tau), second: at(tau)})[0].kl for tau in (0.95, 0.3))
    assert 0 < little < much
    alone = [meter({name: at(0.3)})[0].kl for name in (first, second)]
    assert sum(alone) == pytest.approx(much, rel=0.5)
    assert meter.evaluations == 2 + 2 * 4


def test_later_sites_are_captured_on_what_sparse_earlier_ones_make(runs):
    _, samples = runs
    run = samples[:1]

    def sparse(name, operands):
        return attend_sparsely(operands, at(0.3)) if name == names(samples)[0] else None

    seen = {name: ops[0] for name, ops in capture(run, sparse)}
    plain = {name: ops[0] for name, ops in capture(run)}
    first, second = names(samples)
    assert torch.equal(seen[first].q, plain[first].q)
    assert not torch.allclose(seen[second].q, plain[second].q)
    by_hand, _ = run_sparsely(plain[first], at(0.3))
    torch.testing.assert_close(attend_sparsely(plain[first], at(0.3)), by_hand)


def test_change_against_plain_formulas():
    torch.manual_seed(0)
    dense, sparse = torch.randn(2, 7, 11), torch.randn(2, 7, 11)
    tokens = torch.randint(0, 11, (2, 7))
    change = output_change(dense, sparse, tokens[:, 1:])
    p, q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    assert change.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    loss = (p - q)[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    assert change.loss == pytest.approx(float(loss), rel=1e-5)


def test_chunks_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    dense, sparse = torch.randn(1, 33, 11), torch.randn(1, 33, 11)
    targets = torch.randint(0, 11, (1, 32))
    whole = output_change(dense, sparse, targets)
    monkeypatch.setattr("afbs_compile.tuner.end_to_end.CHUNK_ELEMENTS", 50)
    parts = output_change(dense, sparse, targets)
    assert parts.kl == pytest.approx(whole.kl)
    assert parts.loss == pytest.approx(whole.loss)


def test_unknown_tokens_give_no_perplexity():
    logits = torch.randn(1, 4, 5)
    assert math.isnan(output_change(logits, logits, None).loss)


def test_tokens_of_the_graph_are_found(runs):
    _, samples = runs
    targets = next_tokens(samples[1], torch.empty(1, LENGTH, TOKENS))
    assert torch.equal(targets, token_ids(LENGTH, seed=1)[:, 1:])
    assert next_tokens(samples[1], torch.empty(1, 1, TOKENS)) is None


def test_caches_and_hidden_states_are_not_logits():
    logits = torch.randn(1, 8, 50)
    outputs = [torch.randn(1, 4, 8, 64), logits, torch.randn(1, 8, 16), torch.zeros(1, 8, dtype=torch.long)]
    assert find_logits(outputs) is logits


@pytest.mark.parametrize("outputs", [(), (torch.randn(1, 8, 50), torch.randn(1, 8, 50)), (torch.randn(1, 2, 8, 9),)])
def test_no_clear_logits_are_refused(outputs):
    with pytest.raises(OptionError, match="tolerance: a budget on the output needs logits"):
        find_logits(outputs)


def test_a_calibration_captures_later_sites_on_what_sparse_earlier_ones_make(runs, monkeypatch):
    monkeypatch.setattr("afbs_compile.tuner.speed.SiteSpeed.measure", always_faster)
    seen = []
    tuned = tune_site

    def spy(samples, *arguments, **keywords):
        result = tuned(samples, *arguments, **keywords)
        seen.append((samples[0], result))
        return result

    monkeypatch.setattr("afbs_compile.tuner.graph.tune_site", spy)
    model, samples = runs
    recipe = calibrate(model, [token_ids(LENGTH, seed=0)], tolerance=0.3, min_length=1)
    (_, first), (second, _) = seen
    assert first.measured.sparsity.mean() > 0
    recorded = recipe.sites[0].calibrated
    assert (recorded.shape, recorded.policy, recorded.kept) == (first.call.shape, first.call.policy, LOCAL_KEPT)
    assert recorded.tau == pytest.approx(first.call.tau, abs=1e-6)
    expected = {
        name: operands[0]
        for name, operands in capture(
            samples[:1],
            lambda name, operands: attend_sparsely(operands, first.call) if name == names(samples)[0] else None,
        )
    }
    torch.testing.assert_close(second.q, expected[names(samples)[1]].q)
    dense = {name: operands[0] for name, operands in capture(samples[:1])}
    assert not torch.allclose(second.q, dense[names(samples)[1]].q)


@pytest.mark.parametrize("quantity", ["kl", "perplexity", "output"])
def test_the_cost_of_one_output_is_what_calibration_would_measure(runs, quantity):
    run = runs[1][0]
    calls = {name: at(0.3) for name in names(runs[1])}
    (expected,) = EndToEnd([run], quantity)(calls)
    dense = run_with(run, lambda *_: None)
    sparse = run_with(run, lambda name, operands: attend_sparsely(operands, calls[name]))
    found = cost_of_output(run, dense, sparse, quantity)
    assert found == pytest.approx(getattr(expected, "loss" if quantity == "perplexity" else quantity))
    assert found != 0


def test_a_cost_in_perplexity_without_tokens_is_refused_as_a_budget_is(runs, monkeypatch):
    run = runs[1][0]
    dense = run_with(run, lambda *_: None)
    monkeypatch.setattr("afbs_compile.tuner.end_to_end.next_tokens", lambda *_: None)
    with pytest.raises(OptionError, match="a budget on perplexity needs the tokens"):
        cost_of_output(run, dense, dense, "perplexity")
    assert cost_of_output(run, dense, dense, "kl") == 0
