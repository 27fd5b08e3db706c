"""A model on two ranks, in every way to share it: one recipe, which every other form of the model takes, too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SITES = [f"model.layers.{layer}.self_attn" for layer in range(2)]

pytestmark = pytest.mark.slow


def on_two_ranks(*command: str, cwd: Path = ROOT) -> str:
    ran = subprocess.run(
        [*TORCHRUN, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def said_by_ranks(way: str) -> list[dict[str, Any]]:
    out = on_two_ranks("-m", "tests.integrations.parallel_model", way)
    starts = [found.start() for found in re.finditer(r'{"rank"', out)]  # both may write into one line
    results = [json.JSONDecoder().raw_decode(out, start)[0] for start in starts]
    assert sorted(result["rank"] for result in results) == [0, 1]
    return sorted(results, key=lambda result: result["rank"])


@pytest.mark.parametrize(("way", "heads"), [("eager", 2), ("tp_plan", 2), ("fsdp", 4)])
def test_one_recipe_of_a_model_in_shards(way: str, heads: int) -> None:
    """Each rank has its heads' calls; the recipe has all heads and is saved once, and forms of the model share it."""
    results = said_by_ranks(way)
    assert results[0]["constants"] == results[1]["constants"]
    for said in results:
        assert said["rows"] == said["rows by it"] == [[site, "sparse", heads] for site in SITES]
        assert [call[:3] for call in said["constants"]] == [[site, 4, 2] for site in SITES]
        assert said["files"] == 1
        assert said["saved is gathered"]
        assert said["same from the cache"]
        assert said["weights"] == said["weights of one device"]
        assert 0.001 < said["error"] < 0.2
        assert said["as on one device"] < 1e-5
        assert said["error by it"] < 1e-5
        assert said["first call"] == said["on one device"] == said["by a recipe of one device"] == []


def test_the_backend_and_calibrate_do_the_same() -> None:
    results = said_by_ranks("compile")
    assert results[0]["constants"] == results[1]["constants"]
    for said in results:
        assert said["rows"] == said["rows by it"] == [[site, "sparse", 2] for site in SITES]
        assert said["rows there"] == [[site, "sparse", 4] for site in SITES]
        assert [call[:3] for call in said["constants"]] == [[site, 4, 2] for site in SITES]
        assert said["by calibrate"] == said["constants"]
        assert said["weights"] == said["weights of one device"]
        assert 0.001 < said["error"] < 0.2
        assert said["as on one device"] < 1e-5
        assert 0.001 < said["error by it"] < 0.2
        assert said["first call"] == said["on one device"] == said["by a recipe of one device"] == []


def test_the_stages_of_a_pipeline_make_one_recipe() -> None:
    results = said_by_ranks("pipeline")
    assert results[0]["constants"] == results[1]["constants"]
    for rank, said in enumerate(results):
        assert said["rows"] == said["rows by it"] == [[SITES[rank], "sparse", 4]]
        assert [call[0] for call in said["constants"]] == SITES
        assert said["rows there"] == [[site, "sparse", 4] for site in SITES]
        assert said["as on one device"] < 1e-5
        assert said["first call"] == said["by the gathered"] == said["on one device"] == []


def test_a_rank_that_fails_lets_the_others_fail() -> None:
    for said in said_by_ranks("failing"):
        assert said["rows"] == [[site, "refused", 0] for site in SITES]
        assert 0 <= said["error"] < 1e-5
        assert "no memory" in said["reason"]


def test_layers_that_are_graphs_of_their_own_find_their_calls() -> None:
    for said in said_by_ranks("layer by layer"):
        assert len(set(said["recorded"])) == 2
        assert said["sparsity"] == said["recorded"]
        assert 0.001 < said["error"] < 0.2


def test_what_is_refused_and_what_each_finds_by_itself() -> None:
    first, second = said_by_ranks("refused")
    assert first["own"] != second["own"], "inputs of their own"
    assert first["constants"] == second["constants"] == first["own"]


def test_the_benchmark(tmp_path: Path) -> None:
    arguments = ("--models", "tiny", "--lengths", "512", "--min-length", "128", "--rounds", "1", "--out", str(tmp_path))
    on_two_ranks("parallel.py", *arguments, cwd=ROOT / "benchmarks")
    result = json.loads((tmp_path / "parallel.json").read_text())
    found = result["models"]["tiny"]["512"]
    assert found["relative distance of logits"]["2: dense"] < 0.05  # bfloat16; the same model in shards
    for way in ("1: dense", "1: sparse", "2: dense", "2: sparse"):
        assert found[way]["seconds"]["median"] > 0
