"""A model whose weights are DTensors on two ranks: each finds, calibrates and rewrites the calls of its own heads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "compile"])
def test_two_ranks_have_their_own_heads(way, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*command, "-m", "tests.integrations.parallel_model", way],
        cwd=ROOT,
        env={**os.environ, "AFBS_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"rank"')]
    assert sorted(result["rank"] for result in results) == [0, 1]
    for result in results:
        assert result["rows"] == [[f"model.layers.{i}.self_attn", "sparse", 2] for i in range(2)]
        assert result["error"] < 0.2
