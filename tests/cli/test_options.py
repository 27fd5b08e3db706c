"""An option is declared once: keywords, flags, defaults, recipe, cache key and error sentences follow from it."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import tomllib
from pathlib import Path

import pytest
import torch

import afbs_compile
from afbs_compile import Recipe, backend
from afbs_compile.cache import cache_path
from afbs_compile.cli import bench, calibrate
from afbs_compile.cli.main import COMMANDS, USAGE, main
from afbs_compile.errors import OptionError
from afbs_compile.found import FoundGraph
from afbs_compile.options import OPTIONS, Option, Options, of_calibration, one_of
from afbs_compile.passes.record import record_graphs
from tests.toy import Toy, drifting

TOY = "tests.toy:Toy"


@pytest.fixture
def grain(monkeypatch):
    """A whole number from 1 to 9 that has a say in calibration."""
    rule = (lambda value, _: isinstance(value, int) and 0 < value < 10), "a whole number from 1 to 9"
    option = Option("grain", 3, "How fine.", (rule,), calibrates=True, runs=False, flag="--grain", text=int)
    monkeypatch.setitem(OPTIONS, "grain", option)
    return option


def flags_of(command) -> dict[str, argparse.Action]:
    """The arguments of a command by flag."""
    parser = argparse.ArgumentParser()
    command.add(parser)
    return {flag: action for action in parser._actions for flag in action.option_strings}


def conditions(**options) -> dict:
    """What a cached recipe of the toy would be looked up by."""
    (graph,) = record_graphs(Toy().eval(), [drifting(128)])
    (inputs,) = graph.samples
    return backend._conditions(FoundGraph.of(graph.gm, inputs, 1), inputs, Options.parse(options), None)


def test_a_declared_option_is_a_keyword_of_calibrate(grain):
    with pytest.raises(OptionError, match="samples: got none"):  # the keyword itself is accepted
        afbs_compile.calibrate(Toy(), [], grain=9)
    with pytest.raises(OptionError, match="grain: got 10; accepted: a whole number from 1 to 9"):
        afbs_compile.calibrate(Toy(), [drifting(128)], grain=10)


def test_a_declared_option_is_named_where_another_is_unknown(grain, monkeypatch):
    sentence = "unknown option 'grian'; known options: tolerance, .*, dump, grain$"
    with pytest.raises(OptionError, match=sentence):
        Options.parse({"grian": 1})
    with pytest.raises(OptionError, match="unknown option 'grian'; known options: .*min_length, samples, grain$"):
        afbs_compile.calibrate(Toy(), [drifting(128)], grian=1)
    monkeypatch.delitem(OPTIONS, "grain")
    with pytest.raises(OptionError, match="unknown option 'grain'"):
        Options.parse({"grain": 1})


def test_a_declared_option_has_its_flag_in_the_help(grain, capsys):
    with pytest.raises(SystemExit) as left:
        main(["calibrate", "--help"])
    assert left.value.code == 0
    assert "--grain GRAIN How fine. (default: 3)" in " ".join(capsys.readouterr().out.split())
    assert "--grain" not in flags_of(bench)


def test_a_declared_option_is_checked_before_a_model_is_loaded(grain, tmp_path, capsys):
    given = ["calibrate", "no.such:model", "--data", "random", "-o", str(tmp_path / "r.json"), "--grain"]
    for text in ("10", "fine"):
        with pytest.raises(SystemExit) as left:
            main([*given, text])
        assert left.value.code == USAGE
        assert f"argument --grain: got '{text}'; accepted: a whole number from 1 to 9" in capsys.readouterr().err


@pytest.mark.usefixtures("sparse_is_faster")
def test_a_declared_option_is_recorded(grain, toy_inputs, tmp_path, capsys):
    path = tmp_path / "r.json"
    given = ["calibrate", TOY, "--data", toy_inputs, "--samples", "1", "--min-length", "128", "-o", str(path)]
    assert main([*given, "--grain", "5", "--json"]) == 0
    recipe = Recipe.load(path)
    assert recipe.options == {
        "tolerance": 0.055, "method": "afbs", "parameterization": "corrected", "precision": "own", "min_length": 128,
        "grain": 5,
    }  # fmt: skip
    recipe.save(tmp_path / "again.json")
    assert Recipe.load(tmp_path / "again.json").options["grain"] == 5
    assert json.loads(path.read_text())["options"]["grain"] == 5


def test_a_declared_option_is_part_of_the_cache_key(grain):
    one, other = conditions(grain=1), conditions(grain=2)
    assert (one.pop("option grain"), other.pop("option grain")) == (1, 2)
    assert one == other
    assert conditions()["option grain"] == 3
    assert cache_path(conditions(grain=1)) != cache_path(conditions(grain=2))
    assert Options.parse({"grain": 1}).key["grain"] == 1


def test_an_option_that_only_runs_is_not(monkeypatch):
    option = Option("pace", "slow", "How fast.", (one_of(("slow", "fast")),), False, True, "--pace")
    monkeypatch.setitem(OPTIONS, "pace", option)
    assert conditions(pace="slow") == conditions(pace="fast")
    assert "pace" not in Options.parse().recorded
    assert flags_of(bench)["--pace"].default == "slow"
    assert "--pace" not in flags_of(calibrate)
    assert Options.parse({"pace": "fast", "recipe": "r.json"}).pace == "fast"


def test_every_option_of_calibration_alone_is_part_of_the_cache_key():
    given = {
        "tolerance": {"kl": 0.1}, "method": "paper", "parameterization": "paper", "precision": "fp8",
    }  # fmt: skip
    assert set(given) == {option.name for option in of_calibration() if option.recorded and not option.runs}
    paths = [cache_path(conditions()), *(cache_path(conditions(**{name: value})) for name, value in given.items())]
    assert len(set(paths)) == len(paths)
    assert cache_path(conditions(min_length=64)) == paths[0], "which calls are long enough says the graph itself"


def test_the_version_is_part_of_the_cache_key(monkeypatch):
    now = cache_path(conditions())
    assert cache_path(conditions()) == now
    monkeypatch.setattr("afbs_compile.conditions.__version__", "0.3.0")
    assert cache_path(conditions()) != now


def test_every_option_has_a_flag_of_its_own():
    flags = [option.flag for option in OPTIONS.values() if option.flag]
    without = [option.name for option in OPTIONS.values() if not option.flag]
    assert without == ["first_call", "monitor"], "a command is the answer, and serves nobody for long"
    assert len(set(flags)) == len(flags)
    assert all(flag.startswith("--") for flag in flags)
    there = [flags_of(command) for command in COMMANDS]
    assert [flag for flag in flags if not any(flag in known for known in there)] == []


def test_each_flag_is_where_its_option_has_a_say():
    assert {option.flag for option in of_calibration()} <= set(flags_of(calibrate))
    running = {option.flag for option in OPTIONS.values() if option.runs and not option.calibrates and option.flag}
    assert running == {"--recipe", "--outside", "--dump"}
    assert running <= set(flags_of(bench))


@pytest.mark.parametrize("command", [calibrate, bench])
def test_defaults_of_the_command_line_are_those_of_the_options(command):
    flags = flags_of(command)
    shared = [option for option in OPTIONS.values() if option.text is not None and option.flag in flags]
    assert len(shared) == {calibrate: 5, bench: 2}[command]
    for option in shared:
        assert flags[option.flag].dest == option.name
        assert flags[option.flag].default == option.default
        option.check(option.default, {name: known.default for name, known in OPTIONS.items()})


def test_defaults_of_calibrate_are_those_of_the_options():
    parameters = inspect.signature(afbs_compile.calibrate).parameters
    keywords = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert list(parameters)[:2] == ["model", "samples"]
    assert keywords == {option.name: option.default for option in of_calibration() if option.name != "samples"}
    assert all(
        f"    {name} (default {value!r}): " in afbs_compile.calibrate.__doc__ for name, value in keywords.items()
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", 0.1), ("tolerance", {"kl": 0.1}), ("method", "afbs"), ("parameterization", "corrected"),
        ("precision", "own"), ("samples", [torch.zeros(1)]),
    ],
)  # fmt: skip
def test_options_of_calibration_are_refused_beside_a_recipe(name, value):
    sentence = f"^{name}: not accepted together with recipe, which was calibrated already$"
    with pytest.raises(OptionError, match=sentence):
        Options.parse({"recipe": "r.json", name: value})
    assert getattr(Options.parse({"recipe": None, name: value}), name) is value


def test_what_runs_is_accepted_beside_a_recipe(tmp_path):
    options = Options.parse({"recipe": "r.json", "min_length": 5, "outside": "dense", "dump": tmp_path})
    assert (options.recipe, options.min_length, options.outside, options.dump) == ("r.json", 5, "dense", tmp_path)
    with pytest.raises(
        OptionError, match="outside: got 'recalibrate'; accepted: 'extrapolate' or 'dense' where a recipe"
    ):
        Options.parse({"recipe": "r.json", "outside": "recalibrate"})


def test_bench_checks_what_runs_before_a_model_is_loaded(recipes, tmp_path, capsys):
    given = ["bench", "no.such:model", "--recipe", recipes["toy"]]
    assert main([*given, "--outside", "recalibrate"]) == USAGE
    assert "outside: got 'recalibrate'; accepted: 'extrapolate' or 'dense'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*given, "--dump", str(tmp_path / "file")]) == USAGE
    assert "accepted: the path of a folder, and this is a file" in capsys.readouterr().err


def test_bench_writes_the_graphs_where_it_is_told_to(recipes, toy_inputs, tmp_path, capsys):
    given = ["bench", TOY, "--recipe", recipes["toy"], "--data", toy_inputs, "--runs", "1", "--json"]
    assert main([*given, "--outside", "dense", "--dump", str(tmp_path / "graphs")]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["sparse_sites"] == 2
    assert any("afbs.sparse_attention" in file.read_text() for file in (tmp_path / "graphs").iterdir())


def test_the_installed_command_is_a_function():
    """An entry point that names a module would fail only where the package is installed."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for target in (*project["scripts"].values(), *project["entry-points"]["torch_dynamo_backends"].values()):
        module, _, name = target.partition(":")
        assert inspect.isfunction(getattr(importlib.import_module(module), name))
