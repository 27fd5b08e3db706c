"""``torch.compile(model, backend="afbs")`` from the outside."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import afbs_compile
from afbs_compile.errors import AfbsWarning, CalibrationError, OptionError, RecipeError
from afbs_compile.kernels.call import Kept
from afbs_compile.tuner import site as tuner_site
from tests.toy import HEAD_DIM, HEADS, WIDTH, Attention, Toy, always_faster, drifting

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "sparse_is_faster")

LENGTH = 1024
OPTIONS = {"min_length": 128}


@pytest.fixture
def never_calibrates(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("calibrated again")

    return lambda: monkeypatch.setattr("afbs_compile.backend.calibrate_graph", fail)


def compiled(model, **options):
    return torch.compile(model, backend="afbs", fullgraph=True, options={**OPTIONS, **options})


def relative_l1(a, b):
    return float((a - b).abs().sum() / b.abs().sum())


def test_the_entry_point_is_registered():
    assert "afbs" in torch._dynamo.list_backends()


@torch.no_grad()
def test_a_model_is_found_calibrated_rewritten_and_close_to_dense():
    model, x = Toy().eval(), drifting(LENGTH)
    sparse = compiled(model)
    out = sparse(x)
    explanation = afbs_compile.explain(sparse)
    assert [row.site for row in explanation.rows] == ["layers.0", "layers.1"]
    assert [row.outcome for row in explanation.rows] == ["sparse", "sparse"]
    assert all(row.sparsity > 0.2 and 0 < row.error <= 0.055 for row in explanation.rows)
    assert explanation.after[0].count("torch.ops.afbs.sparse_attention") == 2
    assert "_nn.scaled_dot_product_attention" not in explanation.after[0]
    assert explanation.before[0].count("_nn.scaled_dot_product_attention") == 2
    difference = relative_l1(out, model(x))
    assert 0 < difference <= 0.055


@torch.no_grad()
def test_other_samples_and_tolerances_reach_the_tuner():
    model, x = Toy().eval(), drifting(LENGTH)
    loose, tight = compiled(model, tolerance=0.05), compiled(Toy(seed=1).eval(), tolerance=0.005)
    loose(x), tight(x)
    loose, tight = afbs_compile.explain(loose), afbs_compile.explain(tight)
    assert max(row.error for row in tight.rows) <= 0.005 < max(row.error for row in loose.rows) <= 0.05


@torch.no_grad()
def test_a_second_process_finds_the_recipe(never_calibrates):
    x = drifting(LENGTH)
    first = compiled(Toy().eval())(x)
    torch._dynamo.reset()
    never_calibrates()
    assert torch.equal(compiled(Toy().eval())(x), first)


@torch.no_grad()
def test_other_weights_tolerance_or_samples_calibrate_again(never_calibrates):
    x = drifting(LENGTH)
    compiled(Toy().eval())(x)
    never_calibrates()
    changed = Toy().eval()
    changed.layers[0].qkv.weight[5, 7] += 1e-3
    for model, options in (
        (changed, {}),
        (Toy().eval(), {"tolerance": 0.02}),
        (Toy().eval(), {"samples": [x]}),
        (Toy().eval(), {"method": "paper"}),
    ):
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match="calibrated again"):
            compiled(model, **options)(x)


@torch.no_grad()
def test_a_new_length_reuses_the_recipe(never_calibrates):
    model = Toy().eval()
    sparse = compiled(model)
    sparse(drifting(LENGTH))
    never_calibrates()
    for length in (1536, 1100):
        x = drifting(length, seed=3)
        assert relative_l1(sparse(x), model(x)) <= 0.1
    assert len(afbs_compile.explain(sparse).after) >= 2


@torch.no_grad()
def test_below_the_crossover_the_model_is_the_dense_one(never_calibrates, monkeypatch):
    slow = tuner_site.SiteSpeed(2.0, 1.0, LENGTH)
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(lambda *_, **__: slow))
    model = Toy().eval()
    sparse = torch.compile(model, backend="afbs", dynamic=False, options=OPTIONS)
    sparse(drifting(LENGTH))
    x = drifting(512)
    assert torch.allclose(sparse(x), torch.compile(model)(x), atol=1e-5)
    rows = [row for row in afbs_compile.explain(sparse).rows if row.graph == 1]
    assert {row.outcome for row in rows} == {"dense"}
    assert rows[0].reason == "too short: 512 tokens, sparse was measured to pay from 1024"


@torch.no_grad()
@pytest.mark.parametrize("first", [LENGTH, 512], ids=["long-first", "short-first"])
def test_free_lengths_below_the_crossover_keep_the_real_call(first, monkeypatch):
    crossover = tuner_site.SiteSpeed(2.0, 1.0, LENGTH)
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(lambda *_, **__: crossover))
    model = Toy().eval()
    recipe = afbs_compile.calibrate(model, [drifting(LENGTH)], min_length=128)
    sparse = torch.compile(model, backend="afbs", dynamic=True, fullgraph=True, options={**OPTIONS, "recipe": recipe})
    sparse(drifting(first))
    for length in (512, 600, 1023):
        x = drifting(length)
        assert torch.allclose(sparse(x), model(x), atol=1e-5)
    for length in (LENGTH, 1301):
        assert relative_l1(sparse(drifting(length)), model(drifting(length))) > 1e-4
    explanation = afbs_compile.explain(sparse)
    assert len(explanation.after) == 2, "each side of the crossover is one graph"
    outcomes = [{row.outcome for row in explanation.rows if row.graph == graph} for graph in range(2)]
    assert outcomes == ([{"sparse"}, {"dense"}] if first == LENGTH else [{"dense"}, {"sparse"}])
    dense_graph = explanation.after[outcomes.index({"dense"})]
    assert "afbs.sparse_attention" not in dense_graph
    assert dense_graph.count("_nn.scaled_dot_product_attention") == 2


@torch.no_grad()
def test_a_length_that_the_user_keeps_free_is_decided_by_the_operator(monkeypatch):
    crossover = tuner_site.SiteSpeed(2.0, 1.0, LENGTH)
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(lambda *_, **__: crossover))
    model = Toy().eval()
    sparse = compiled(model)
    for length in (LENGTH, 512, 1301):
        x = drifting(length)
        torch._dynamo.mark_dynamic(x, 1, min=128, max=4096)  # a guard inside these bounds would be an error
        difference = relative_l1(sparse(x), model(x))
        assert difference < 1e-5 if length < LENGTH else difference > 1e-4
    (after,) = afbs_compile.explain(sparse).after
    assert "min_length = 1024" in after


@torch.no_grad()
def test_a_site_that_is_not_faster_stays_dense(monkeypatch):
    slow = tuner_site.SiteSpeed(1.0, 1.1, None)
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(lambda *_, **__: slow))
    sparse = compiled(Toy().eval())
    with pytest.warns(AfbsWarning, match="not faster"):
        sparse(drifting(LENGTH))
    assert {row.reason for row in afbs_compile.explain(sparse).rows} == {"not faster: 1.1 ms sparse, 1 ms dense"}


class Masked(nn.Module):
    """A toy layer under a dense mask, as transformers hands it to attention."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.layer, self.extra = Attention(), extra

    def forward(self, x):
        places = torch.arange(x.shape[1])
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.layer.qkv(x).chunk(3, -1))
        mask = (places <= places[:, None] + self.extra)[None, None]
        o = F.scaled_dot_product_attention(q * self.layer.sharpness, k, v, attn_mask=mask)
        return self.layer.out(o.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_call_that_stays_dense_loses_a_mask_that_is_proven_causal(monkeypatch, dynamic):
    slow = tuner_site.SiteSpeed(1.0, 1.1, None)
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(lambda *_, **__: slow))
    model = Masked(extra=0).eval()
    sparse = torch.compile(model, backend="afbs", fullgraph=True, dynamic=dynamic, options=OPTIONS)
    with pytest.warns(AfbsWarning, match="mask dropped: causal; nothing else in this graph changed"):
        sparse(drifting(LENGTH))
    for length in (LENGTH, 700):
        x = drifting(length, seed=1)
        torch.testing.assert_close(sparse(x), model(x))
    explanation = afbs_compile.explain(sparse)
    reason = "not faster: 1.1 ms sparse, 1 ms dense; stays dense; mask dropped: causal"
    assert {(row.outcome, row.reason) for row in explanation.rows} == {("dense", reason)}
    for before, after in zip(explanation.before, explanation.after, strict=True):
        assert "attn_mask" in before
        assert "arange" in before
        assert "is_causal = True" in after
        assert "arange" not in after


