"""Every wrong input: one sentence on standard error, exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from afbs_compile.cli import calibrate
from afbs_compile.cli.main import FAILED, INTERRUPTED, OK, USAGE, main
from tests.cli.conftest import POSITIONS

TOY = "tests.toy:Toy"
OUT = ["-o", "r.json"]
EXPORT = ["export", TOY, "--recipe", "r.json", "--format"]
SOME = ["--data", "random", *OUT]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The sentence; argparse leaves by SystemExit, everything else by the exit code."""
    try:
        code = main(list(argv))
    except SystemExit as exit_:
        code = exit_.code
    printed = capsys.readouterr()
    assert code == USAGE
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("afbs-compile")
    return printed.err


@pytest.fixture
def nothing_new(tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    yield
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_to_calibrate_writes_nothing(capsys, llama, tmp_path):
    target = tmp_path / "r.json"
    source = ["--data", "random", "--seq-len", "32", "--samples", "1"]
    said = refused(capsys, "calibrate", llama, *source, "-o", str(target))
    assert "nothing was calibrated: 2 x too short: 32 tokens" in said
    assert not target.exists()


def test_the_exit_codes():
    assert (OK, FAILED, USAGE, INTERRUPTED) == (0, 1, 2, 130)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["calibrate", "m", "-o", "r.json"], "required: --data"),
        (["calibrate", "m", *SOME, "--seq-len", "0"], "a whole number, at least 1"),
        (["calibrate", "m", *SOME, "--samples", "few"], "got 'few'; accepted: a whole number"),
        (["calibrate", "m", *SOME, "--method", "guess"], "--method: got 'guess'; accepted: 'afbs' or 'paper'"),
        (["calibrate", "m", *SOME, "--precision", "int8"], "--precision: got 'int8'; accepted: 'own' or 'fp8'"),
        (["calibrate", "m", *SOME, "--parameterization", "own"], "got 'own'; accepted: 'corrected' or 'paper'"),
        (["calibrate", "m", *SOME, "--tolerance", "x"], "--tolerance: got 'x'; accepted: a number between 0 and 1"),
        (["calibrate", "m", *SOME, "--tolerance", "x"], "written 0.055, kl=0.01, perplexity=0.01 or output=0.01"),
        (["calibrate", "m", *SOME, "--tolerance", "bits=0.1"], "--tolerance: got 'bits=0.1'; accepted: a number"),
        (["calibrate", "m", *SOME, "--tolerance", "kl=0"], "--tolerance: got 'kl=0'; accepted: a number"),
        (["calibrate", "m", *SOME, "--min-length", "0"], "--min-length: got '0'; accepted: a whole number of tokens"),
        (["calibrate", "m", *SOME, "--min-length", "few"], "--min-length: got 'few'; accepted: a whole number"),
        (["calibrate", "m", *SOME, "--tolerance", "kl=0.1", "--method", "paper"],
         "method: got 'paper'; accepted: 'afbs' with a budget on the output"),
        (["calibrate", "m", "--data", "random", "-o", "r.yaml"], "-o: got r.yaml; accepted: a file name that ends in"),
        (["calibrate", "m", "--data", "random", "-o", "no/where/r.json"], "folder that exists, and no/where does"),
        (["calibrate", "./nowhere", *SOME], "MODEL: there is no folder ./nowhere"),
        (["calibrate", "a.pt2", *SOME], "MODEL: there is no file a.pt2"),
        (["calibrate", "no.such:thing", *SOME], "MODEL: there is no module no"),
        (["calibrate", "tests.toy:Tox", *SOME], "MODEL: tests.toy has no Tox"),
        (["calibrate", "tests.toy:WIDTH", *SOME], "is a int; accepted: a callable"),
        (["calibrate", "collections:OrderedDict", *SOME], "returned a OrderedDict"),
        (["calibrate", "README.md", *SOME], "MODEL: README.md is a file"),
        (["calibrate", "tests", *SOME], "MODEL: folder tests has no config.json"),
        (["calibrate", TOY, *SOME], "what tests.toy:Toy takes is not known here"),
        (["calibrate", TOY, "--data", "README.md", *OUT], "text needs a tokenizer"),
        (["calibrate", TOY, "--data", "x.npz", *OUT], "--data: there is no file x.npz"),
        (["calibrate", TOY, "--data", "x.txt", *OUT], "--data: there is no file or folder x.txt"),
        (["calibrate", TOY, "--data", "x", "--device", "cpux", *OUT], "--device: got cpux"),
        (["inspect", "r.txt"], "recipe.json: got r.txt; accepted: a file name that ends in .json"),
        (["inspect", "absent.json"], "recipe absent.json cannot be read: No such file or directory"),
        (["graph", TOY, "--diff"], "--diff: accepted only with --recipe"),
        (["graph", TOY, "--after", "--before"], "not allowed with argument"),
        ([*EXPORT, "tflite", "-o", "m.x"], "invalid choice: 'tflite'"),
        ([*EXPORT, "onnx", "-o", "m.pt2"], "a file name that ends in .onnx"),
        ([*EXPORT, "onnx", "--aoti", "-o", "m.onnx"], "--aoti: accepted only with"),
        (["verify", "m.bin", "--model", TOY, "--data", "random"], "FILE: got m.bin; accepted: a name that"),
        (["verify", "m.onnx", "--model", TOY, "--data", "random"], "FILE: there is no file m.onnx"),
        (["verify", "r.json", "--model", TOY, "--data", "random", "--share", "2"], "a number between 0 and 1"),
        (["bench", TOY, "--recipe", "absent.json"], "recipe absent.json cannot be read"),
        (["bench", TOY, "--recipe", "r.json", "--outside", "home"], "--outside: got 'home'; accepted: 'extrapolate'"),
    ],
)  # fmt: skip
def test_a_wrong_argument(argv, sentence, capsys):
    assert sentence in refused(capsys, *argv)


