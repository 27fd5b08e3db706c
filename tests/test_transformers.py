"""Real transformers models: caches that are written, generation, and the Hugging Face package named ``kernels``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import afbs_compile
from afbs_compile.tuner import site as tuner_site
from tests.toy import always_faster

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def llama(fresh_dynamo):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}], ids=["cache", "no cache"])
@pytest.mark.slow
def test_llama_is_rewritten_with_its_kv_heads_unrepeated(llama, arguments, monkeypatch):
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(always_faster))
    ids = torch.randint(64, (1, 512))
    sparse = torch.compile(llama, backend="afbs", fullgraph=True, options={"min_length": 128, "tolerance": 0.5})
    logits = sparse(ids, **arguments).logits
    explanation = afbs_compile.explain(sparse)
    assert [row.site for row in explanation.rows] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [row.outcome for row in explanation.rows] == ["sparse", "sparse"]
    assert all(row.heads == 4 for row in explanation.rows)
    call = next(line for line in explanation.after[0].splitlines() if "afbs.sparse_attention" in line)
    assert call.count("tau = [") == 1
    assert logits.isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_generate_with_a_static_cache_gives_the_dense_tokens(llama):
    ids = torch.randint(64, (1, 300))
    settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = llama.generate(ids, **settings)
    llama.forward = torch.compile(llama.forward, backend="afbs", options={"min_length": 64})
    with pytest.warns(afbs_compile.errors.AfbsWarning, match="decoding: 1 query rows against"):
        assert torch.equal(llama.generate(ids, **settings), expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["all", "left"])
def test_generate_of_what_torch_compile_returned_is_compiled(llama, side, monkeypatch):
    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(always_faster))
    ids = torch.randint(64, (2, 512))
    mask = torch.ones_like(ids)
    mask[1, : 100 if side == "left" else 0] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = llama.generate(ids, **settings)
    compiled = torch.compile(llama, backend="afbs", options={"min_length": 128, "tolerance": 0.5})
    found = compiled.generate(ids, **settings)
    assert found.shape == expected.shape
    assert "forward" not in vars(llama), "it is as it was"
    assert {row.outcome for row in afbs_compile.explain(compiled).rows} == {"sparse"}
    assert len({row.graph for row in afbs_compile.explain(compiled).rows}) == 1, "no decode step was compiled"
    assert torch.compile(llama).generate.__func__ is type(llama).generate, "other backends are left alone"


@torch.no_grad()
def test_a_pipeline_with_a_compiled_model_is_compiled(llama, monkeypatch):
    from tests.integrations.test_transformers import word_tokenizer

    monkeypatch.setattr(tuner_site.SiteSpeed, "measure", staticmethod(always_faster))
    compiled = torch.compile(llama, backend="afbs", options={"min_length": 128, "tolerance": 0.5})
    pipe = transformers.pipeline("text-generation", model=compiled, tokenizer=word_tokenizer())
    pipe(" ".join(f"w{i % 50}" for i in range(600)), max_new_tokens=2, do_sample=False)
    assert {row.outcome for row in afbs_compile.explain(compiled).rows} == {"sparse"}


def test_a_mask_that_hides_something_is_kept():
    from afbs_compile.generation import _without_needless_mask

    ones, padded = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    padded[1, 0] = 0
    assert _without_needless_mask({"attention_mask": ones, "use_cache": True}) == {
        "attention_mask": None, "use_cache": True,
    }  # fmt: skip
    for kept in ({"attention_mask": padded}, {"attention_mask": ones[:, None, None]}, {"attention_mask": None}, {}):
        assert _without_needless_mask(kept) is kept


def fake_kernels_distribution(folder: Path) -> Path:
    """A package and a distribution named ``kernels``, as Hugging Face's is."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("__version__ = '9.9.9'\nREAL = True\n")
    info = folder / "kernels-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.9.9\n")
    return folder


PROBE = """
import kernels
assert kernels.REAL, kernels.__path__
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
tiny = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(tiny)(torch.zeros(1, 4, dtype=torch.long))
import afbs_compile
print("the real one won")
"""


@pytest.mark.parametrize("way", ["python -c", "python -m pytest"])
@pytest.mark.slow
def test_the_doorway_named_kernels_shadows_nothing_from_the_root(tmp_path, way):
    site = fake_kernels_distribution(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    if way == "python -c":
        command = [sys.executable, "-c", PROBE]
    else:
        test = tmp_path / "test_probe.py"
        test.write_text("def test_probe():\n" + "".join(f"    {line}\n" for line in PROBE.strip().splitlines()))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-s",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(ROOT),
            str(test),
        ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the real one won" in done.stdout


def test_the_doorways_lead_into_the_package():
    for name in ("passes", "kernels", "tuner"):
        assert (ROOT / name).is_symlink()
        assert (ROOT / name).resolve() == ROOT / "afbs_compile" / name
    assert not (ROOT / "afbs_compile" / "kernels" / "__init__.py").exists()
