"""The recipe: JSON there and back, files of version 0.1, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from afbs_compile import Recipe, explain
from afbs_compile.cli.main import main
from afbs_compile.errors import RecipeError
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import Kept, SparseCall
from afbs_compile.kernels.spec.selection import PREDICTOR_VERSION
from afbs_compile.recipe import GraphRecipe, HeadRecipe, KeptTrial, SampleRecord, SearchPath, SiteRecipe
from afbs_compile.report.inspection import print_inspection
from tests.toy import HEAD_DIM, HEADS, Attention, drifting


@pytest.fixture
def recipe() -> Recipe:
    shape = BlockShape(64, 64)
    path = SearchPath(
        "refine", 4096, "meansim", shape, (), (0.8, 0.9), (-1.0,) * 2, (-1000.0,) * 2, (0.8, 0.7), (-1.0, 0.05)
    )
    heads = HeadRecipe("sparse", 0.7, 0.05, (0.04, 0.05), (path,)), HeadRecipe("dense", 0.0, 0.0, (0.0, 0.0))
    call = SparseCall((0.9, 1.0), (-1.0,) * 2, (-1000.0,) * 2, ("meansim",) * 2, shape, min_length=2048)
    site = SiteRecipe("layers.0.attn", "sparse", None, "causal", 64, 1, "float32", call, heads, 2.0, 1.0)
    refused = SiteRecipe("layers.1.attn", "refused", "dropout in effect: 0.1")
    samples = SampleRecord("samples", 2, 2, (4096, 4096), "d1")
    graph = GraphRecipe("g1", "w1", "s1", samples, 1.5, 12.25, (site, refused))
    options = {"tolerance": 0.055, "method": "afbs", "parameterization": "corrected"}
    return Recipe(options, "cpu", "flex", 1, {"torch": "2.13.0"}, (graph,))


def test_saved_and_loaded_is_the_same(recipe, tmp_path):
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.json"]


def test_files_of_schema_5_have_blocks_of_one_head(recipe, tmp_path):
    path = tmp_path / "recipe.json"
    recipe.save(path)
    data = json.loads(path.read_text())
    assert data["graphs"][0]["sites"][0]["call"]["shape"] == [64, 64, 1]
    data["schema_version"] = 5
    for site in data["graphs"][0]["sites"]:
        del site["kept_tried"]
        if site["call"]:
            site["call"]["shape"] = [64, 64]
    path.write_text(json.dumps(data))
    assert Recipe.load(path) == recipe


def test_what_is_always_kept_and_what_it_was_chosen_from_is_written(recipe, tmp_path):
    graph = recipe.graphs[0]
    tried = (KeptTrial(0, 0.2, 0.5, 3.0), KeptTrial(64, 0.25, 0.05, 0.75))
    call = replace(graph.sites[0].call, kept=Kept(64, 64), shape=BlockShape(64, 64, heads=2), policy=("cumulant",) * 2)
    site = replace(graph.sites[0], call=call, kept_tried=tried)
    shared = replace(recipe, graphs=(replace(graph, sites=(site, *graph.sites[1:])),))
    shared.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == shared
    console = Console(file=StringIO(), width=200)
    print_inspection(shared, console)
    text = " ".join(console.file.getvalue().split())
    assert "64x64 of 2 heads" in text
    assert "layers.0.attn 64 64 0.500 at 20% 0.050 at 25% 0.75" in text


def test_sparsity_counts_every_calibrated_head(recipe):
    assert recipe.sites[0].sparsity == pytest.approx(0.35)
    assert recipe.sites[0].error == 0.05
    assert recipe.sparsity == pytest.approx(0.35)


def test_a_failed_save_leaves_the_old_file(recipe, tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    recipe.save(path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace(recipe, device="cuda").save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def edited(path: Path, **changes: object) -> str:
    return json.dumps({**json.loads(path.read_text()), **changes})


def asked(path: Path, **options: object) -> str:
    return edited(path, options={**json.loads(path.read_text())["options"], **options})


def in_the_call(path: Path, **changes: object) -> str:
    data = json.loads(path.read_text())
    data["graphs"][0]["sites"][0]["call"].update(changes)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: p.read_text()[:-40], "damaged: it is not JSON"),
        (lambda p: "", "damaged: it is not JSON"),
        (lambda p: '{"a": 1}', "is not an afbs recipe"),
        (lambda p: "[1, 2]", "is not an afbs recipe"),
        (lambda p: edited(p, schema_version=99), "newer than"),
        (lambda p: edited(p, schema_version=0), "has schema version 0"),
        (lambda p: asked(p, tolerance="much"), "tolerance is 'much'"),
        (lambda p: asked(p, tolerance=-1), "tolerance is -1"),
        (lambda p: asked(p, tolerance=None), "it needs either a tolerance or a budget"),
        (lambda p: asked(p, method="guess"), "method is 'guess', not one of 'afbs', 'paper'"),
        (lambda p: edited(p, extra=1), "lacks or has too much: extra"),
        (lambda p: edited(p, graphs={}), "recipe.graphs is not a list"),
        (lambda p: edited(p, graphs=[]), "it has no graph"),
        (lambda p: in_the_call(p, shape=[0, 64]), "block_q is 0"),
        (lambda p: in_the_call(p, shape=[64]), "call.shape is not a list of 2 to 3"),
        (lambda p: in_the_call(p, shape=[64, 64, 3]), "block_heads is 3"),
        (lambda p: in_the_call(p, kept=[-1, 0]), "last_rows is -1"),
        (lambda p: in_the_call(p, kept=[0, -1]), "local_keys is -1"),
        (lambda p: "[" * 100_000, "damaged: it is not JSON"),
        (lambda p: in_the_call(p, tau=[None, 1.0]), "tau[0] is None"),
        (lambda p: in_the_call(p, tau=[float("nan"), 1.0]), "accepted: finite numbers"),
        (lambda p: in_the_call(p, tau=[0.9]), "theta has 2 constants"),
        (lambda p: in_the_call(p, policy=["meansim", "median"]), "policy is 'median'"),
        (lambda p: p.read_text().replace('"sparsity": 0.7', '"sparsity": 1.7'), "out of range"),
        (lambda p: p.read_text().replace('"sparsity": 0.7', '"sparsity": NaN'), "not finite"),
        (lambda p: in_the_call(p, tau=[-0.5, 1.0]), "out of range"),
        (lambda p: in_the_call(p, lam=[3.0, -1000.0]), "accepted: numbers at most 0"),
        (lambda p: p.read_text().replace('"s": []', '"s": [0.5]'), "search path"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(recipe, tmp_path, damage, sentence):
    path = tmp_path / "recipe.json"
    recipe.save(path)
    path.write_text(damage(path))
    with pytest.raises(RecipeError, match="recipe.json") as caught:
        Recipe.load(path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def in_the_head(path: Path, **changes: object) -> str:
    data = json.loads(path.read_text())
    data["graphs"][0]["sites"][0]["heads"][0].update(changes)
    return json.dumps(data)


def in_the_site(path: Path, **changes: object) -> str:
    data = json.loads(path.read_text())
    data["graphs"][0]["sites"][0].update(changes)
    return json.dumps(data)


def in_the_samples(path: Path, **changes: object) -> str:
    data = json.loads(path.read_text())
    data["graphs"][0]["samples"].update(changes)
    return json.dumps(data)


def in_place_of(path: Path, old: str, new: str) -> str:
    text = path.read_text()
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: in_place_of(p, '"seconds": 1.5', '"seconds": 1e400'), "seconds is not finite"),
        (lambda p: in_place_of(p, '"seconds": 1.5', '"seconds": 1' + "0" * 400), "beyond any number that is meant"),
        (lambda p: in_place_of(p, '"seconds": 1.5', '"seconds": 1' + "0" * 5000), "it is not JSON"),
        (lambda p: in_place_of(p, '"evaluations": 12.25', '"evaluations": NaN'), "NaN is not finite"),
        (lambda p: asked(p, extra=float("inf")), "Infinity is not finite"),
        (lambda p: in_place_of(p, '"method": "afbs"', '"method": ' + "[" * 900 + "]" * 900), "damaged"),
        (lambda p: in_place_of(p, '"method": "afbs"', '"method": ' + "[" * 1000 + "]" * 1000), "damaged"),
        (lambda p: asked(p, extra=[[[[[1]]]]]), "too many levels"),
        (lambda p: in_the_call(p, shape=[640, 64]), "block_q is 640"),
        (lambda p: in_place_of(p, '"length": 4096', '"length": -1'), "length is -1, out of range"),
        (lambda p: in_the_call(p, policy=["cumulant"] * 2, theta=[0.5, -1.0]), "only meansim has one"),
        (lambda p: in_the_call(p, kept=[1e30, 0]), "last_rows is 1e+30, not int"),
        (lambda p: in_the_call(p, kept=[10**15, 0]), "last_rows is 1000000000000000; accepted: at most 2147483647"),
        (lambda p: in_the_call(p, min_length=-1), "min_length is -1; accepted: 0 or more"),
        (lambda p: in_the_head(p, length_exponent=1e9), "length_exponent is 1000000000.0, out of range: -2 to 2"),
        (lambda p: in_the_head(p, tau_exponent=-1), "tau_exponent is -1.0, out of range"),
        (lambda p: in_the_site(p, validated_lengths=[-5, 4096]), "validated_lengths[0] is -5, out of range"),
        (lambda p: in_the_site(p, validated_lengths=[0, 0]), "validated_lengths[0] is 0, out of range"),
        (lambda p: in_the_site(p, validated_lengths=[4096, 1024]), "are from 4096 to 1024"),
        (lambda p: in_the_samples(p, lengths=[4096, 1024]), "lengths of the samples are from 4096 to 1024"),
        (lambda p: asked(p, tolerance=50), "tolerance is 50, out of range"),
        (lambda p: asked(p, tolerance=True), "tolerance is True"),
        (lambda p: asked(p, tolerance={"kl": 0.01}), "it needs either a tolerance or a budget"),
        (lambda p: in_the_head(p, error=-1), "error is -1.0, out of range"),
        (lambda p: in_the_head(p, validation_errors=[-1, 0.05]), "validation_errors[0] is -1.0, out of range"),
        (lambda p: in_the_head(p, outcome="dense", sparsity=0.0), "is dense and has tau 0.9"),
        (lambda p: in_the_call(p, tau=[1.0, 1.0]), "head 0 of layers.0.attn is sparse and has tau 1.0"),
        (lambda p: in_the_call(p, tau=[0.9, 0.9]), "head 1 of layers.0.attn is dense and has tau 0.9"),
        (lambda p: in_place_of(p, '"error": [\n          -1.0', '"error": [\n          -0.5'), "error below 0"),
        (lambda p: in_the_site(p, name="\ud800"), r"name is '\ud800'"),
        (lambda p: in_the_site(p, name="\x1b[2J"), r"name is '\x1b[2J', which is too long, or no text"),
        (lambda p: in_the_site(p, name="x" * 10**6), "which is too long, or no text"),
        (lambda p: edited(p, versions={"\udfff": "1"}), "or no text"),
        (lambda p: edited(p, **{"x" * 10**6: 1}), "lacks or has too much: xxx"),
        (lambda p: in_place_of(p, '"device": "cpu"', '"device": "cpu", "device": "cuda"'), "a key twice"),
        (lambda p: in_the_site(p, kv_heads=3), "has 2 heads of 64 over 3"),
        (lambda p: in_the_site(p, kv_heads=0), "kv_heads is 0, out of range"),
        (lambda p: in_the_site(p, dtype="complex64"), "dtype 'complex64', not one of float16"),
        (lambda p: in_the_site(p, mask="window(0)"), "width is 0; accepted: 1 or more"),
        (lambda p: in_the_site(p, mask="window(99999999999999999999)"), "mask is 'window(9"),
        (lambda p: in_the_site(p, name="layers.1.attn"), "two of its calls are named 'layers.1.attn'"),
        (lambda p: edited(p, schema_version=5.0), "has schema version 5.0"),
        (lambda p: edited(p, schema_version="y" * 10**6), "has schema version 'yyy"),
        (lambda p: edited(p, sha256="0" * 64), "its content is not that of which it has the digest"),
    ],
)
def test_what_no_calibration_writes_is_refused_in_one_bounded_sentence(recipe, tmp_path, damage, sentence):
    path = tmp_path / "recipe.json"
    recipe.save(path)
    path.write_text(damage(path))
    with pytest.raises(RecipeError, match="recipe.json") as caught:
        Recipe.load(path)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300
    assert str(caught.value).isprintable()


def test_a_file_of_another_kind_or_size_is_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(2**40)  # which takes no room
    said = {"pipe": "is not a regular file", "huge.json": "it has more than 256 MiB", ".": "is not a regular file"}
    for name, sentence in said.items():
        with pytest.raises(RecipeError, match=sentence):
            Recipe.load(tmp_path / name)
    with pytest.raises(RecipeError, match="is not a regular file"):
        Recipe.load("/dev/zero")


def test_names_that_look_like_markup_are_shown_as_they_are(recipe, tmp_path, capsys):
    recipe.save(tmp_path / "recipe.json")
    (tmp_path / "recipe.json").write_text(in_the_site(tmp_path / "recipe.json", name="[/b] {0} %s", kernel="[/k]"))
    assert "[/b] {0} %s" in str(explain(Recipe.load(tmp_path / "recipe.json")))
    assert main(["inspect", str(tmp_path / "recipe.json")]) == 0
    assert "[/b] {0} %s" in capsys.readouterr().out


def test_a_digest_is_held_against_the_content(recipe, tmp_path):
    text = recipe.to_json(sealed=True)
    assert Recipe.from_json(text, sealed=True) == recipe
    assert Recipe.from_json(json.dumps(dict(reversed(json.loads(text).items()))), sealed=True) == recipe
    for changed in (text.replace("0.7", "0.6"), recipe.to_json()):
        with pytest.raises(RecipeError, match="the recipe is damaged: its content is not that"):
            Recipe.from_json(changed, sealed=True)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "absent.json")


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="damaged"):
        Recipe.load(tmp_path / "x.json")


def test_a_recipe_can_be_read_by_others(recipe, tmp_path):
    recipe.save(tmp_path / "recipe.json")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "recipe.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


OLD = Path(__file__).parent / "data" / "recipe_schema3.json"
"""As version 0.1 wrote it, of :class:`Old`; of most heads the search is left out."""


class Old(nn.Module):
    """A causal layer, one that sees everything, and a call that is refused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.causal, self.full = Attention(), Attention(causal=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * self.causal(x)
        x = x + 0.1 * self.full(x)
        q = x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(q, q, q, dropout_p=0.1).transpose(1, 2).flatten(2)


def test_a_recipe_of_version_0_1_says_the_same_today(tmp_path):
    recipe, data = Recipe.load(OLD), json.loads(OLD.read_text())
    assert data["schema_version"] == 3
    assert (recipe.tolerance, recipe.method, recipe.budget) == (0.055, "afbs", None)
    assert (recipe.device, recipe.engine, recipe.versions) == (data["device"], data["engine"], data["versions"])
    (graph,), (written,) = recipe.graphs, data["graphs"]
    assert [graph.graph, graph.weights, graph.source] == [written[name] for name in ("graph", "weights", "source")]
    assert graph.promise.head_bound == written["promise"]["head_bound"]
    assert [site.mask for site in recipe.sites] == ["causal", "full", None]
    assert [site.outcome for site in recipe.sites] == ["sparse", "sparse", "refused"]
    assert recipe.sites[2].call is None
    assert recipe.sites[2].reason == written["sites"][2]["reason"]
    for site, old in zip(recipe.sites[:2], written["sites"][:2], strict=True):
        call = site.calibrated
        for name in ("tau", "theta", "lam", "policy"):
            assert list(getattr(call, name)) == [head[name] for head in old["heads"]], name
        assert call.shape == BlockShape(old["block_q"], old["block_k"])
        assert call.kept == (old["last_rows"], old["local_keys"])
        assert set(call.precision) == {"own"}
        assert call.fp8_constants == ()
        assert (call.min_length, call.max_length) == (old["min_length"], 0)
        for name in ("name", "head_dim", "kv_heads", "dtype", "dense_ms", "sparse_ms", "kernel", "kernel_reason"):
            assert getattr(site, name) == old[name], name
        assert list(site.validated_lengths) == old["validated_lengths"]
        for head, measured in zip(site.heads, old["heads"], strict=True):
            for name in ("outcome", "sparsity", "error", "tau_exponent", "length_exponent", "precision_reason"):
                assert getattr(head, name) == measured[name], name
            assert list(head.validation_errors) == measured["validation_errors"]
            for path, searched in zip(head.search, measured["search"], strict=True):
                assert path.shape == BlockShape(searched["block_q"], searched["block_k"])
                for name in ("tau", "theta", "lam", "sparsity", "error", "s"):
                    assert list(getattr(path, name)) == searched[name], name
    assert recipe.sites[0].calibrated.kept == Kept(64, 128)
    assert any(head.search for head in recipe.sites[0].heads)
    recipe.save(tmp_path / "recipe.json")
    assert json.loads((tmp_path / "recipe.json").read_text())["schema_version"] == 6
    assert Recipe.load(tmp_path / "recipe.json") == recipe


@torch.no_grad()
def test_a_recipe_of_version_0_1_is_refused_for_its_predictor(fresh_dynamo):
    sparse = torch.compile(Old().eval(), backend="afbs", options={"min_length": 128, "recipe": OLD})
    with pytest.raises(BackendCompilerFailed, match="was made for predictor version 1, this is 2"):
        sparse(drifting(1024))


@torch.no_grad()
def test_a_recipe_of_version_0_1_rewrites_its_model(fresh_dynamo, monkeypatch):
    """Its schema and names are understood, were its thresholds those of today's predictor."""
    monkeypatch.setattr("afbs_compile.backend.calibrate_graph", None)
    today = replace(Recipe.load(OLD), predictor_version=PREDICTOR_VERSION)
    sparse = torch.compile(Old().eval(), backend="afbs", options={"min_length": 128, "recipe": today})
    sparse(drifting(1024))
    explanation = explain(sparse)
    assert [(row.site, row.outcome) for row in explanation.rows] == [
        ("causal", "sparse"),
        ("full", "sparse"),
        ("attention", "refused"),
    ]
    for site in Recipe.load(OLD).sites[:2]:
        assert f"tau = {list(site.calibrated.rounded().tau)}" in explanation.after[0]


def old(change: Callable[[dict[str, Any]], object]) -> str:
    """The old file with its first site changed."""
    data = json.loads(OLD.read_text())
    change(data["graphs"][0]["sites"][0])
    return json.dumps(data)


def without(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda entry: [entry.pop(name) for name in names]


def test_a_recipe_from_before_fp8_and_kept_blocks_has_neither(tmp_path):
    def older(site: dict[str, Any]) -> None:
        without("fp8_constants", "last_rows", "local_keys")(site)
        for head in site["heads"]:
            without("precision", "precision_reason")(head)

    (tmp_path / "recipe.json").write_text(old(older))
    site = Recipe.load(tmp_path / "recipe.json").sites[0]
    assert site.calibrated.kept == Kept()
    assert set(site.calibrated.precision) == {"own"}
    assert [head.precision_reason for head in site.heads] == [None] * HEADS


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda: OLD.read_text()[:-40], "damaged: it is not JSON"),
        (
            lambda: json.dumps({**json.loads(OLD.read_text()), "graphs": None}),
            "of schema version 3 and lacks something",
        ),
        (lambda: json.dumps({k: v for k, v in json.loads(OLD.read_text()).items() if k != "method"}), "'method'"),
        (lambda: old(without("block_q")), "lacks something ('block_q')"),
        (lambda: old(without("heads")), "lacks something ('heads')"),
        (lambda: old(lambda site: site["heads"][0].pop("tau")), "lacks something ('tau')"),
        (lambda: old(lambda site: site.update(heads=[])), "has no heads"),
        (lambda: old(lambda site: site["heads"][1].update(extra=1)), "lacks or has too much: extra"),
        (lambda: old(lambda site: site["heads"][1].update(tau="much")), "tau[1] is 'much', not float"),
        (lambda: old(lambda site: site["heads"][1].update(policy="median")), "policy is 'median'"),
        (lambda: old(lambda site: site.update(block_q=0)), "block_q is 0"),
        (lambda: old(lambda site: site.update(block_q=None)), "shape.q is None, not int"),
        (lambda: old(lambda site: site["heads"][0].update(precision="fp8")), "has heads in FP8 and not the constants"),
        (lambda: old(lambda site: site.update(heads=7)), "damaged"),
        (lambda: old(lambda site: site["heads"].append(None)), "damaged"),
        (lambda: old(lambda site: site["heads"][1]["search"][0].pop("block_k")), "lacks something ('block_k')"),
        (lambda: old(lambda site: site["heads"][1].update(search=["x"])), "lacks something"),
    ],
)
def test_a_wrong_file_of_version_0_1_is_refused_in_one_sentence(tmp_path, damage, sentence):
    path = tmp_path / "recipe.json"
    path.write_text(damage())
    with pytest.raises(RecipeError, match="recipe.json") as caught:
        Recipe.load(path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