def test_a_tolerance_out_of_range(toy_inputs, tmp_path, capsys, nothing_new):
    argv = ["calibrate", TOY, "--data", toy_inputs, "--tolerance", "7", "-o", str(tmp_path / "r.json")]
    assert "tolerance: got '7'; accepted: a number between 0 and 1" in refused(capsys, *argv)


def test_fp8_with_a_budget(toy_inputs, tmp_path, capsys, nothing_new):
    out = ["-o", str(tmp_path / "r.json")]
    argv = ["calibrate", TOY, "--data", toy_inputs, "--tolerance", "kl=0.1", "--precision", "fp8", *out]
    assert "precision: got 'fp8'; accepted: 'own' unless method is 'afbs' and tolerance a number" in refused(
        capsys, *argv
    )


def test_a_length_beyond_the_models_positions(llama, text, recipes, tmp_path, capsys, nothing_new):
    out = str(tmp_path / "r.json")
    sentence = f"--seq-len: got {POSITIONS + 1}; accepted: up to {POSITIONS}, the positions of {llama}"
    too_long = ["--seq-len", str(POSITIONS + 1)]
    assert sentence in refused(capsys, "calibrate", llama, "--data", text, *too_long, "-o", out)
    assert sentence in refused(capsys, "bench", llama, "--recipe", recipes["llama"], "--seq-len", "128", too_long[1])
    file = str(tmp_path / "m.onnx")
    assert sentence in refused(
        capsys, "export", llama, "--recipe", recipes["llama"], "--format", "onnx", *too_long, "-o", file
    )


def test_a_text_that_is_too_short(llama, text, tmp_path, capsys, nothing_new):
    argv = ["calibrate", llama, "--data", text, "--seq-len", "1024", "--samples", "500", "-o", str(tmp_path / "r.json")]
    assert "tokens, too few for 500 windows of 1024" in refused(capsys, *argv)


def test_a_text_that_is_not_text(llama, tmp_path, capsys):
    (tmp_path / "picture.txt").write_bytes(b"abc\xff\xfe")
    argv = ["calibrate", llama, "--data", str(tmp_path / "picture.txt"), "-o", str(tmp_path / "r.json")]
    assert "is not text: byte 3 is not UTF-8" in refused(capsys, *argv)
    argv[3] = str(tmp_path)
    assert "picture.txt is not text" in refused(capsys, *argv)
    assert not (tmp_path / "r.json").exists()


def test_a_truncated_recipe(recipes, tmp_path, capsys):
    damaged = tmp_path / "r.json"
    damaged.write_text(Path(recipes["toy"]).read_text()[:-50])
    for argv in (
        ["inspect", str(damaged)],
        ["inspect", str(damaged), "--html", str(tmp_path / "r.html")],
        ["graph", TOY, "--recipe", str(damaged)],
        ["bench", TOY, "--recipe", str(damaged)],
        ["verify", str(damaged), "--model", TOY, "--data", "random"],
        ["export", TOY, "--recipe", str(damaged), "--format", "pt2", "-o", str(tmp_path / "m.pt2")],
    ):
        assert f"recipe {damaged} is damaged: it is not JSON" in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == [damaged]


def test_a_recipe_of_another_model(recipes, toy_inputs, tmp_path, capsys, nothing_new):
    foreign, data = recipes["llama"], ["--data", toy_inputs]
    for argv in (
        ["graph", TOY, "--recipe", foreign, "--diff", *data],
        ["bench", TOY, "--recipe", foreign, *data],
        ["verify", foreign, "--model", TOY, *data],
        ["inspect", foreign, "--model", TOY, *data, "--html", str(tmp_path / "r.html")],
        ["export", TOY, "--recipe", foreign, *data, "--format", "pt2", "-o", str(tmp_path / "m.pt2")],
    ):
        assert "belongs to another model" in refused(capsys, *argv)