@torch.no_grad()
def test_another_mask_is_kept(monkeypatch):
    slow = tuner_site.SiteSpeed(1.0, 1.1, None)
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(lambda *_, **__: slow))
    model, x = Masked(extra=1).eval(), drifting(LENGTH)
    sparse = compiled(model)
    torch.testing.assert_close(sparse(x), model(x))
    (row,) = afbs_compile.explain(sparse).rows
    assert (row.outcome, row.reason) == ("dense", "not faster: 1.1 ms sparse, 1 ms dense")
    assert "arange" in afbs_compile.explain(sparse).after[0]


@torch.no_grad()
def test_no_attention_is_said_once_and_runs_unchanged():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    sparse = torch.compile(model, backend="afbs", dynamic=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (2, 3, 5):
            x = torch.randn(rows, 8)
            assert torch.allclose(sparse(x), model(x), atol=1e-6)
    said = [w for w in caught if issubclass(w.category, AfbsWarning)]
    assert len(said) == 1
    assert "no attention call was found" in str(said[0].message)


def test_training_is_refused_and_still_learns():
    model, x = Toy(), drifting(256)
    sparse = compiled(model)
    with pytest.warns(AfbsWarning, match="gradient needed"):
        sparse(x).square().mean().backward()
    gradient = model.layers[0].qkv.weight.grad.clone()
    model.zero_grad()
    model(x).square().mean().backward()
    assert torch.allclose(gradient, model.layers[0].qkv.weight.grad, atol=1e-5)
    assert all(row.outcome == "refused" for row in afbs_compile.explain(sparse).rows)


@torch.no_grad()
def test_an_encoder_layer_is_opened_and_its_attention_found():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True).eval()
    x = drifting(LENGTH)
    sparse = torch.compile(model, backend="afbs", options={**OPTIONS, "tolerance": 0.2})
    out = sparse(x)
    rows = afbs_compile.explain(sparse).rows
    assert [(row.outcome, row.heads) for row in rows] in ([("sparse", 4)], [("dense", 4)])
    assert relative_l1(out, model(x)) <= 0.2


