"""Each command on a real model: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from afbs_compile import Recipe, explain
from afbs_compile.cli import bench
from afbs_compile.cli.main import main
from afbs_compile.tuner.speed import SiteSpeed
from tests.cli.conftest import LENGTH

ROOT = Path(__file__).parents[2]
TOY = "tests.toy:Toy"


def output(capsys, *argv: str, code: int = 0) -> str:
    assert main(list(argv)) == code
    return capsys.readouterr().out


def test_calibrate_writes_a_recipe_of_the_samples_asked_for(recipes):
    recipe = Recipe.load(recipes["llama"])
    assert recipe.tolerance == 0.3
    assert recipe.graphs[0].samples.count == 2
    assert recipe.graphs[0].samples.lengths == (LENGTH, LENGTH)
    assert [site.name for site in recipe.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_calibrate_prints_a_summary_as_json(toy_inputs, tmp_path, capsys):
    path = tmp_path / "r.json"
    wanted = ["--samples", "1", "--min-length", "128", "--method", "afbs", "--json"]
    content = json.loads(output(capsys, "calibrate", TOY, "--data", toy_inputs, "-o", str(path), *wanted))
    assert content["recipe"] == str(path)
    assert content["sites"] == 2
    assert content["heads"] == 8
    assert Recipe.load(path).graphs[0].samples.count == 1


def test_inspect_prints_a_row_per_site_with_a_summary_and_the_promise(recipes, toy_recipe, capsys):
    printed = output(capsys, "inspect", recipes["toy"])
    for words in ("layers.0", "layers.1", "64x64", "Summary", "Promise", "2 validation inputs", "Provenance"):
        assert words in printed
    assert all(head["policy"] in printed for head in toy_recipe.to_records() if head["outcome"] == "sparse")


def test_inspect_as_json_has_sites_and_heads(recipes, toy_recipe, capsys):
    content = json.loads(output(capsys, "inspect", recipes["toy"], "--json"))
    assert content["heads"] == json.loads(json.dumps(toy_recipe.to_records()))
    assert content["sites"] == explain(toy_recipe).to_records()
    assert content["mean_sparsity"] == toy_recipe.sparsity


def test_graph_marks_every_attention_call(capsys, toy_inputs):
    printed = output(capsys, "graph", TOY, "--data", toy_inputs, "--before")
    lines = [line for line in printed.splitlines() if "nn.scaled_dot_product_attention(" in line]
    assert len(lines) == 2
    assert all(f"# <<< layers.{i}: refused (too short: 512 tokens" in line for i, line in enumerate(lines))


def test_graph_after_has_the_constants_and_their_marks(recipes, toy_recipe, capsys, toy_inputs):
    printed = output(capsys, "graph", TOY, "--recipe", recipes["toy"], "--data", toy_inputs)
    lines = [line for line in printed.splitlines() if "torch.ops.afbs.sparse_attention" in line]
    assert ["# <<< layers.0: sparse" in lines[0], "# <<< layers.1: sparse" in lines[1]] == [True, True]
    assert "tau = [" in lines[0]
    assert "scaled_dot_product_attention(" not in "".join(line.split("#")[0] for line in printed.splitlines())


def test_graph_diff_shows_the_calls_alone_with_folded_constants(recipes, toy_recipe, capsys, toy_inputs):
    printed = output(capsys, "graph", TOY, "--recipe", recipes["toy"], "--diff", "--data", toy_inputs)
    shapes = "q [1, 4, 512, 32], k [1, 4, 512, 32], v [1, 4, 512, 32], float32, causal"
    site = toy_recipe.sites[0]
    taus = [tau for tau, head in zip(site.call.tau, site.heads, strict=True) if head.outcome == "sparse"]
    spread = f"tau {min(taus):.4g}" + (f"-{max(taus):.4g}" if len(set(taus)) > 1 else "")
    assert printed.splitlines()[:4] == [
        "layers.0: sparse",
        f"  - scaled_dot_product_attention({shapes})",
        f"  + afbs.sparse_attention({shapes}, blocks 64x64, 128 keys before a block kept, last 64 rows whole, "
        f"from {site.call.min_length} tokens)",
        f"      {spread} ({len(taus)} heads)",
    ]
    assert "linear" not in printed


def test_graph_as_json_holds_the_sites(recipes, capsys, toy_inputs):
    given = ["graph", TOY, "--recipe", recipes["toy"], "--data", toy_inputs, "--json"]
    (graph,) = json.loads(output(capsys, *given, "--diff"))["graphs"]
    assert [site["site"] for site in graph["sites"]] == ["layers.0", "layers.1"]
    (graph,) = json.loads(output(capsys, *given))["graphs"]
    assert "afbs.sparse_attention" in graph["after"]


def test_verify_a_recipe_on_its_own_samples_passes(recipes, capsys, toy_inputs):
    given = ["verify", recipes["toy"], "--model", TOY, "--data", toy_inputs, "--share", "1"]
    report = json.loads(output(capsys, *given, "--json"))
    assert [check["passed"] for check in report["checks"]] == [True, True]
    assert report["promise"]["share_within_tolerance"] == 1.0
    assert 0 < report["promise"]["worst"] <= 0.055 * 1.001
    assert 0 < report["against_dense"]["relative_error_mean"] < 0.055


def test_verify_fails_with_exit_code_1_where_the_promise_does_not_hold(recipes, tmp_path, capsys, toy_inputs):
    content = json.loads(Path(recipes["toy"]).read_text())
    for site in content["graphs"][0]["sites"]:
        site["call"]["kept"][1] = 0
        site["call"]["tau"] = [0.2] * len(site["heads"])
    wrong = tmp_path / "eager.json"
    wrong.write_text(json.dumps(content))
    printed = output(capsys, "verify", str(wrong), "--model", TOY, "--data", toy_inputs, code=1)
    assert re.search(r"FAIL promise: \d\d\.\d% of 16 \(head, input\) pairs within 0.055, 90% asked; worst 0", printed)


def test_verify_of_a_language_model_counts_choices_and_perplexity(recipes, llama, text, capsys):
    given = ["verify", recipes["llama"], "--model", llama, "--data", text, "--samples", "2"]
    printed = output(capsys, *given, "--share", "0.01")
    assert f"of {2 * LENGTH:,}" in printed
    assert "perplexity" in printed


def test_bench_times_both_in_the_same_run(recipes, capsys, toy_inputs):
    given = ["bench", TOY, "--recipe", recipes["toy"], "--data", toy_inputs, "--runs", "2", "--json"]
    (row,) = json.loads(output(capsys, *given))["rows"]
    assert row["tokens"] is None
    assert (row["sparse_sites"], row["sites"]) == (2, 2)
    assert row["dense_spread"][0] <= row["dense_ms"] <= row["dense_spread"][1]
    assert row["ratio"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])


def test_bench_writes_what_it_times_into_the_recipe(recipes, tmp_path, capsys, toy_inputs, monkeypatch):
    recipe = tmp_path / "toy.recipe.json"
    shutil.copy(recipes["toy"], recipe)
    before = Recipe.load(recipe)
    given = ["bench", TOY, "--recipe", str(recipe), "--data", toy_inputs, "--runs", "1", "--json"]
    output(capsys, *given)
    assert Recipe.load(recipe) == before, "not asked for"
    monkeypatch.setattr(SiteSpeed, "measure", staticmethod(lambda *_, **__: SiteSpeed(3.0, 4.0, None)))
    (row,) = json.loads(output(capsys, *given, "--update"))["rows"]
    assert (row["sparse_sites"], row["sites"]) == (0, 2)
    for old, new in zip(before.sites, Recipe.load(recipe).sites, strict=True):
        assert (new.outcome, new.reason) == ("dense", "not faster: 4 ms sparse, 3 ms dense")
        assert (new.dense_ms, new.sparse_ms, new.heads) == (3.0, 4.0, old.heads)
    monkeypatch.setattr(SiteSpeed, "measure", staticmethod(lambda *_, **__: SiteSpeed(3.0, 1.0, 128)))
    output(capsys, *given, "--update")
    assert {site.outcome for site in Recipe.load(recipe).sites} == {"sparse"}


def test_bench_takes_several_lengths(recipes, llama, capsys, monkeypatch):
    def measured(tokens, sample, *_):
        assert sample["input_ids"].shape == (1, tokens)
        return bench.Row(tokens, 1, 2, 4.0, (3.0, 5.0), 2.0, (1.0, 3.0), 2.0)

    monkeypatch.setattr(bench, "_row", measured)
    printed = output(capsys, "bench", llama, "--recipe", recipes["llama"], "--seq-len", "128", "1,024")
    assert re.search(r"128 .* 1 of 2 .* 4.0 \(3.0 to 5.0\) .* 2.0 \(1.0 to 3.0\) .* 2.00x", printed)
    assert "1,024" in printed


def test_reading_a_recipe_needs_no_model_and_leaves_standard_error_empty(recipes):
    command = [sys.executable, "-m", "afbs_compile.cli", "inspect", recipes["toy"], "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["heads"]


def test_a_reader_that_closes_the_pipe_is_no_error(recipes):
    command = f"{sys.executable} -m afbs_compile.cli inspect {recipes['toy']} --json | head -c 1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
    assert done.stderr == ""
