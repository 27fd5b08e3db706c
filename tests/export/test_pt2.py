"""torch.export files and AOTInductor packages: the same numbers here and in a process that knows the operator only."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afbs_compile.backend import afbs
from afbs_compile.errors import AfbsWarning
from afbs_compile.export import load, to_pt2
from tests.export.helpers import Grouped, all_left_alone, recipe_for, reference_by_hand, relative_difference, wandering

ROOT = Path(__file__).parent.parent.parent
LENGTHS = [(1, 200), (2, 200), (2, 131), (1, 40)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, its recipe, and its file of any batch and length."""
    model, x = Grouped().eval(), wandering(200)
    recipe = recipe_for(model, x, tau=0.6, theta=0.3, min_length=64)
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    to_pt2(model, recipe, x, path, dynamic=True)
    return model, recipe, path


def in_a_fresh_process(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")


@pytest.mark.parametrize(("batch", "length"), LENGTHS)
def test_sparse_is_the_reference_placed_by_hand(exported, batch, length):
    model, recipe, path = exported
    x = wandering(length, batch, seed=1)
    (out,) = load(path)(x)
    with reference_by_hand(recipe):
        expected = model(x)
    assert relative_difference(out, expected) < 1e-5
    with torch.no_grad():
        dense = model(x)
    assert length < 64 or relative_difference(out, dense) > 0.01, "nothing was skipped, so nothing was tested"


def test_all_dense_is_the_original_model(tmp_path, grouped):
    x = wandering(150)
    recipe = recipe_for(grouped, x)
    with pytest.warns(AfbsWarning, match="the export has no sparse call: 1 x not faster"):
        to_pt2(grouped, all_left_alone(recipe), x, tmp_path / "left.pt2", dynamic=True)
    to_pt2(grouped, recipe_for(grouped, x, tau=1.0), x, tmp_path / "all.pt2", dynamic=True)
    x = wandering(120, batch=2, seed=1)
    for name in ("left.pt2", "all.pt2"):
        (out,) = load(tmp_path / name)(x=x)
        torch.testing.assert_close(out, grouped(x))


COMPILED_AGAIN = """
import sys, torch
import afbs_compile.kernels.op
module = torch.export.load(sys.argv[1]).module()
x = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save([module(x), torch.compile(module, dynamic=False)(x)], sys.argv[3])
assert not any(name.startswith(("afbs_compile.export", "transformers", "onnx", "tests.")) for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_fresh_process_computes_the_compiled_model_bit_for_bit(exported, tmp_path):
    model, recipe, path = exported
    x = wandering(200, seed=1)
    torch.save(x, tmp_path / "x.pt")
    done = in_a_fresh_process(COMPILED_AGAIN, path, tmp_path / "x.pt", tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    compiled = torch.compile(model, backend=afbs, options={"recipe": recipe, "min_length": 1}, dynamic=False)
    with torch.no_grad():
        expected = compiled(x)
    _, by_inductor = torch.load(tmp_path / "out.pt")
    assert torch.equal(by_inductor, expected)


def test_a_process_without_the_operator_is_told_its_name(exported):
    _, _, path = exported
    done = in_a_fresh_process("import sys, torch; torch.export.load(sys.argv[1])", path)
    assert done.returncode != 0
    assert "afbs" in done.stderr


@pytest.fixture(scope="module")
def package(exported, tmp_path_factory):
    model, recipe, _ = exported
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    to_pt2(model, recipe, wandering(200), path, dynamic=True, aoti=True)
    return path


@pytest.mark.slow
class TestAOTInductor:
    def test_it_computes_the_same_at_every_size(self, exported, package):
        _, recipe, path = exported
        compiled, plain = load(package), load(path)
        assert compiled.inputs == ("x",)
        assert compiled.recipe == recipe
        for batch, length in LENGTHS:
            x = wandering(length, batch, seed=2)
            torch.testing.assert_close(compiled(x), plain(x))
        strided = wandering(400, 2, seed=2)[:, :200]
        torch.testing.assert_close(compiled(strided), plain(strided))

    def test_it_needs_the_python_operator_in_the_process_that_runs_it(self, package, tmp_path):
        """The package calls the operator through PyTorch's dispatcher: without Python it cannot run."""
        torch.save(wandering(200, seed=1), tmp_path / "x.pt")
        code = """
import sys, torch
if sys.argv[3] == "with": import afbs_compile.kernels.op
print(torch._inductor.aoti_load_package(sys.argv[1])(torch.load(sys.argv[2])).shape)
"""
        ok, not_ok = (in_a_fresh_process(code, package, tmp_path / "x.pt", word) for word in ("with", "without"))
        assert ok.returncode == 0, ok.stderr
        assert not_ok.returncode != 0
        assert "afbs::sparse_attention" in not_ok.stderr


class TestWholeOrNotAtAll:
    @pytest.fixture(params=[KeyboardInterrupt, OSError("disk full")], ids=["interrupted", "disk full"])
    def failing_save(self, request, monkeypatch):
        def save(program, file, **_):
            file.write(b"half a file")
            raise request.param

        monkeypatch.setattr(torch.export, "save", save)

    @pytest.mark.parametrize("existing", [None, b"the file of before"], ids=["new", "existing"])
    def test_no_half_file(self, exported, failing_save, tmp_path, existing):
        model, recipe, _ = exported
        target = tmp_path / "model.pt2"
        if existing:
            target.write_bytes(existing)
        with pytest.raises((KeyboardInterrupt, OSError)):
            to_pt2(model, recipe, wandering(200), target)
        assert [file.name for file in tmp_path.iterdir()] == (["model.pt2"] if existing else [])
        assert not existing or target.read_bytes() == existing

    @pytest.mark.parametrize("room", [0, 3000, 20_000])
    @pytest.mark.parametrize("existing", [None, b"the file of before"], ids=["new", "existing"])
    def test_a_full_disk_ends_neither_the_process_nor_the_file_of_before(self, exported, tmp_path, existing, room):
        """A limit on the size of files stands for it: PyTorch's writer aborts the process where a write fails."""
        model, recipe, _ = exported
        target = tmp_path / "model.pt2"
        if existing:
            target.write_bytes(existing)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                to_pt2(model, recipe, wandering(200), target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [file.name for file in tmp_path.iterdir()] == (["model.pt2"] if existing else [])
        assert not existing or target.read_bytes() == existing