@torch.no_grad()
def test_functions_compile_and_explain():
    def attend(x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    q = drifting(LENGTH).view(1, LENGTH, 4, 32).transpose(1, 2) * 3
    sparse = compiled(attend)
    assert relative_l1(sparse(q), attend(q)) <= 0.055
    assert [row.outcome for row in afbs_compile.explain(sparse).rows] == ["sparse"]


def test_explain_before_the_first_call_says_so():
    assert "call the model once" in str(afbs_compile.explain(torch.compile(Toy(), backend="afbs")))


def test_explain_refuses_what_was_not_compiled():
    with pytest.raises(TypeError, match="compiled_or_recipe: got Toy"):
        afbs_compile.explain(Toy())


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tolerence": 0.1}, "unknown option 'tolerence'; known options: tolerance, method"),
        ({"tolerance": 0}, "tolerance: got 0; accepted: a number between 0 and 1"),
        ({"tolerance": "low"}, "tolerance: got 'low'"),
        ({"method": "guess"}, "method: got 'guess'; accepted: 'afbs' or 'paper'"),
        ({"parameterization": 1}, "parameterization: got 1"),
        ({"min_length": 0}, "min_length: got 0"),
        ({"samples": 3}, "samples: got 3; accepted: an iterable of model inputs"),
        ({"samples": []}, "samples: got none"),
        ({"recipe": 7}, "recipe: got 7"),
        ({"recipe": "/absent/recipe.json"}, "cannot be read"),
        ({"recipe": "r.json", "tolerance": 0.1}, "tolerance: not accepted together with recipe"),
        ({"dump": 1}, "dump: got 1"),
    ],
)
def test_bad_options_name_the_option_and_what_is_accepted(options, sentence):
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(Toy().eval(), **options)(drifting(256))
    assert sentence in str(caught.value)
    assert isinstance(caught.value.inner_exception, OptionError | RecipeError)


