"""The way of a file: exported by the command line, then verified by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afbs_compile.cli.main import INTERRUPTED, main

TOY = "tests.toy:Toy"
NEEDED = {"pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}


@pytest.fixture(scope="module")
def with_meansim(recipes, tmp_path_factory):
    """The toy's recipe with the one policy that every format has; its errors are then not the recipe's."""
    content = json.loads(Path(recipes["toy"]).read_text())
    for site in content["graphs"][0]["sites"]:
        site["call"]["policy"] = ["meansim"] * len(site["heads"])
    path = tmp_path_factory.mktemp("recipe") / "meansim.json"
    path.write_text(json.dumps(content))
    return str(path)


def exported_and_verified(recipe, format_, toy_inputs, folder, capsys):
    """What ``export --json`` and ``verify --json`` print."""
    for library in NEEDED[format_]:
        pytest.importorskip(library)
    file = folder / f"toy.{format_}"
    given = [TOY, "--recipe", recipe, "--data", toy_inputs]
    assert main(["export", *given, "--format", format_, "--dynamic", "-o", str(file), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["file"] == str(file)
    assert list(folder.iterdir()) == [file]
    main(["verify", str(file), "--model", TOY, "--data", toy_inputs, "--json"])
    return written, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("format_", ["pt2", "onnx"])
def test_an_exported_file_computes_what_pytorch_computes(format_, with_meansim, toy_inputs, tmp_path, capsys):
    written, report = exported_and_verified(with_meansim, format_, toy_inputs, tmp_path, capsys)
    assert written["outcomes"] == {"sparse": 2}
    checks = {check["name"]: check["passed"] for check in report["checks"]}
    assert checks["finite"]
    assert checks["same as PyTorch"]
    assert report["against_torch"]["largest_difference"] <= 1e-4
    assert report["against_dense"]["relative_error_mean"] > 0


@pytest.mark.parametrize("format_", ["pt2", "onnx"])
def test_a_file_is_held_to_what_was_written_into_it(format_, recipes, toy_inputs, tmp_path, capsys):
    """Calls whose policy a format does not have stay dense in it, and the file's own recipe says so."""
    _, report = exported_and_verified(recipes["toy"], format_, toy_inputs, tmp_path, capsys)
    assert [check["passed"] for check in report["checks"]] == [True, True, True]


def test_a_file_that_computes_something_else_fails(recipes, toy_inputs, tmp_path, capsys):
    eager = json.loads(Path(recipes["toy"]).read_text())
    for site in eager["graphs"][0]["sites"]:
        site["call"]["kept"][1] = 0
        site["call"]["tau"] = [0.3] * len(site["heads"])
    (tmp_path / "eager.json").write_text(json.dumps(eager))
    file = str(tmp_path / "toy.pt2")
    given = [TOY, "--recipe", str(tmp_path / "eager.json"), "--data", toy_inputs]
    assert main(["export", *given, "--format", "pt2", "-o", file]) == 0
    assert "attention calls: 2 sparse" in capsys.readouterr().out
    assert main(["verify", file, "--model", TOY, "--data", toy_inputs, "--recipe", recipes["toy"]]) == 1
    assert "FAIL same as PyTorch: largest difference 0." in capsys.readouterr().out


def test_an_interrupted_export_leaves_no_half_file(recipes, toy_inputs, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    file = str(tmp_path / "toy.pt2")
    given = [TOY, "--recipe", recipes["toy"], "--data", toy_inputs]
    assert main(["export", *given, "--format", "pt2", "-o", file]) == INTERRUPTED
    assert capsys.readouterr().err == "afbs-compile export: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_inspect_html_draws_masks_of_the_model_on_the_data(recipes, toy_inputs, tmp_path, capsys):
    page = tmp_path / "report.html"
    given = ["inspect", recipes["toy"], "--html", str(page), "--model", TOY, "--data", toy_inputs]
    assert main(given) == 0
    assert f"wrote {page}" in capsys.readouterr().out
    text = page.read_text()
    assert "512 tokens" in text
    assert '"masks":{"source"' in text
    assert list(tmp_path.iterdir()) == [page]
