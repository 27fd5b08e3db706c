"""A small language model on disk, a toy with really sparse heads, and one recipe of each, made once."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import afbs_compile
from afbs_compile.cli.main import main
from tests.toy import Toy, drifting, without_a_clock

SHIPPED = Path(__file__).parents[2] / "examples" / "model-7m"
POSITIONS, LENGTH = 1024, 512


@pytest.fixture(autouse=True)
def every_command_compiles(fresh_dynamo: None) -> None:
    """A command starts in a process of its own."""


@pytest.fixture(autouse=True, scope="session")
def logs_go_to_a_stream_that_stays_open() -> None:
    """transformers keeps the standard error of its import; that of a test which captures its own is closed after it."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("transformers.utils.logging").get_logger()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def llama(folder: Path) -> str:
    """Folder of a two-layer Llama with random weights and the shipped model's tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    )
    path = folder / "llama"
    transformers.LlamaForCausalLM(config).eval().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, path / name)
    return str(path)


@pytest.fixture(scope="session")
def text(folder: Path) -> str:
    path = folder / "topics.txt"
    path.write_text(" ".join(f"Attention {i} reads what stands before token {i * 7}." for i in range(600)))
    return str(path)


@pytest.fixture(scope="session")
def toy_inputs(folder: Path) -> str:
    """Inputs of ``tests.toy:Toy``: two windows of 512 tokens."""
    path = folder / "toy.npz"
    np.savez(path, x=drifting(512, batch=2).numpy())
    return str(path)


@pytest.fixture(scope="session")
def recipes(folder: Path, llama: str, text: str, toy_inputs: str) -> dict[str, str]:
    """Recipe files by model, made by the command line itself."""
    paths = {name: str(folder / f"{name}.recipe.json") for name in ("llama", "toy")}
    common = ["--min-length", "128", "--tolerance"]
    with pytest.MonkeyPatch.context() as patch:
        without_a_clock(patch)
        of_llama = ["calibrate", llama, "--data", text, "--seq-len", str(LENGTH), "--samples", "2"]
        assert main([*of_llama, *common, "0.3", "-o", paths["llama"]]) == 0
        assert main(["calibrate", "tests.toy:Toy", "--data", toy_inputs, *common, "0.055", "-o", paths["toy"]]) == 0
    return paths


@pytest.fixture(scope="session")
def toy_recipe(recipes: dict[str, str]) -> afbs_compile.Recipe:
    return afbs_compile.Recipe.load(recipes["toy"])


@pytest.fixture
def toy() -> Toy:
    return Toy().eval()
