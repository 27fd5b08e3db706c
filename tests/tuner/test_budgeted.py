"""``tolerance={"kl": x}``: from samples to a recipe whose model stays inside the budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from afbs_compile import Recipe, calibrate, explain
from afbs_compile.errors import OptionError
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.tuner.end_to_end import output_change
from afbs_compile.tuner.kept import LOCAL_KEYS
from tests.toy import Attention, LanguageToy, Toy, drifting, token_ids, without_a_clock

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "sparse_is_faster")

LENGTH = 512
LIMIT = 1e-5
"""Nats: less than it costs to compute only what is always kept."""


def samples(count: int) -> list[torch.Tensor]:
    return [token_ids(LENGTH, seed) for seed in range(count)]


@pytest.fixture(scope="module")
def inside_the_limit() -> Recipe:
    """Of two samples; for tests that only read it."""
    with pytest.MonkeyPatch.context() as patch:
        without_a_clock(patch)
        return calibrate(LanguageToy(LENGTH).eval(), samples(2), tolerance={"kl": LIMIT}, min_length=1)


@torch.no_grad()
def cost(model: nn.Module, recipe: Recipe, ids: torch.Tensor) -> float:
    sparse = torch.compile(model, backend="afbs", options={"recipe": recipe, "min_length": 1})
    return output_change(model(ids), sparse(ids), ids[:, 1:]).kl


def test_the_compiled_model_stays_inside_and_the_recipe_says_so(tmp_path):
    model = LanguageToy(LENGTH).eval()
    recipe = calibrate(model, samples(4), tolerance={"kl": LIMIT}, min_length=1)
    budget = recipe.budget
    assert budget is not None
    assert recipe.tolerance is None
    assert (budget.quantity, budget.limit, budget.chosen_on, budget.checked_on) == ("kl", LIMIT, 2, 2)
    assert LIMIT / 2 < budget.measured <= LIMIT
    assert budget.checked is not None
    assert budget.checked <= LIMIT
    assert recipe.sparsity > 0.1
    for site in recipe.sites:
        assert [trial.local_keys for trial in site.kept_tried] == list(LOCAL_KEYS)
        assert site.calibrated.kept.local_keys == 64, "its rows look back no further"
    assert "blocks 64x64, 64 keys before a query block of causal calls kept" in " ".join(str(explain(recipe)).split())
    assert cost(model, recipe, token_ids(LENGTH, 9)) <= 1.3 * LIMIT  # another sample, which nothing was promised about
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert "budget on the output: KL at most 1e-05 nats" in str(explain(recipe))


def test_more_budget_is_sparser(inside_the_limit):
    more = calibrate(LanguageToy(LENGTH).eval(), samples(2), tolerance={"kl": 100 * LIMIT}, min_length=1)
    assert inside_the_limit.sparsity < more.sparsity


def test_perplexity_is_measured_on_the_samples_tokens():
    recipe = calibrate(LanguageToy(LENGTH).eval(), samples(2), tolerance={"perplexity": 0.001}, min_length=1)
    assert recipe.budget is not None
    assert recipe.budget.measured <= 0.001
    assert "perplexity at most +0.1 %" in str(explain(recipe))


def test_windows_of_one_sample_choose_and_check():
    recipe = calibrate(LanguageToy(LENGTH).eval(), samples(1), tolerance={"kl": 10 * LIMIT}, min_length=1)
    budget = recipe.budget
    assert budget is not None
    assert (budget.unit, budget.chosen_on, budget.checked_on) == ("windows", 5, 5)
    assert budget.checked is not None
    assert budget.checked_upper is not None
    assert budget.checked <= 10 * LIMIT
    assert budget.checked < budget.checked_upper
    assert "on the 5 windows that chose" in " ".join(str(explain(recipe)).split())


def test_any_model_takes_the_same_few_passes(inside_the_limit):
    assert inside_the_limit.budget is not None
    assert inside_the_limit.budget.forward_passes <= 12


def test_every_head_has_one_threshold(inside_the_limit):
    (tau,) = {tau for site in inside_the_limit.sites for tau in site.calibrated.tau}
    (policy,) = {name for site in inside_the_limit.sites for name in site.calibrated.policy}
    assert inside_the_limit.budget is not None
    assert (1 - tau) / tau == pytest.approx(inside_the_limit.budget.threshold, rel=0.01)
    assert POLICIES[policy].rule == "share"


def test_the_output_s_own_error():
    """A model that returns no logits: relative L1 of what it returns."""
    recipe = calibrate(
        Toy().eval(), [drifting(LENGTH, seed=s) for s in range(2)], tolerance={"output": 0.02}, min_length=1
    )
    assert recipe.budget is not None
    assert 0 < recipe.budget.measured <= 0.02
    model, x = Toy().eval(), drifting(LENGTH, seed=0)
    sparse = torch.compile(model, backend="afbs", options={"recipe": recipe, "min_length": 1})
    with torch.no_grad():
        dense = model(x)
        error = float((sparse(x) - dense).abs().sum() / dense.abs().sum())
    assert error == pytest.approx(recipe.budget.measured, rel=0.05)
    assert "error at most 0.02" in str(explain(recipe))


@torch.no_grad()
def test_in_the_backend():
    model = LanguageToy(LENGTH).eval()
    options = {"tolerance": {"kl": LIMIT}, "samples": samples(2), "min_length": 1}
    compiled = torch.compile(model, backend="afbs", options=options)
    ids = token_ids(LENGTH, 5)
    change = output_change(model(ids), compiled(ids), ids[:, 1:])
    assert LIMIT / 3 < change.kl <= 1.5 * LIMIT


class TwoOutputs(nn.Module):
    """Nothing says which one is the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Toy()

    def forward(self, x):
        return self.body(x), self.body(2 * x)