def test_html_needs_model_and_data_together(recipes, tmp_path, capsys):
    out = ["--html", str(tmp_path / "r.html")]
    assert "accepted only together" in refused(capsys, "inspect", recipes["toy"], "--model", TOY, *out)
    assert "only with --html" in refused(capsys, "inspect", recipes["toy"], "--model", TOY, "--data", "random")
    assert "ends in .html or .htm" in refused(capsys, "inspect", recipes["toy"], "--html", str(tmp_path / "r.pdf"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"y": torch.zeros(1, 512, 128)}, "has y, which tests.toy:Toy does not take; accepted: x"),
        ([1, 2], "holds a int; accepted: tensors by the names of arguments"),
        ({"x": torch.zeros(0, 512, 128)}, "has no input"),
    ],
)
def test_a_file_of_inputs_that_does_not_fit(content, sentence, tmp_path, capsys):
    torch.save(content, tmp_path / "in.pt")
    argv = ["calibrate", TOY, "--data", str(tmp_path / "in.pt"), "-o", str(tmp_path / "r.json")]
    assert sentence in refused(capsys, *argv)


def test_a_file_of_inputs_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"x": Evil()}, tmp_path / "in.pt")
    argv = ["calibrate", TOY, "--data", str(tmp_path / "in.pt"), "-o", str(tmp_path / "r.json")]
    assert "holds more than plain tensors" in refused(capsys, *argv)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_a_damaged_file_of_inputs(suffix, tmp_path, capsys):
    path = tmp_path / f"in{suffix}"
    path.write_bytes(b"not a file of tensors")
    argv = ["calibrate", TOY, "--data", str(path), "-o", str(tmp_path / "r.json")]
    assert str(path) in refused(capsys, *argv)


def test_more_inputs_than_the_file_has(toy_inputs, tmp_path, capsys):
    argv = ["calibrate", TOY, "--data", toy_inputs, "--samples", "3", "-o", str(tmp_path / "r.json")]
    assert "--samples: got 3; accepted: up to 2" in refused(capsys, *argv)
    argv[4:6] = ["--seq-len", "64"]
    assert "--seq-len: not accepted with" in refused(capsys, *argv)


def test_a_damaged_checkpoint(llama, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((Path(llama) / "config.json").read_text())
    argv = ["calibrate", str(folder), "--data", "random", "-o", str(tmp_path / "r.json")]
    assert f"MODEL: {folder} cannot be loaded (" in refused(capsys, *argv)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert f"MODEL: {folder} has none of the weights of a LlamaForCausalLM" in refused(capsys, *argv)
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    assert f"MODEL: {folder} cannot be loaded (" in refused(capsys, *argv)
    (tmp_path / "m.pt2").write_bytes(b"PK nothing")
    argv[1] = str(tmp_path / "m.pt2")
    assert "cannot be loaded by torch.export (" in refused(capsys, *argv)


def test_a_missing_extra_is_named(llama, tmp_path, capsys, monkeypatch):
    def absent(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", absent)
    argv = ["calibrate", llama, "--data", "random", "-o", str(tmp_path / "r.json")]
    assert "needs transformers, which is not installed: pip install 'afbs-compile[hf]'" in refused(capsys, *argv)


def test_an_interruption_is_no_traceback(monkeypatch, toy_inputs, tmp_path, capsys):
    def interrupted(*_: object, **__: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "calibrate", interrupted)
    argv = ["calibrate", TOY, "--data", toy_inputs, "-o", str(tmp_path / "r.json")]
    assert main(argv) == INTERRUPTED
    assert capsys.readouterr().err == "afbs-compile calibrate: interrupted; nothing was written\n"


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch, recipes):
    monkeypatch.setattr("afbs_compile.cli.inspect.print_inspection", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", recipes["toy"]])


def test_a_recipe_that_cannot_be_written(monkeypatch, toy_inputs, toy_recipe, tmp_path, capsys):
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: toy_recipe)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    argv = ["calibrate", TOY, "--data", toy_inputs, "-o", str(tmp_path / "r.json")]
    assert "r.json cannot be written: No space left on device" in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_ids_longer_than_the_positions(llama, tmp_path, capsys):
    np.savez(tmp_path / "ids.npz", input_ids=np.zeros((1, POSITIONS + 1), dtype=np.int64))
    argv = ["calibrate", llama, "--data", str(tmp_path / "ids.npz"), "-o", str(tmp_path / "r.json")]
    assert f"got {POSITIONS + 1}; accepted: up to {POSITIONS}" in refused(capsys, *argv)


def test_a_recipe_with_an_unreadable_number(recipes, tmp_path, capsys):
    content = json.loads(Path(recipes["toy"]).read_text())
    content["options"]["tolerance"] = "much"
    (tmp_path / "r.json").write_text(json.dumps(content))
    sentence = f"recipe {tmp_path / 'r.json'} is damaged: tolerance is 'much'"
    assert sentence in refused(capsys, "inspect", str(tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [("spiral", "mask is 'spiral'; accepted: full, causal"), (None, "mask is 'None'; accepted: full")],
)
def test_a_recipe_of_a_mask_that_is_not_known(mask, sentence, recipes, tmp_path, capsys):
    content = json.loads(Path(recipes["toy"]).read_text())
    content["graphs"][0]["sites"][1]["mask"] = mask
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert f"layers.1: {sentence}" in refused(capsys, "inspect", str(tmp_path / "r.json"))
