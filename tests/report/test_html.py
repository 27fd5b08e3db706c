"""The page: one file, everything in it, nothing from elsewhere, and names that cannot break out."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import LAMBDA_OFF, THETA_OFF, Kept, SparseCall
from afbs_compile.kernels.spec.selection import PREDICTOR_VERSION, live_blocks
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.recipe import GraphRecipe, HeadRecipe, Recipe, SampleRecord, SearchPath, SiteRecipe
from afbs_compile.report.applied import apply
from afbs_compile.report.explain import explain
from afbs_compile.report.html import page
from afbs_compile.report.inspection import promise
from afbs_compile.report.masks import block_masks
from afbs_compile.report.sites import folded
from tests.toy import Toy, drifting

EVIL = "</script><img src=x onerror=alert(1)>"


BLOCKS = BlockShape(64, 64)


def calling(*tau: float, min_length: int, kept: Kept | None = None) -> SparseCall:
    heads = len(tau)
    off = (THETA_OFF,) * heads, (LAMBDA_OFF,) * heads
    return SparseCall(tau, *off, ("meansim",) * heads, BLOCKS, kept or Kept(), min_length=min_length)


def made(name: str = "layers.0", search: tuple[SearchPath, ...] = (), heads: int = 2) -> Recipe:
    sparse = HeadRecipe("sparse", 0.7, 0.05, (0.04, 0.05), search)
    dense = HeadRecipe("dense", 0.0, 0.0, (0.0, 0.0))
    call = calling(*[0.9] * (heads - 1), 1.0, min_length=2048)
    site = ("causal", 64, 1, "float32", call, (*[sparse] * (heads - 1), dense), 2.0, 1.0)
    sites = (
        SiteRecipe(name, "sparse", None, *site),
        SiteRecipe("slow", "dense", "not faster: 2 ms sparse, 1 ms dense", *site),
        SiteRecipe("cross", "refused", f"additive bias {name}"),
    )
    samples = SampleRecord("samples", 2, 2, (4096, 4096), "d1")
    graph = GraphRecipe("g1", "w1", "s1", samples, 1.5, 12.25, sites)
    options = {"tolerance": 0.055, "method": "afbs", "parameterization": "corrected"}
    return Recipe(options, "cpu", "flex", PREDICTOR_VERSION, {"torch": "2.13.0"}, (graph,))


class Elements(HTMLParser):
    """Every element with its attributes, and the text of those named ``script``."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script" and self.scripts:
            self.scripts[-1] += data


def embedded(text: str) -> dict:
    return json.loads(Elements(text).scripts[0])


