"""Speeds that a busy machine left open are measured again, and until then known to be open."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import afbs_compile
from afbs_compile import Recipe, retime
from afbs_compile.cache import cache_folder
from afbs_compile.tuner.speed import SiteSpeed
from tests.toy import Toy, drifting

LENGTH = 512
OPTIONS = {"min_length": 128}
CLOSE = SiteSpeed(2.0, 1.95, None, busy=True)
FASTER = SiteSpeed(2.0, 1.0, 256)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def machine(monkeypatch):
    """A machine that is as busy, and calls that are as fast, as a test says."""

    def be(speed, *, busy):
        monkeypatch.setattr(SiteSpeed, "measure", staticmethod(lambda *_, **__: speed))
        monkeypatch.setattr(retime, "is_busy", lambda _: busy)
        monkeypatch.setattr("afbs_compile.integrations.served.is_busy", lambda _: busy)

    monkeypatch.setattr("afbs_compile.tuner.speed.Stopwatch.attention_ms", lambda *_: 1.0)
    monkeypatch.setattr("afbs_compile.tuner.speed.Stopwatch.predictor_ms", lambda *_: 0.0)
    return be


@torch.no_grad()
def next_process(length=LENGTH):
    """What explain says of a model in a process that finds the cache as the last one left it."""
    torch._dynamo.reset()
    compiled = torch.compile(Toy().eval(), backend="afbs", options=OPTIONS)
    compiled(drifting(length))
    return afbs_compile.explain(compiled)


def cached():
    (path,) = Path(cache_folder()).glob("*.json")
    return Recipe.load(path)


def test_what_a_busy_machine_left_open_is_decided_by_the_first_quiet_process(machine):
    machine(CLOSE, busy=True)
    first = next_process()
    assert {row.outcome for row in first.rows} == {"dense"}
    assert {row.reason for row in first.rows} == {"not faster: 1.95 ms sparse, 2 ms dense, on a busy machine"}
    assert "2 of 2 calls were timed on a busy machine, too close to tell" in str(first).replace("\n", "")
    assert all(site.unsure for site in cached().sites)

    machine(FASTER, busy=True)
    assert {row.outcome for row in next_process().rows} == {"dense"}, "still busy"
    machine(FASTER, busy=False)
    assert {row.outcome for row in next_process(384).rows} == {"dense"}, "not as long as the sample"
    later = next_process()
    assert {(row.outcome, row.sparse_ms, row.reason) for row in later.rows} == {("sparse", 1.0, None)}
    assert "busy" not in str(later)
    assert [(site.unsure, site.calibrated.min_length) for site in cached().sites] == [(False, 256)] * 2

    machine(CLOSE, busy=False)
    assert {row.outcome for row in next_process().rows} == {"sparse"}, "decided for good"


def test_clear_decisions_of_a_busy_machine_stand(machine):
    machine(replace(CLOSE, sparse_ms=5.0), busy=True)
    next_process()
    machine(FASTER, busy=False)
    assert {row.outcome for row in next_process().rows} == {"dense"}
    assert not any(site.unsure for site in cached().sites)


def test_heads_and_thresholds_stay_as_they_are(machine):
    machine(CLOSE, busy=True)
    next_process()
    before = cached()
    machine(FASTER, busy=False)
    next_process()
    for old, new in zip(before.sites, cached().sites, strict=True):
        assert new.heads == old.heads
        assert new.calibrated == replace(old.calibrated, min_length=256)


@torch.no_grad()
def test_a_call_through_transformers_is_decided_again(machine):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    from afbs_compile.integrations.transformers import use

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    def next_process():
        here = transformers.LlamaForCausalLM(config).eval()
        here.load_state_dict(model.state_dict())
        use(here, min_length=128, tolerance=0.5)
        here(torch.arange(LENGTH)[None] % 64)
        return {row.outcome for row in afbs_compile.explain(here).rows}

    machine(CLOSE, busy=True)
    assert next_process() == {"dense"}
    assert next_process() == {"dense"}
    machine(FASTER, busy=False)
    assert next_process() == {"sparse"}
    assert not any(site.unsure for site in cached().sites)


def test_a_recipe_of_before_is_sure(machine, tmp_path):
    machine(FASTER, busy=False)
    recipe = afbs_compile.calibrate(Toy().eval(), [drifting(LENGTH)], **OPTIONS)
    recipe.save(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    for graph in content["graphs"]:
        for site in graph["sites"]:
            del site["unsure"]
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert Recipe.load(tmp_path / "r.json") == recipe
