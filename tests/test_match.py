"""A recipe belongs to a model: other forms of its weights and other names of its calls are checked and used."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import afbs_compile
from afbs_compile import Recipe, match
from afbs_compile.errors import AfbsWarning
from afbs_compile.sketch import likeness, sketched
from tests.toy import Toy, drifting, without_a_clock

LENGTH = 512


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    without_a_clock(monkeypatch)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    with pytest.MonkeyPatch.context() as patch:
        without_a_clock(patch)
        return afbs_compile.calibrate(Toy().eval(), [drifting(LENGTH), drifting(LENGTH, seed=1)], min_length=128)


def served(model: nn.Module, recipe: Recipe, x: Tensor) -> tuple[afbs_compile.report.explain.Explanation, list[str]]:
    """What explain says of the model under the recipe, and the warnings on the way."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="afbs", options={"recipe": recipe, "min_length": 128})
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(x)
    said = [str(w.message) for w in caught if issubclass(w.category, AfbsWarning)]
    return afbs_compile.explain(compiled), said


class Wrapped(nn.Module):
    """The toy one level deeper, as adapters and pipelines hold models."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_model = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model(x)


class Adapted(Wrapped):
    """The toy with one more projection, as LoRA adds some."""

    def __init__(self, inner: nn.Module, strength: float = 0.0) -> None:
        super().__init__(inner)
        self.adapter = nn.Linear(128, 3, bias=False)
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model(x + self.strength * self.adapter(x).mean(-1, keepdim=True))


def test_the_same_model_is_used_without_a_word(recipe):
    explained, said = served(Toy().eval(), recipe, drifting(LENGTH))
    assert [row.outcome for row in explained.rows] == ["sparse", "sparse"]
    assert said == []


def changed(model: nn.Module, scale: float) -> nn.Module:
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in model.layers:
            layer.out.weight.add_(scale * torch.randn_like(layer.out.weight))
    return model


@pytest.mark.parametrize(
    ("model", "x", "difference"),
    [
        (Wrapped(Toy()), drifting(LENGTH), "its calls were named like layers.0, here like base_model.layers.0"),
        (Toy().bfloat16(), drifting(LENGTH).bfloat16(), "its weights were float32, here bfloat16"),
        (Toy().half(), drifting(LENGTH).half(), "its weights were float32, here float16"),
        (changed(Toy(), 2e-4), drifting(LENGTH), "trained further, merged or quantised since"),
        (Adapted(Toy()), drifting(LENGTH), "1 of 7 tensors are new, as adapters are"),
    ],
    ids=["wrapper", "bfloat16", "float16", "fine-tuned", "adapters"],
)
def test_another_form_of_the_model_is_named_checked_and_used(recipe, model, x, difference):
    explained, said = served(model.eval(), recipe, x)
    assert [row.outcome for row in explained.rows] == ["sparse", "sparse"]
    (sentence,) = said
    assert sentence.startswith("the recipe given was made for a model that differs: ")
    assert difference in sentence
    assert sentence.endswith("sparse heads hold.")


def test_an_inner_module_alone_is_recognised(recipe):
    outer = afbs_compile.calibrate(Wrapped(Toy()).eval(), [drifting(LENGTH)], min_length=128)
    explained, said = served(Toy().eval(), outer, drifting(LENGTH))
    assert {row.outcome for row in explained.rows} == {"sparse"}
    assert "its calls were named like base_model.layers.0, here like layers.0" in said[0]


def test_heads_that_do_not_hold_become_dense(recipe):
    sharp = Toy().eval()
    with torch.no_grad():
        for layer in sharp.layers:
            layer.sharpness.mul_(0.02)  # almost flat attention: what is skipped counts
    explained, said = served(sharp, recipe, drifting(LENGTH))
    assert {row.outcome for row in explained.rows} == {"dense"}
    assert all("not re-validated" in row.reason for row in explained.rows)
    assert "Checked on these inputs, 0 of " in said[0]
    assert "calibrate again" in said[0]


def test_other_weights_and_other_models_are_refused(recipe):
    other = nn.Sequential(nn.Linear(128, 128), Toy(seed=3)).eval()
    for model in (Toy(seed=9).eval(), other):
        with pytest.raises(BackendCompilerFailed, match="belongs to another model: same architecture, other weights"):
            served(model, recipe, drifting(LENGTH))


def test_a_recipe_without_sketches_serves_the_very_model_alone(recipe):
    earlier = replace(recipe, graphs=tuple(replace(graph, tensors=()) for graph in recipe.graphs))
    explained, said = served(Toy().eval(), earlier, drifting(LENGTH))
    assert ([row.outcome for row in explained.rows], said) == (["sparse", "sparse"], [])
    with pytest.raises(BackendCompilerFailed, match="other weights"):
        served(Toy().bfloat16().eval(), earlier, drifting(LENGTH).bfloat16())


def test_files_of_schema_4_are_read(recipe, tmp_path):
    recipe.save(tmp_path / "now.json")
    data = json.loads((tmp_path / "now.json").read_text())
    data["schema_version"] = 4
    for graph in data["graphs"]:
        del graph["tensors"]
    (tmp_path / "then.json").write_text(json.dumps(data))
    loaded = Recipe.load(tmp_path / "then.json")
    assert loaded.graphs[0].tensors == ()
    assert loaded.sites == recipe.sites


def test_names_change_by_what_they_begin_with():
    assert match._change("0.model.layers.3.attn", "model.layers.3.attn") == ("0", "")
    assert match._change("layers.3.attn", "model.layers.3.attn") == ("", "model")
    assert match._change("model.layers.3.attn", "model.layers.4.attn2") is None
    assert match._changed("0.model.layers.5.attn", ("0", "")) == "model.layers.5.attn"
    assert match._changed("layers.5.attn", ("", "model")) == "model.layers.5.attn"
    assert match._changed("visual.5.attn", ("model", "")) == ""


class TestSketches:
    def test_a_cast_is_near_and_another_model_is_far(self):
        def weights(seed):
            torch.manual_seed(seed)
            return [(f"{i}", torch.randn(32, 48)) for i in range(20)]

        there = sketched(weights(0))
        cast = likeness(sketched([(n, w.bfloat16()) for n, w in weights(0)]), there)
        assert (cast.same, cast.foreign) == (False, False)
        assert cast.distance < 0.004
        assert cast.dtypes == (("float32", "bfloat16"),)
        noisy = likeness(sketched([(n, w + 0.05 * torch.randn_like(w)) for n, w in weights(0)]), there)
        assert not noisy.foreign
        assert 0.01 < noisy.distance < 0.1
        assert likeness(sketched(weights(1)), there).foreign
        assert likeness(sketched(weights(0)[:3]), there).same

    def test_what_cannot_be_read_is_counted(self):
        there = sketched([("a", torch.randn(8, 8)), ("b", torch.randn(9))])
        alike = likeness(
            sketched([("a", torch.empty(8, 8, device="meta")), ("b", torch.empty(9, device="meta"))]), there
        )
        assert (alike.same, alike.foreign, alike.unread, alike.count) == (False, False, 2, 2)

    def test_what_is_written_into_is_read_again(self):
        weight = torch.randn(40)
        before = sketched([("a", weight)])
        assert sketched([("a", weight)]) == before
        weight[7] += 1
        after = sketched([("a", weight)])
        assert after[0].digest != before[0].digest

    def test_tensors_made_of_others_are_read_by_their_parts(self):
        from torch.testing._internal.two_tensor import TwoTensor

        parts = torch.randn(6, 8), torch.randn(6, 8)
        (one,) = sketched([("x", TwoTensor(*parts))])
        (same,) = sketched([("x", TwoTensor(*(part.clone() for part in parts)))])
        (other,) = sketched([("x", TwoTensor(parts[0], parts[1] + 1))])
        assert one.digest == same.digest != other.digest
        assert one.values == (None,) * 8, "it has no form that says what it stands for"
        assert likeness([other], [one]).unread == 1

    @pytest.mark.parametrize("tensor", [torch.tensor(3.0), torch.zeros(0), torch.randn(5).to(torch.float8_e4m3fn)])
    def test_tensors_of_every_kind(self, tensor):
        (sketch,) = sketched([("x", tensor)])
        assert likeness([sketch], [sketch]).same
        assert len(sketch.values) == min(8, tensor.numel())