def unpacked(text: str, size: int) -> torch.Tensor:
    """A packed mask of at most eight columns."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8).reshape(size, 1), axis=1)[:, :size]
    return torch.from_numpy(bits).bool()


def test_the_page_asks_for_nothing_from_elsewhere():
    text = page(made(), "recipe.json")
    for _, attributes in Elements(text).found:
        for name in ("src", "href", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    policy = next(a["content"] for t, a in Elements(text).found if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy


def test_the_pages_policy_names_its_script():
    import hashlib

    text = page(made(), "recipe.json")
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_what_comes_from_a_recipe_cannot_become_markup():
    text = page(made(EVIL), f"<b>{EVIL}</b>")
    assert not any(tag == "img" for tag, _ in Elements(text).found)
    assert EVIL not in text
    assert embedded(text)["sites"][0]["name"] == EVIL


def test_a_name_like_a_placeholder_stays_a_name():
    text = page(made("<!--data-->"), "<!--script-->")
    assert embedded(text)["sites"][0]["name"] == "<!--data-->"
    assert "<title>&lt;!--script--&gt;</title>" in text


def test_the_page_holds_every_head_its_search_and_every_reason():
    search = SearchPath(
        "refine", 4096, "meansim", BLOCKS, (0.4, 0.5), (0.8, 0.9), (-1.0,) * 2, (-1000.0,) * 2, (0.8, 0.7), (-1.0, 0.05)
    )
    text = page(made(search=(search,)), "recipe.json")
    data = embedded(text)
    assert data["sites"][0]["heads"][0]["search"][0]["s"] == [0.4, 0.5]
    assert (data["limit"], data["limit_name"]) == (0.055, "tolerance")
    for words in (
        "not faster: 2 ms sparse, 1 ms dense",
        "additive bias",
        *promise(made()),
        "torch 2.13.0",
        "2 validation",
    ):
        assert escape(words) in text


def test_without_masks_the_page_says_why():
    assert "--model MODEL --data SRC" in page(made(), "recipe.json")


def test_masks_are_those_of_the_predictor():
    toy, x = Toy().eval(), drifting(300)
    graphs = apply(toy, None, [x])
    (graph,) = graphs
    tau = (0.5, 0.6, 1.0, 0.8)
    heads = tuple(
        HeadRecipe("dense", 0.0, 0.0, (0.0,)) if t == 1.0 else HeadRecipe("sparse", 0.5, 0.05, (0.05,)) for t in tau
    )
    call = calling(*tau, kept=Kept(64, 1), min_length=128)
    sites = tuple(
        SiteRecipe(s.name, "sparse", None, "causal", 32, 4, "float32", call, heads, 2.0, 1.0) for s in graph.found.sites
    )
    recipe = made()
    known = replace(
        recipe.graphs[0], graph=graph.found.graph, weights=graph.found.weights, source=graph.found.source, sites=sites
    )
    recipe = replace(recipe, graphs=(recipe.graphs[0], known))
    masks = block_masks(apply(toy, recipe, [x]), "drifting")
    assert [(m.graph, m.site, m.head) for m in masks.heads] == [
        (1, s, h) for s in ("layers.0", "layers.1") for h in (0, 1, 3)
    ]
    _, (sample,) = next(capture([SampleRun(graph.found.gm, graph.found.sites, graph.inputs[0])]))
    expected = live_blocks(sample, call)[0]
    assert {mask.sight for mask in masks.heads} == {0}, "calls of one mask and size share what can be seen"
    assert torch.equal(unpacked(masks.sights[0], 5), torch.ones(5, 5, dtype=torch.bool).tril())
    for mask, head in zip(masks.heads[:3], (0, 1, 3), strict=True):
        assert (mask.rows, mask.columns) == (5, 5)
        assert torch.equal(unpacked(mask.live, 5), expected[head])
        assert mask.sparsity == pytest.approx(1 - int(expected[head].sum()) / 15, abs=1e-4)
    assert "drifting, 300 tokens" in page(recipe, "recipe.json", masks)


def test_a_thousand_heads_stay_a_small_page():
    assert len(page(made(heads=1000), "recipe.json")) < 2**20


def test_records_are_one_flat_dictionary_per_head():
    records = made().to_records()
    assert [(r["site"], r["head"], r["outcome"], r["site_outcome"]) for r in records] == [
        ("layers.0", 0, "sparse", "sparse"),
        ("layers.0", 1, "dense", "sparse"),
        ("slow", 0, "sparse", "dense"),
        ("slow", 1, "dense", "dense"),
    ]
    assert {r["block_q"] for r in records} == {64}
    assert records[2]["site_reason"] == "not faster: 2 ms sparse, 1 ms dense"
    assert "search" not in records[0]


def test_records_make_a_data_frame():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(made().to_records())
    assert frame.groupby("site").sparsity.mean().to_dict() == {"layers.0": 0.35, "slow": 0.35}


def test_explain_renders_in_a_notebook():
    text = explain(made(EVIL))._repr_html_()
    assert text.startswith("<table>")
    assert text.count("<tr>") == 4
    assert EVIL not in text
    assert "not faster" in text
    assert "mean sparsity" in text


def test_constants_are_folded_for_a_reader():
    assert folded("tau", [0.9, 0.95, 0.91]) == "tau 0.9-0.95 (3 heads)"
    assert folded("tau", [0.9]) == "tau 0.9 (1 head)"
    assert folded("theta", [-1.0, -1.0], -1.0) == "theta off"
    assert folded("theta", [0.3, -1.0, 0.45], -1.0) == "theta 0.3-0.45 (2 heads), off in 1"
    assert folded("lambda", [-10.0, -6.0], -1000.0) == "lambda -10 to -6 (2 heads)"


def test_nothing_is_promised_where_nothing_was_calibrated():
    recipe = made()
    refused = replace(recipe.graphs[0], sites=recipe.graphs[0].sites[2:])
    assert promise(replace(recipe, graphs=(refused,))) == ["Nothing was calibrated, so nothing is promised."]
    assert "No head was calibrated" in page(replace(recipe, graphs=(refused,)), "recipe.json")
