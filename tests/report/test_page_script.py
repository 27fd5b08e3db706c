"""What the page's script makes of a recipe and of block masks, in node where that is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from afbs_compile.recipe import SearchPath
from afbs_compile.report.html import page
from afbs_compile.report.masks import HeadMask, Masks, _packed
from tests.report.test_html import BLOCKS, made

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")

TRIED = SearchPath(
    "refine", 4096, "meansim", BLOCKS, (), (0.8, 0.9), (-1.0,) * 2, (-1000.0,) * 2, (0.8, 0.7), (-1, 0.05)
)


def drawn(text: str, folder: Path) -> dict:
    """What the script made of the page."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    command = ["node", str(Path(__file__).with_name("page_in_node.js")), str(folder / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_script_shows_heads_thresholds_and_searches(tmp_path):
    found = drawn(page(made(search=(TRIED,)), "recipe.json"), tmp_path)
    assert found["status"] == "layers.0, head 0: sparsity 70.0 %, error 0.0500"
    assert found["maps"] == [4, 4]
    for words in ("meansim, blocks 64 x 64", "tau 0.9", "theta off", "lambda off", "0.0500 (tolerance 0.055)"):
        assert words in found["detail"]
    assert (
        "1. refine at 4096 tokens, meansim 64x64: tau 0.8, theta off: sparsity 80.0 %, error not finite"
        in (found["detail"])
    )
    assert found["table"][1:3] == [
        ["layers.0", "0", "sparse", "meansim", "0.9", "off", "off", "70.0 %", "0.0500"],
        ["layers.0", "1", "dense", "", "", "", "", "0.0 %", "0.0000"],
    ]
    assert len(found["table"]) == 5
    assert found["gallery"] == []


def test_the_script_draws_live_skipped_and_invisible_blocks(tmp_path):
    """Of as many rows as columns, and of more columns than a byte has bits."""
    square, wide = torch.ones(5, 5, dtype=torch.bool).tril(), torch.ones(3, 11, dtype=torch.bool).tril(2)
    pictures = [(square, square & (torch.arange(5) % 2 == 0)), (wide, wide & (torch.arange(11) != 1))]
    heads = tuple(
        HeadMask(0, name, 0, *sight.shape, place, _packed(live), 0.4)
        for place, (name, (sight, live)) in enumerate(zip(("layers.0", "slow"), pictures, strict=True))
    )
    masks = Masks("drifting", 300, heads, (), tuple(_packed(sight) for sight, _ in pictures))
    found = drawn(page(made(), "recipe.json", masks), tmp_path)
    assert found["gallery"] == ["layers.0, head 0: 40.0 % skipped", "slow, head 0: 40.0 % skipped"]
    for pixels, (sight, live) in zip(found["masks"], pictures, strict=True):
        expected = torch.where(live, 0, torch.where(sight, 1, 2)).flatten().tolist()
        assert pixels == [("on", "off", "hidden")[kind] for kind in expected]
    assert "Block mask: 40.0 % skipped on the sample" in found["detail"]


def test_the_script_runs_where_nothing_was_calibrated(tmp_path):
    recipe = made()
    refused = replace(recipe.graphs[0], sites=recipe.graphs[0].sites[2:])
    found = drawn(page(replace(recipe, graphs=(refused,)), "recipe.json"), tmp_path)
    assert found["maps"] == [0, 0]
    assert found["status"] == ""
