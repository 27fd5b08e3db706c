"""The recipe: JSON there and back, and every way a file can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from afbs_compile import Recipe
from afbs_compile.errors import RecipeError
from afbs_compile.recipe import GraphRecipe, HeadRecipe, SampleRecord, SearchPath, SiteRecipe


@pytest.fixture
def recipe() -> Recipe:
    path = SearchPath(
        "refine", 4096, "meansim", 64, 64, (), (0.8, 0.9), (-1.0,) * 2, (-1000.0,) * 2, (0.8, 0.7), (-1.0, 0.05)
    )
    sparse = HeadRecipe("sparse", "meansim", 0.9, -1.0, -1000.0, 0.7, 0.05, (0.04, 0.05), (path,))
    dense = HeadRecipe("dense", "meansim", 1.0, -1.0, -1000.0, 0.0, 0.0, (0.0, 0.0))
    site = SiteRecipe("layers.0.attn", "sparse", None, True, 64, 1, "float32", 64, 64, (sparse, dense), 2.0, 1.0, 2048)
    refused = SiteRecipe("layers.1.attn", "refused", "dropout in effect: 0.1")
    samples = SampleRecord("samples", 2, 2, (4096, 4096), "d1")
    graph = GraphRecipe("g1", "w1", "s1", samples, 1.5, 12.25, (site, refused))
    versions = {"torch": "2.13.0"}
    return Recipe(0.055, "afbs", "corrected", "cpu", "flex", 1, versions, (graph,))


def test_saved_and_loaded_is_the_same(recipe, tmp_path):
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.json"]


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
        replace(recipe, tolerance=0.01).save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def edited(path: Path, **changes: object) -> str:
    return json.dumps({**json.loads(path.read_text()), **changes})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: p.read_text()[:-40], "damaged: it is not JSON"),
        (lambda p: "", "damaged: it is not JSON"),
        (lambda p: '{"a": 1}', "is not an afbs recipe"),
        (lambda p: "[1, 2]", "is not an afbs recipe"),
        (lambda p: edited(p, schema_version=99), "newer than"),
        (lambda p: edited(p, schema_version=0), "has schema version 0"),
        (lambda p: edited(p, tolerance="much"), "recipe.tolerance is 'much', not float"),
        (lambda p: edited(p, tolerance=-1), "tolerance is -1"),
        (lambda p: edited(p, method="guess"), "recipe.method is 'guess', not one of 'afbs', 'paper'"),
        (lambda p: edited(p, extra=1), "lacks or has too much: extra"),
        (lambda p: edited(p, graphs={}), "recipe.graphs is not a list"),
        (lambda p: edited(p, graphs=[]), "it has no graph"),
        (lambda p: p.read_text().replace('"block_q": 64', '"block_q": 0'), "no block shape"),
        (lambda p: p.read_text().replace('"last_rows": 0', '"last_rows": -1'), "last_rows -1"),
        (lambda p: p.read_text().replace('"local_keys": 0', '"local_keys": -1'), "local_keys -1"),
        (lambda p: "[" * 100_000, "damaged: it is not JSON"),
        (lambda p: p.read_text().replace('"tau": 0.9', '"tau": null'), "tau is None"),
        (lambda p: p.read_text().replace('"tau": 0.9', '"tau": NaN'), "not finite"),
        (lambda p: p.read_text().replace('"sparsity": 0.7', '"sparsity": 1.7'), "out of range"),
        (lambda p: p.read_text().replace('"lam": -1000.0', '"lam": 3.0', 1), "out of range"),
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
