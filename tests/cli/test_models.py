"""MODEL: each way to name one."""

from __future__ import annotations

import sys

import pytest
import torch

from afbs_compile.cli.models import load_model
from afbs_compile.cli.sources import load_samples
from afbs_compile.errors import OptionError
from tests.cli.conftest import POSITIONS
from tests.toy import Toy, drifting


def test_a_causal_language_model_gets_its_head(llama):
    model = load_model(llama, device="cpu")
    assert type(model.module).__name__ == "LlamaForCausalLM"
    assert not model.module.training
    assert model.positions == POSITIONS
    assert model.dtype is torch.float32
    assert model.tokenizer == llama
    assert load_model(llama, device="cpu", dtype="bfloat16").dtype is torch.bfloat16


def test_a_model_without_a_language_head_is_an_auto_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert type(load_model(str(tmp_path / "bert"), device="cpu").module).__name__ == "BertModel"


def test_a_factory_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\nclass Box:\n    @staticmethod\n    def make():\n        return torch.nn.Linear(2, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    model = load_model("my_models:Box.make", device="cpu", dtype="float16")
    assert model.module.out_features == 3
    assert model.dtype is torch.float16
    assert not model.module.training
    assert model.arguments == ["input"]


def test_an_error_inside_a_factory_is_the_users_to_see(tmp_path, monkeypatch):
    (tmp_path / "broken_models.py").write_text("import not_there_at_all\ndef make():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        load_model("broken_models:make")


def test_an_exported_program(tmp_path):
    path = str(tmp_path / "toy.pt2")
    toy, x = Toy().eval(), drifting(128)
    torch.export.save(torch.export.export(toy, (), {"x": x}), path)
    model = load_model(path)
    assert model.program is not None
    assert model.arguments == ["x"]
    torch.testing.assert_close(model.module(x=x), toy(x))
    (sample,) = load_samples("random", model, count=1)
    assert sample["x"].shape == x.shape
    with pytest.raises(OptionError, match="--dtype: not accepted"):
        load_model(path, dtype="float16")
