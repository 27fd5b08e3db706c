"""The examples on small inputs; with their defaults each is the same run on the shipped model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from afbs_compile import Recipe
from afbs_compile.tuner import site as tuner_site
from tests.cli.conftest import LENGTH, folder, llama, recipes, text, toy_inputs  # noqa: F401  fixtures
from tests.toy import always_faster

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch, fresh_dynamo):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for name in ("vision", "video", "own_model", "offline", "inspect_graph", "windows"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_vision_cleans_pictures_sparsely(capsys, monkeypatch):
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(always_faster))
    figures = importlib.import_module("vision").main(size=128, runs=1)
    assert figures["line by line"] > 0.5
    assert figures["sparse dB"] > figures["noisy dB"] + 6
    assert 0 < abs(figures["sparse dB"] - figures["dense dB"]) < 1
    assert "1,024 tokens, tiles of 8 x 8" in capsys.readouterr().out


def test_vision_computes_the_same_in_both_orders_of_tokens():
    vision = importlib.import_module("vision")
    picture = vision.noisy(vision.scene(64, 3), 3)
    torch.testing.assert_close(vision.NonLocalMeans(True)(picture), vision.NonLocalMeans(False)(picture))


@pytest.mark.slow
def test_video_is_denoised_sparsely(capsys, monkeypatch, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(always_faster))
    picture = tmp_path / "video.png"
    figures = importlib.import_module("video").main(frames=4, size=64, steps=4, runs=1, out=str(picture))
    assert figures["sparse dB"] > figures["noisy dB"] + 6
    assert 0 < figures["error"] < 0.2
    assert picture.stat().st_size > 10_000
    assert "blocks.1" in capsys.readouterr().out


@pytest.mark.slow
def test_own_model(llama, tmp_path, capsys):  # noqa: F811
    for index in range(3):
        (tmp_path / f"{index}.md").write_text(f"Text {index} of one's own, about numbers like {index}. " * 200)
    cosines = importlib.import_module("own_model").main(tmp_path, llama, LENGTH, min_length=128)
    assert len(cosines) == 3
    assert min(cosines) > 0.99
    assert "backbone.layers.0.self_attn" in capsys.readouterr().out


@pytest.mark.slow
def test_offline_calibrates_here_and_answers_elsewhere(llama, capsys):  # noqa: F811
    printed = importlib.import_module("offline").main(llama, LENGTH, min_length=128)
    assert printed.count("deployed: ") == 4
    assert "deployed: trained further:" in printed  # and what was checked, where a call of so small a model is sparse
    assert "other weights: recipe " in printed
    assert "belongs to another model: same architecture, other weights" in printed
    assert "offline: calibrated in" in capsys.readouterr().out


def test_inspect_graph_prints_what_changed(llama, recipes, tmp_path, capsys):  # noqa: F811
    module = importlib.import_module("inspect_graph")
    lines = module.main(Recipe.load(recipes["llama"]), tmp_path / "report.html", llama, LENGTH)
    assert sum("+ afbs.sparse_attention(" in line for line in lines) == 2
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert "head " in capsys.readouterr().out