@torch.no_grad()
def test_recipe_from_calibrate_is_used_as_it_is(never_calibrates, tmp_path):
    x = drifting(LENGTH)
    recipe = afbs_compile.calibrate(Toy().eval(), [x, drifting(LENGTH, seed=1)], min_length=128)
    recipe.save(tmp_path / "toy.json")
    never_calibrates()
    from_object = compiled(Toy().eval(), recipe=recipe)(x)
    torch._dynamo.reset()
    sparse = compiled(Toy().eval(), recipe=tmp_path / "toy.json")
    assert torch.equal(sparse(x), from_object)
    tau = recipe.sites[0].calibrated.tau[0]
    assert f"{tau:.6g}" in afbs_compile.explain(sparse).after[0]


@torch.no_grad()
def test_the_recipe_of_another_model_is_refused(tmp_path):
    recipe = afbs_compile.calibrate(Toy().eval(), [drifting(LENGTH)], min_length=128)
    recipe.save(tmp_path / "toy.json")
    with pytest.raises(BackendCompilerFailed, match="toy.json belongs to another model: same architecture"):
        compiled(Toy(seed=9).eval(), recipe=tmp_path / "toy.json")(drifting(LENGTH))
    other = nn.Sequential(Toy(seed=9).layers[0]).eval()
    with pytest.raises(BackendCompilerFailed, match="the recipe given belongs to another model: "):
        compiled(other, recipe=recipe)(drifting(LENGTH))


@torch.no_grad()
def test_a_damaged_cache_is_reported_and_calibration_runs():
    x = drifting(LENGTH)
    first = compiled(Toy().eval())(x)
    (cached,) = Path(os.environ["AFBS_CACHE_DIR"]).iterdir()
    for text in ("{", json.dumps({**json.loads(cached.read_text()), "schema_version": 99})):
        cached.write_text(text)
        torch._dynamo.reset()
        with pytest.warns(AfbsWarning, match="Calibrating again"):
            again = compiled(Toy().eval())(x)
        assert torch.equal(again, first)
        json.loads(cached.read_text())


@torch.no_grad()
def test_recipes_that_keep_other_blocks_are_not_taken_from_the_cache(monkeypatch):
    compiled(Toy().eval())(drifting(LENGTH))
    monkeypatch.setattr("afbs_compile.tuner.measure.LOCAL_KEPT", Kept())
    torch._dynamo.reset()
    compiled(Toy().eval())(drifting(LENGTH))
    assert len(list(Path(os.environ["AFBS_CACHE_DIR"]).iterdir())) == 2


@torch.no_grad()
def test_recipes_of_another_version_are_not_taken_from_the_cache(monkeypatch, calibrations):
    compiled(Toy().eval())(drifting(LENGTH))
    monkeypatch.setattr("afbs_compile.conditions.__version__", "0.0")  # it may know other candidates
    torch._dynamo.reset()
    compiled(Toy().eval())(drifting(LENGTH))
    assert len(calibrations) == 2


