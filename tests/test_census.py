"""The census counts calls, sees wrong outputs, and keeps crashes apart from models that do not run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def census(monkeypatch, fresh_dynamo):
    """The census' modules, which import each other by their names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import census_check

    yield census_check
    for name in ("census_check", "census_inputs", "census_models"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_llama_is_counted_and_agrees_in_every_form(census):
    record = census.examine("llama", list(census.FORMS))
    assert list(record["forms"]) == list(census.FORMS)
    for result in record["forms"].values():
        assert result["sites"] + len(result["refusals"]) == 2
        assert max(result["errors"].values(), default=0.0) <= census.TOLERANCE
        assert not result["crashes"]
        assert not result.get("blind")


@pytest.mark.slow
def test_a_wrong_output_and_a_crash_are_seen(census, monkeypatch):
    exact = census.sparse_attention
    monkeypatch.setattr(census, "sparse_attention", lambda operands, call: exact(operands, call) * 1.01)
    alone = census.examine("llama", ["alone"])["forms"]["alone"]
    assert alone["errors"]["every block"] > census.TOLERANCE >= alone["errors"]["rewritten, dense"]

    def crash(*_):
        raise ValueError("broken")

    monkeypatch.setattr(census, "rewrite", crash)
    assert "ValueError: broken" in census.examine("llama", ["alone"])["forms"]["alone"]["crashes"][0]


def test_padding_is_left_out_of_the_difference(census):
    expected, found = torch.ones(2, 4, 3), torch.ones(2, 4, 3)
    visible = torch.tensor([[True] * 4, [False, True, True, True]])
    found[1, 0] = float("nan")
    assert census.difference([expected], [found], visible=visible, decoder=False) == 0.0
    found[1, 1] = 1.5
    assert census.difference([expected], [found], visible=visible, decoder=False) == 0.5


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "census.py", "--forms", "alone", "--workers", "1", "--out", str(tmp_path / "all.json")]

    def run(*more: str) -> str:
        return subprocess.run([*command, *more], cwd=BENCHMARKS, check=True, capture_output=True, text=True).stdout

    assert "vit: alone 2/2" in run("--models", "vit")
    again = run("--models", "vit", "bert", "--resume")
    assert "vit:" not in again
    assert "2 architectures\nalone        4 of 4 calls" in again
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2
