"""SRC: what each kind of source gives, and how texts are cut."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from afbs_compile.cli import texts
from afbs_compile.cli.models import load_model
from afbs_compile.cli.sources import Reading, load_samples
from afbs_compile.errors import OptionError
from tests.cli.conftest import POSITIONS

TOY = "tests.toy:Toy"


@pytest.fixture(scope="module")
def model(llama):
    return load_model(llama, device="cpu")


@pytest.fixture(scope="module")
def toy_model():
    return load_model(TOY, device="cpu")


def test_a_text_is_cut_into_disjoint_windows_spread_over_it(model, text):
    samples = load_samples(text, model, length=100, count=3)
    assert [list(sample["input_ids"].shape) for sample in samples] == [[1, 100]] * 3
    transformers = pytest.importorskip("transformers")
    encode = transformers.AutoTokenizer.from_pretrained(model.tokenizer)
    with open(text) as file:
        tokens = encode(file.read(), add_special_tokens=False, verbose=False).input_ids
    first, _, last = (sample["input_ids"][0].tolist() for sample in samples)
    assert first == tokens[:100]
    assert last == tokens[-100:]


def test_the_default_is_five_windows_of_the_models_positions_or_as_many_as_there_are(model, text):
    assert [s["input_ids"].shape[1] for s in load_samples(text, model)] == [POSITIONS] * 5
    with open(text) as file:
        start = file.read()[:8_000]
    short = f"{text}.start.txt"
    with open(short, "w") as file:
        file.write(start)
    assert 1 < len(load_samples(short, model)) < 5


def test_a_folder_of_texts_is_read_whole_but_for_hidden_files(model, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one two three four " * 20)
    (tmp_path / "b" / "c.md").write_text("five six seven eight " * 20)
    (tmp_path / ".hidden").write_bytes(b"\xff\xff")
    assert texts.read_text(str(tmp_path), pieces=1, length=100).count("eight") == 20
    assert len(load_samples(str(tmp_path), model, length=20, count=2)) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="has no file"):
        texts.read_text(str(tmp_path / "empty"), pieces=1, length=10)


def test_a_text_far_longer_than_needed_is_thinned_evenly():
    thinned = texts._thinned("a" * 5000 + "b" * 5000 + "c" * 5000, limit=300, pieces=3)
    assert thinned == "a" * 100 + "\n" + "b" * 100 + "\n" + "c" * 100


@pytest.fixture
def no_downloads(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def test_a_dataset_of_a_file(model, tmp_path, no_downloads):
    rows = [{"body": f"row {i} says that {i} is not {i + 1}", "n": i} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"json:{tmp_path / 'rows.jsonl'}:train"
    assert len(load_samples(f"{source}[body]", model, length=64, count=4)) == 4
    assert len(load_samples(source, model, length=64)) == 5, "the only column of texts is found"
    with pytest.raises(OptionError, match="json has no column text; accepted: body, n"):
        load_samples(f"{source}[text]", model, length=64)
    with pytest.raises(OptionError, match="holds a int; accepted: a column of texts"):
        load_samples(f"{source}[n]", model, length=64)
    assert "row 0 " in texts.read_text(f"{source}[:10%][body]", pieces=1, length=64)


def write_records(path, rows):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(rows)
    write = {".jsonl": made.to_json, ".csv": made.to_csv, ".parquet": made.to_parquet}.get(path.suffix)
    if write is None:
        made.to_csv(path, sep="\t")
    else:
        write(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_records_are_read_as_records(suffix, model, tmp_path, no_downloads):
    path = tmp_path / f"rows{suffix}"
    write_records(path, [{"id": i, "body": f"row {i} says, {i} is not {i + 1}"} for i in range(50)])
    text = texts.read_text(str(path), pieces=1, length=64)
    assert text.startswith("row 0 says, 0 is not 1\nrow 1 says")
    assert "body" not in text
    assert "{" not in text
    assert len(load_samples(str(path), model, length=32, count=2)) == 2


def test_the_column_of_texts_is_found_or_asked_for(tmp_path, no_downloads):
    path = tmp_path / "rows.jsonl"
    write_records(path, [{"title": "a title", "content": "the content", "n": 1}])
    assert texts.read_text(str(path), pieces=1, length=64) == "the content"
    assert texts.read_text(str(path), pieces=1, length=64, column="title") == "a title"
    with pytest.raises(OptionError, match="has no column body; accepted: title, content, n"):
        texts.read_text(str(path), pieces=1, length=64, column="body")
    write_records(path, [{"title": "a title", "summary": "a summary"}])
    with pytest.raises(OptionError, match="give --text-column, one of title, summary"):
        texts.read_text(str(path), pieces=1, length=64)
    path.write_text("{not json}")
    with pytest.raises(OptionError, match="rows.jsonl cannot be read as json records") as caught:
        texts.read_text(str(path), pieces=1, length=64)
    assert "\n" not in str(caught.value)


def test_a_saved_dataset(model, tmp_path, no_downloads):
    made = no_downloads.Dataset.from_dict({"text": ["seven words stand in this one row"] * 50})
    no_downloads.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    assert len(load_samples(f"{tmp_path / 'saved'}:train[text]", model, length=32, count=2)) == 2
    with pytest.raises(OptionError, match="is a saved dataset; accepted: .*:SPLIT"):
        load_samples(str(tmp_path / "saved"), model)


def test_the_name_of_a_dataset_is_taken_apart():
    found = texts.DATASET.fullmatch("wikitext:wikitext-2-raw-v1:validation[text]")
    assert found.groupdict() == {
        "name": "wikitext", "config": "wikitext-2-raw-v1", "split": "validation", "column": "text",
    }  # fmt: skip
    found = texts.DATASET.fullmatch("user/data:train[:10%][body]")
    assert found.groupdict() == {"name": "user/data", "config": None, "split": "train[:10%]", "column": "body"}


def test_a_dataset_that_is_not_there(model, no_downloads):
    with pytest.raises(OptionError, match="--data: dataset nobody/none:train cannot be loaded") as caught:
        load_samples("nobody/none:train", model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_a_file_of_inputs_gives_a_sample_for_each_row(suffix, toy_model, tmp_path):
    x = torch.randn(3, 64, 128, dtype=torch.float64)
    path = tmp_path / f"in{suffix}"
    if suffix == ".npz":
        np.savez(path, x=x.numpy())
    elif suffix == ".pt":
        torch.save({"x": x}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file({"x": x}, path)
    samples = load_samples(str(path), toy_model)
    assert len(samples) == 3
    assert torch.equal(samples[1]["x"], x[1:2].float())
    assert len(load_samples(str(path), toy_model, count=2)) == 2


def test_a_pt_may_hold_one_tensor_or_a_list_of_inputs_of_several_lengths(toy_model, tmp_path):
    torch.save(torch.zeros(2, 64, 128), tmp_path / "one.pt")
    assert len(load_samples(str(tmp_path / "one.pt"), toy_model)) == 2
    torch.save([{"x": torch.zeros(1, 64, 128)}, {"x": torch.zeros(1, 32, 128)}], tmp_path / "two.pt")
    assert [s["x"].shape[1] for s in load_samples(str(tmp_path / "two.pt"), toy_model)] == [64, 32]


def test_random_ids_fit_the_model_and_differ(model):
    first, second = load_samples("random", model, length=32, count=2)
    assert first["input_ids"].shape == (1, 32)
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["input_ids"], load_samples("random", model, length=32, count=1)[0]["input_ids"])


def test_random_pictures_for_a_vision_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    vit = load_model(str(tmp_path / "vit"), device="cpu")
    assert type(vit.module).__name__ == "ViTModel"
    (sample,) = load_samples("random", vit, count=1)
    assert sample["pixel_values"].shape == (1, 3, 32, 32)


def test_another_tokenizer(toy_model, model, text):
    samples = load_samples(text, toy_model, length=16, count=1, reading=Reading(model.tokenizer))
    assert samples[0]["input_ids"].shape == (1, 16)
    with pytest.raises(OptionError, match="--tokenizer: none can be loaded from ./none"):
        load_samples(text, toy_model, reading=Reading("./none"))