@torch.no_grad()
def test_a_folder_that_cannot_be_written_only_warns(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AFBS_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(AfbsWarning, match="not cached"):
        compiled(Toy().eval())(drifting(LENGTH))


@torch.no_grad()
def test_graphs_are_dumped(tmp_path):
    compiled(Toy().eval(), dump=tmp_path / "graphs")(drifting(LENGTH))
    names = sorted(path.name.split(".", 1)[1] for path in (tmp_path / "graphs").iterdir())
    assert names == ["after.py", "before.py"]
    after = next((tmp_path / "graphs").glob("*.after.py")).read_text()
    assert "afbs.sparse_attention" in after


@torch.no_grad()
def test_samples_are_used_and_recorded():
    x = drifting(LENGTH)
    sparse = compiled(Toy().eval(), samples=(drifting(LENGTH, seed=s) for s in range(3)))
    sparse(x)
    sparse(drifting(1500))  # compiled again: the generator is spent, its samples are not forgotten
    (cached,) = Path(os.environ["AFBS_CACHE_DIR"]).iterdir()
    recipe = afbs_compile.Recipe.load(cached)
    samples = recipe.graphs[0].samples
    assert (samples.source, samples.count, samples.validation_inputs) == ("samples", 3, 3)
    assert samples.lengths == (LENGTH, LENGTH)
    assert all(len(head.validation_errors) == 3 for site in recipe.sites for head in site.heads)


@torch.no_grad()
def test_one_long_sample_is_split_into_disjoint_windows():
    sparse = compiled(Toy().eval(), samples=[drifting(2 * LENGTH + 100)])
    sparse(drifting(LENGTH))
    (cached,) = Path(os.environ["AFBS_CACHE_DIR"]).iterdir()
    assert afbs_compile.Recipe.load(cached).graphs[0].samples.count == 2


@torch.no_grad()
def test_the_first_call_alone_is_validated_on_windows_of_its_queries():
    compiled(Toy().eval())(drifting(LENGTH))
    (cached,) = Path(os.environ["AFBS_CACHE_DIR"]).iterdir()
    samples = afbs_compile.Recipe.load(cached).graphs[0].samples
    assert (samples.source, samples.count, samples.validation_inputs) == ("first call", 1, 5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([torch.zeros(1, LENGTH)], "accepted: torch.float32 [1, 1024, 128]"),
        ([torch.zeros(1, 100, WIDTH)], "or longer in one dimension"),
        (
            [{"y": torch.zeros(1, LENGTH, WIDTH), "z": torch.zeros(1)}],
            "got the arguments y, z; accepted: a mapping with the tensors x",
        ),
        ([(torch.zeros(1), torch.zeros(1))], "samples[0]: got 2 values; accepted: a mapping with the tensors x"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples, sentence):
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(Toy().eval(), samples=samples)(drifting(LENGTH))
    assert sentence in str(caught.value)


@torch.no_grad()
def test_modes_of_inductor_are_passed_on():
    x = drifting(256)
    with pytest.warns(AfbsWarning):
        out = torch.compile(Toy().eval(), backend="afbs", mode="reduce-overhead")(x)
    assert torch.allclose(out, Toy().eval()(x), atol=1e-5)


@torch.no_grad()
def test_dynamic_shapes_from_the_first_call(never_calibrates, monkeypatch):
    # A crossover between the lengths would make a graph for either side of it.
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(always_faster))
    model = Toy().eval()
    sparse = torch.compile(model, backend="afbs", dynamic=True, fullgraph=True, options=OPTIONS)
    x = drifting(LENGTH)
    assert relative_l1(sparse(x), model(x)) <= 0.055
    never_calibrates()
    for length in (700, 1301):
        x = drifting(length, seed=5)
        assert relative_l1(sparse(x), model(x)) <= 0.1
    (graph,) = {row.graph for row in afbs_compile.explain(sparse).rows}
    assert graph == 0


def test_inference_mode_and_ambient_autocast():
    model, x = Toy().eval(), drifting(LENGTH)
    sparse = compiled(model)
    with torch.inference_mode():
        assert relative_l1(sparse(x), model(x)) <= 0.055
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AfbsWarning)
            assert relative_l1(compiled(model)(x).float(), expected.float()) <= 0.08


