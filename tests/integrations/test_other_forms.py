"""A model as other libraries change it: adapters, quantised or offloaded weights, by the recipe of the model itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import afbs_compile
from afbs_compile import Recipe
from afbs_compile.errors import AfbsWarning
from tests.toy import without_a_clock

transformers = pytest.importorskip("transformers")

import afbs_compile.integrations.transformers as afbs  # noqa: E402
from tests.integrations.parallel_model import ASKED, ids, sharp_llama  # noqa: E402

WAYS = ("afbs", "compile")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_clock(monkeypatch)


@pytest.fixture
def recipe() -> Recipe:
    """Of the model as it is."""
    model = sharp_llama()
    afbs.use(model, **ASKED)
    with torch.no_grad():
        model(ids())
    found = afbs.recipe_of(model)
    assert found is not None
    return found


@torch.no_grad()
def sparse_calls(way: str, model: Any, recipe: Recipe, served: Any = None) -> tuple[int, list[str]]:
    """Calls that are sparse after a call of the model, and what was said."""
    options = {"recipe": recipe, "min_length": ASKED["min_length"]}
    exact = model(ids()).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "afbs":
            served = served or model
            afbs.use(served, **options)
        else:
            served = model = torch.compile(model, backend="afbs", options=options)
        out = model(ids()).logits
    assert 0 < float((out - exact).norm() / exact.norm()) < 0.3
    rows = afbs_compile.explain(served).rows
    said = [str(each.message) for each in caught if issubclass(each.category, AfbsWarning)]
    return sum(row.outcome == "sparse" for row in rows), said


@pytest.mark.parametrize("way", WAYS)
def test_adapters_are_new_and_the_recipe_is_checked(way: str, recipe: Recipe) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(sharp_llama(), config).eval()
    count, (said,) = sparse_calls(way, model, recipe, model.base_model.model)
    assert count == 2
    assert "tensors are new, as adapters are" in said
    assert "other weights" not in said


@pytest.mark.parametrize("way", WAYS)
def test_int8_weights_are_quantised_ones(way: str, recipe: Recipe) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights need torchao")
    model = sharp_llama()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    count, (said,) = sparse_calls(way, model, recipe)
    assert count == 2
    assert "trained further, merged or quantised since" in said


def test_offloaded_weights_are_read_where_they_are_kept(recipe: Recipe) -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    model = accelerate.cpu_offload(sharp_llama(), execution_device="cpu")
    assert all(weight.is_meta for weight in model.parameters())
    assert sparse_calls("afbs", model, recipe) == (2, [])


def test_offloaded_weights_have_a_recipe_of_their_own(recipe: Recipe) -> None:
    """Nothing is known of them: the first call calibrates, and what it finds is the model's."""
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    model = accelerate.cpu_offload(sharp_llama(), execution_device="cpu")
    afbs.use(model, **ASKED)
    with torch.no_grad():
        model(ids())
    mine = afbs.recipe_of(model)
    assert mine is not None
    assert mine.device == "cpu"
    assert mine.graphs[0].weights == recipe.graphs[0].weights
    assert [site.calibrated.tau for site in mine.sites] == [site.calibrated.tau for site in recipe.sites]
