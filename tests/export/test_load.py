"""Paths, damaged files, wrong arguments: one sentence each."""

import json
import types
import zipfile

import pytest
import torch

from afbs_compile.errors import ExportError, OptionError
from afbs_compile.export import load, tensorrt, to_onnx, to_pt2, to_tensorrt
from afbs_compile.export.files import NOTE, Note, as_written
from afbs_compile.export.pt2 import load_pt2
from afbs_compile.export.runner import Runner
from tests.export.helpers import Grouped, recipe_for, wandering


@pytest.fixture(scope="module")
def model_and_recipe():
    model = Grouped().eval()
    return model, recipe_for(model, wandering(130))


@pytest.mark.parametrize(
    ("export", "name", "words"),
    [
        (to_pt2, "model.onnx", r"accepted for pt2: a file name that ends in \.pt2"),
        (to_onnx, "model", r"accepted for onnx: a file name that ends in \.onnx"),
        (to_tensorrt, "model.engine", r"accepted for tensorrt: a file name that ends in \.ep"),
        (to_pt2, "missing/model.pt2", "a folder that exists"),
    ],
)
def test_a_path_that_is_not_accepted(model_and_recipe, tmp_path, export, name, words):
    with pytest.raises(OptionError, match=words):
        export(*model_and_recipe, wandering(130), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


class TestLoad:
    def test_another_suffix(self, tmp_path):
        with pytest.raises(OptionError, match=r"ends in \.pt2, \.onnx, \.ep"):
            load(tmp_path / "model.bin")

    def test_no_file(self, tmp_path):
        with pytest.raises(OptionError, match="a file that exists"):
            load(tmp_path / "model.pt2")

    @pytest.mark.parametrize("content", [b"", b"PK not really"], ids=["empty", "damaged"])
    def test_a_damaged_file(self, tmp_path, content):
        (tmp_path / "model.pt2").write_bytes(content)
        with pytest.raises(ExportError, match="damaged or was not written by this package"):
            load(tmp_path / "model.pt2")

    def test_a_foreign_file(self, tmp_path):
        torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "model.pt2")
        with pytest.raises(ExportError, match="damaged or was not written by this package"):
            load(tmp_path / "model.pt2")

    def test_a_truncated_file(self, model_and_recipe, tmp_path):
        to_pt2(*model_and_recipe, wandering(130), tmp_path / "whole.pt2")
        assert zipfile.is_zipfile(tmp_path / "whole.pt2")
        (tmp_path / "half.pt2").write_bytes((tmp_path / "whole.pt2").read_bytes()[:5000])
        with pytest.raises(ExportError, match="cannot be loaded"):
            load(tmp_path / "half.pt2")


class TestFilesOfVersion01:
    """Their operator had other arguments; what they say of themselves has a recipe of schema version 3."""

    @pytest.fixture
    def old(self, model_and_recipe, tmp_path):
        """A file as version 0.1 wrote it: other arguments in its program, and its note."""
        to_pt2(*model_and_recipe, wandering(130), tmp_path / "new.pt2")
        with zipfile.ZipFile(tmp_path / "new.pt2") as new, zipfile.ZipFile(tmp_path / "old.pt2", "w") as old:
            for name in new.namelist():
                content = new.read(name).replace(b'"mask"', b'"is_causal"')
                if name.endswith(NOTE):
                    note = json.loads(content)
                    note["recipe"]["schema_version"] = 3
                    content = json.dumps(note).encode()
                old.writestr(name, content)
        return tmp_path / "old.pt2"

    @pytest.mark.parametrize("suffix", [".pt2", ".ep"])
    def test_they_are_refused_in_a_sentence_that_says_what_to_do(self, old, monkeypatch, suffix):
        monkeypatch.setattr(tensorrt, "extra", lambda *_: [types.SimpleNamespace()])
        monkeypatch.setattr(tensorrt, "register_plugin", lambda: None)
        old = old.rename(old.with_suffix(suffix))
        with pytest.raises(ExportError, match=r"old\.\w+ was written by afbs-compile 0\.1, .*: export the model again"):
            load(old)

    def test_one_of_another_predictor_too(self, model_and_recipe, tmp_path):
        to_pt2(*model_and_recipe, wandering(130), tmp_path / "new.pt2")
        with zipfile.ZipFile(tmp_path / "new.pt2") as new, zipfile.ZipFile(tmp_path / "old.pt2", "w") as old:
            for name in new.namelist():
                content = new.read(name)
                if name.endswith(NOTE):
                    content = content.replace(b'"predictor_version": 2', b'"predictor_version": 1')
                old.writestr(name, content)
        with pytest.raises(ExportError, match=r"old\.pt2 was written for predictor version 1, this is 2: export the"):
            load(tmp_path / "old.pt2")

    def test_a_compiled_package_too(self, model_and_recipe, tmp_path, monkeypatch):
        note = json.loads(Note(("x",), 1, as_written(model_and_recipe[1], ())).to_json())
        note["recipe"]["schema_version"] = 3
        package = types.SimpleNamespace(get_metadata=lambda: {NOTE: json.dumps(note)})
        monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: package)
        with pytest.raises(ExportError, match="export the model again with this version"):
            load_pt2(tmp_path / "model.pt2", ["model/data/aotinductor/model/x.so"])


def test_the_note_survives(model_and_recipe):
    _, recipe = model_and_recipe
    note = Note(("a", "b"), 1, as_written(recipe, ()))
    assert Note.from_json(note.to_json()) == note


class TestRunner:
    @pytest.fixture
    def runner(self, model_and_recipe):
        return Runner(Note(("a", "b"), 1, model_and_recipe[1]), lambda tensors: tensors)

    def test_by_position_and_by_name(self, runner):
        a, b = torch.zeros(1), torch.ones(1)
        for out in (runner(a, b), runner(a, b=b), runner(b=b, a=a)):
            assert out == (a, b)

    @pytest.mark.parametrize(
        ("args", "kwargs"), [((1,), {}), ((1, 2, 3), {}), ((1, 2), {"b": 3}), ((1,), {"c": 3})], ids=str
    )
    def test_anything_else_is_refused(self, runner, args, kwargs):
        with pytest.raises(OptionError, match="accepted: one tensor for each of a, b"):
            runner(*args, **kwargs)