@torch.no_grad()
def test_every_graph_of_a_broken_model_is_calibrated_and_explained():
    class Broken(Toy):
        def forward(self, x):
            x = x + 0.1 * self.layers[0](x)
            torch._dynamo.graph_break()
            return x + 0.1 * self.layers[1](x)

    model, x = Broken().eval(), drifting(LENGTH)
    sparse = torch.compile(model, backend="afbs", options=OPTIONS)
    assert relative_l1(sparse(x), model(x)) <= 0.055
    rows = afbs_compile.explain(sparse).rows
    assert [(row.graph, row.site, row.outcome) for row in rows] == [
        (0, "layers.0", "sparse"),
        (1, "layers.1", "sparse"),
    ]
    assert "graph" in str(afbs_compile.explain(sparse)).splitlines()[1]
    torch._dynamo.reset()
    recipe = afbs_compile.calibrate(model, [x], min_length=128)
    assert [site.name for site in recipe.sites] == ["layers.0", "layers.1"]
    sparse = torch.compile(model, backend="afbs", options={**OPTIONS, "recipe": recipe})
    assert relative_l1(sparse(x), model(x)) <= 0.055


class OnlyAttentionBetweenBreaks(nn.Module):
    """Three graphs; the one in the middle has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x):
        q = (x + 0.01 * self.first(x)).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        torch._dynamo.graph_break()
        o = F.scaled_dot_product_attention(3 * q, 3 * q, q, is_causal=True)
        torch._dynamo.graph_break()
        return self.last(o.transpose(1, 2).flatten(2))


def attend_between_breaks(q):
    torch._dynamo.graph_break()
    o = F.scaled_dot_product_attention(3 * q, 3 * q, q, is_causal=True)
    torch._dynamo.graph_break()
    return o


class AttentionInAFrameOfItsOwn(OnlyAttentionBetweenBreaks):
    """A function that breaks the graph is compiled by itself, and resumes by itself."""

    def forward(self, x):
        q = (x + 0.01 * self.first(x)).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        return self.last(attend_between_breaks(q).transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("kind", [OnlyAttentionBetweenBreaks, AttentionInAFrameOfItsOwn])
@pytest.mark.parametrize("way", ["module", "in place", "method", "function around it"])
def test_graphs_without_parameters_are_explained(kind, way):
    model, x = kind().eval(), drifting(512)
    expected = model(x)
    if way == "in place":
        model.compile(backend="afbs", options=OPTIONS)
        sparse = model
    else:
        called = {"module": model, "method": model.forward, "function around it": lambda x: model(x)}[way]
        sparse = torch.compile(called, backend="afbs", options=OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)
        out = sparse(x)
    assert 0 < relative_l1(out, expected) <= 0.2
    explanation = afbs_compile.explain(sparse)
    assert [(row.site, row.outcome) for row in explanation.rows] == [("attention", "sparse")]
    assert sum("afbs.sparse_attention" in text for text in explanation.after) == 1


@torch.no_grad()
def test_a_graph_without_parameters_that_a_second_model_of_the_class_runs_is_explained():
    x = drifting(512)
    for seed in range(2):
        torch.manual_seed(seed)
        sparse = torch.compile(OnlyAttentionBetweenBreaks().eval(), backend="afbs", options=OPTIONS)
        sparse(x)
        assert [row.outcome for row in afbs_compile.explain(sparse).rows] == ["sparse"]


@torch.no_grad()
def test_a_broken_model_without_attention_is_told_so_once():
    class Plain(OnlyAttentionBetweenBreaks):
        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.last(x)

    sparse = torch.compile(Plain().eval(), backend="afbs", options=OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparse(drifting(512))
    (said,) = [w for w in caught if issubclass(w.category, AfbsWarning)]
    assert "no attention call was found" in str(said.message)


@torch.no_grad()
def test_an_attention_of_another_ones_output_is_calibrated_and_rewritten():
    def twice(q):
        first = F.scaled_dot_product_attention(3 * q, 3 * q, q, is_causal=True)
        return F.scaled_dot_product_attention(3 * q, 3 * first, first, is_causal=True)

    q = drifting(LENGTH).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
    sparse = compiled(twice)
    assert 0 < relative_l1(sparse(q), twice(q)) <= 0.11
    explanation = afbs_compile.explain(sparse)
    assert [row.outcome for row in explanation.rows] == ["sparse", "sparse"]
    assert explanation.after[0].count("torch.ops.afbs.sparse_attention") == 2


@torch.no_grad()
def test_calibrate_takes_samples_of_several_lengths_and_compiled_models():
    model = Toy().eval()
    samples = [drifting(LENGTH), {"x": drifting(768, seed=1)}, (drifting(LENGTH, batch=2, seed=2),)]
    recipe = afbs_compile.calibrate(compiled(model), samples, min_length=128)
    record = recipe.graphs[0].samples
    assert (record.count, record.validation_inputs, record.lengths) == (3, 4, (768, LENGTH))
    assert all(head.error <= 0.055 for site in recipe.sites for head in site.heads)


@pytest.mark.parametrize(
    ("model", "samples", "sentence"),
    [
        (Toy(), [], "samples: got none"),
        (Toy(), torch.zeros(1, 256, WIDTH), "samples: got a Tensor; accepted: an iterable"),
    ],
)
def test_calibrate_refuses_what_it_cannot_use(model, samples, sentence):
    with pytest.raises(OptionError, match=sentence):
        afbs_compile.calibrate(model.eval(), samples)


@torch.no_grad()
def test_nothing_calibrated_is_an_error_that_says_why():
    class Dropping(nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)

    with pytest.raises(CalibrationError, match=r"nothing was calibrated: 1 x dropout in effect: dropout_p=0.1"):
        afbs_compile.calibrate(Dropping(), [torch.randn(1, 2, 1024, 16)])
    with pytest.raises(CalibrationError, match="2 x too short: 64 tokens"):
        afbs_compile.calibrate(Toy().eval(), [drifting(64)])
    with pytest.raises(CalibrationError, match=r"no attention call was found \(scaled_dot_product_attention, varlen"):
        afbs_compile.calibrate(nn.Linear(4, 4).eval(), [torch.zeros(2, 4)])


@torch.no_grad()
def test_calibrate_takes_a_bias_and_padding():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Attention()

        def forward(self, x, mask):
            q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.layer.qkv(x).chunk(3, -1))
            o = F.scaled_dot_product_attention(q * self.layer.sharpness, k, v, attn_mask=mask)
            return self.layer.out(o.transpose(1, 2).flatten(2))

    model, x = Padded().eval(), drifting(LENGTH)
    places = torch.arange(LENGTH)
    for mask in (-0.01 * (places - places[:, None]).abs(), (places < 900)[None, None, None]):
        torch._dynamo.reset()
        recipe = afbs_compile.calibrate(model, [(x, mask)], tolerance=0.2, min_length=128)
        assert [site.outcome for site in recipe.sites] == ["sparse"]
        out = compiled(model, recipe=recipe)(x, mask)
        expected = model(x, mask)
        assert 0 < float((out - expected).abs().sum() / expected.abs().sum()) < 0.2


@torch.no_grad()
def test_later_tokens_change_nothing_in_earlier_query_blocks():
    model, x = Toy().eval(), drifting(LENGTH)
    sparse = compiled(model)
    before = sparse(x)
    for start in (64, 500, 960):
        changed = x.clone()
        changed[:, start:] = drifting(LENGTH, seed=9)[:, start:] * 3
        end = start // 64 * 64
        assert torch.equal(sparse(changed)[:, :end], before[:, :end])
        assert not torch.equal(sparse(changed)[:, start:], before[:, start:])


@pytest.fixture
def calibrations(monkeypatch):
    """How often the backend calibrated."""
    made = []
    from afbs_compile import backend

    original = backend.calibrate_graph
    monkeypatch.setattr(backend, "calibrate_graph", lambda *args: made.append(1) or original(*args))
    return made


@torch.no_grad()
def test_a_second_model_of_the_class_is_calibrated_for_itself(calibrations):
    x = drifting(LENGTH)
    one, two = Toy().eval(), Toy(seed=1).eval()
    first, second = compiled(one), compiled(two)
    first(x), second(x), first(x)
    assert len(calibrations) == 2
    assert [row.outcome for row in afbs_compile.explain(second).rows] == ["sparse", "sparse"]
    taus = [re.findall(r"tau = (\[.*?\])", afbs_compile.explain(model).after[0]) for model in (first, second)]
    assert taus[0] != taus[1]


@torch.no_grad()
def test_functions_and_buffers_do_not_share_recipes(calibrations):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.register_buffer("factor", torch.tensor(factor))

        def forward(self, q):
            return torch.nn.functional.scaled_dot_product_attention(q * self.factor, q, q, is_causal=True)

    def plain(q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    def negated(q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, -q, is_causal=True)

    q = drifting(LENGTH).view(1, LENGTH, 4, 32).transpose(1, 2) * 3
    for model in (plain, negated, Scaled(1.0), Scaled(0.5)):
        torch._dynamo.reset()
        compiled(model)(q)
    assert len(calibrations) == 4
    recipe = afbs_compile.calibrate(Scaled(1.0), [q], min_length=128)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="same architecture, other weights"):
        compiled(Scaled(0.5), recipe=recipe)(q)


@torch.no_grad()
def test_what_did_not_pay_at_a_short_length_is_tried_again_at_a_longer_one(calibrations, monkeypatch):
    def pays_from_1024(sample, *_, **__):
        long = sample.q.shape[2] >= LENGTH
        return tuner_site.SiteSpeed(1.0, 0.5 if long else 2.0, LENGTH if long else None)

    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(pays_from_1024))
    sparse = compiled(Toy().eval())
    with pytest.warns(AfbsWarning, match="not faster"):
        sparse(drifting(512))
    sparse(drifting(LENGTH))
    assert [row.outcome for row in afbs_compile.explain(sparse).rows] == ["dense", "dense", "sparse", "sparse"]
    assert len(calibrations) == 2
    sparse(drifting(LENGTH + 128)), sparse(drifting(200))
    assert len(calibrations) == 2


@torch.no_grad()
def test_calibrating_many_lengths_leaves_room_to_compile():
    model = Toy().eval()
    recipe = afbs_compile.calibrate(model, [drifting(128 + 64 * i) for i in range(9)], min_length=128)
    sparse = compiled(model, recipe=recipe)
    sparse(drifting(LENGTH))
    assert [row.outcome for row in afbs_compile.explain(sparse).rows] == ["sparse", "sparse"]


@torch.no_grad()
def test_a_function_around_a_model_is_explained():
    model = Toy().eval()
    sparse = compiled(lambda x: model(x) * 2)
    sparse(drifting(LENGTH))
    assert [row.site for row in afbs_compile.explain(sparse).rows] == ["layers.0", "layers.1"]


@torch.no_grad()
def test_iterators_of_any_kind_are_samples():
    for samples in (map(drifting, [LENGTH, LENGTH]), [{"anything": drifting(LENGTH)}]):
        torch._dynamo.reset()
        compiled(Toy().eval(), samples=samples)(drifting(LENGTH))


@torch.no_grad()
def test_activations_that_overflow_make_the_paper_s_heads_dense():
    x = drifting(LENGTH)
    x[:, 5] = torch.inf
    sparse = compiled(Toy().eval(), method="paper")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AfbsWarning)
        sparse(x)
    assert all(row.error <= 0.055 for row in afbs_compile.explain(sparse).rows if row.outcome == "sparse")


@torch.no_grad()
def test_modules_compiled_in_place_are_explained():
    model, x = Toy().eval(), drifting(LENGTH)
    dense = model(x)
    model.compile(backend="afbs", options=OPTIONS)
    assert 0 < relative_l1(model(x), dense) <= 0.055
    assert [row.outcome for row in afbs_compile.explain(model).rows] == ["sparse", "sparse"]