class Broken(nn.Module):
    """Two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize(
    ("model", "tolerance", "sentence"),
    [
        (TwoOutputs, {"kl": 0.01}, "a budget on the output needs logits"),
        (Toy, {"perplexity": 0.01}, "a budget on perplexity needs the tokens"),
        (TwoOutputs, {"output": 0.01}, "a budget on the output needs one"),
        (Broken, {"kl": 0.01}, "needs the model in one graph"),
    ],
)
def test_models_without_clear_logits_are_refused(model, tolerance, sentence):
    with pytest.raises(OptionError, match="tolerance") as caught:
        calibrate(model().eval(), [drifting(LENGTH)], tolerance=tolerance, min_length=1)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "tolerance", [{}, {"kl": 0}, {"kl": "x"}, {"loss": 0.1}, {"kl": 0.1, "perplexity": 0.1}, {"kl": True}]
)
def test_wrong_budgets_are_refused(tolerance):
    with pytest.raises(OptionError, match="tolerance: got .*accepted: a number between 0 and 1, or one of 'kl' or"):
        calibrate(Toy(), [drifting(LENGTH)], tolerance=tolerance)


def test_the_paper_has_no_budget():
    with pytest.raises(OptionError, match="method: got 'paper'"):
        calibrate(Toy(), [drifting(LENGTH)], tolerance={"kl": 0.1}, method="paper")


def test_a_language_model_has_a_budget_where_nothing_is_said():
    recipe = calibrate(LanguageToy(LENGTH).eval(), samples(1), min_length=1)
    assert recipe.budget is not None
    assert (recipe.budget.quantity, recipe.budget.limit) == ("kl", 0.01)
    assert recipe.options["tolerance"] == {"kl": 0.01}


@pytest.mark.parametrize(
    ("model", "inputs", "asked"),
    [
        (Toy, drifting, {}),
        (Broken, drifting, {}),
        (lambda: LanguageToy(LENGTH), token_ids, {"method": "paper"}),
        (lambda: LanguageToy(LENGTH), token_ids, {"tolerance": 0.055}),
    ],
    ids=["no tokens", "several graphs", "paper", "a number"],
)
def test_others_have_a_tolerance_per_head(model, inputs, asked):
    recipe = calibrate(model().eval(), [inputs(LENGTH)], min_length=1, **asked)
    assert (recipe.budget, recipe.tolerance) == (None, 0.055)
    assert "tolerance 0.055 on every head" in str(explain(recipe))


@torch.no_grad()
def test_the_shape_that_is_asked_about_gets_no_guard():
    """Whether a graph returns logits is known without fixing a length that is dynamic."""
    compiled = torch.compile(LanguageToy(LENGTH).eval(), backend="afbs", options={"min_length": 1}, dynamic=True)
    compiled(token_ids(LENGTH))
    assert "budget on the output" in str(explain(compiled))
    compiled(token_ids(LENGTH - 128))
    assert len(_debug_get_cache_entry_list(LanguageToy.forward.__code__)) == 1
