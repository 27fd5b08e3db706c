"""Run a file, and compare it with the dense model and with the recipe's promise.

FILE is a recipe or what afbs-compile export wrote. Exit code 1 if a check fails: an output that is not finite, a file
that does not compute what PyTorch computes with its recipe, or too many heads that err more than the recipe's
tolerance on this data. Of an engine the program that it was built from is run, by onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from afbs_compile.cli import arguments as options
from afbs_compile.cli.models import LoadedModel, load_model
from afbs_compile.cli.progress import each, step
from afbs_compile.cli.recipes import SUFFIX, load_recipe, usual_length
from afbs_compile.cli.sources import Reading, Sample, load_samples
from afbs_compile.errors import OptionError
from afbs_compile.export import SUFFIXES, load
from afbs_compile.export.tensorrt_rtx import NOT_RUN, program_of
from afbs_compile.recipe import BudgetRecord, Recipe
from afbs_compile.report.applied import apply, rewritten
from afbs_compile.report.fidelity import Closeness, HeadErrors, closeness, first_output, head_errors, run_dense
from afbs_compile.report.inspection import error_limit, weakest_promise

NAME = "verify"
SHARE = 0.9
SAME = {torch.float32: 1e-4}
SAME_IN_HALF = 2e-2
"""Largest difference, relative to the largest value, between a file and PyTorch with the same thresholds."""

Call = Callable[..., Any]


@dataclass(frozen=True)
class Check:
    """One thing that must hold; ``passed`` is ``None`` where it could not be checked."""

    name: str
    passed: bool | None
    detail: str


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    names = ", ".join(f"*{suffix}" for suffix in (SUFFIX, *SUFFIXES.values()))
    parser.add_argument("file", metavar="FILE", help=f"what to verify: {names}")
    parser.add_argument("--model", metavar="MODEL", required=True, help=options.MODEL_HELP)
    options.add_placement(parser)
    options.add_data(parser, required=True)
    options.add_length(parser, "default: as calibrated")
    options.add_samples(parser)
    parser.add_argument("--recipe", metavar="R", help="the recipe of a file that does not hold its own")
    parser.add_argument(
        "--share",
        metavar="S",
        type=options.share,
        help="least share of (head, input) pairs that keep the tolerance "
        f"(default: {SHARE}, or what the recipe promises if that is more)",
    )
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run, compare, print; 1 if a check fails."""
    recipe, call, checks_of_file = _file(arguments)
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    samples = _samples(arguments, model, recipe)
    name = f"recipe {arguments.file}" if call is None else f"the recipe of {arguments.file}"
    errors = _promise(model, recipe, samples, name)
    with_torch = None if recipe is None else rewritten(model.module, recipe, name=name)
    if call is None:  # a recipe file: PyTorch with its thresholds is what is verified
        assert with_torch is not None
        against_dense, against_torch = _compare(model, samples, with_torch, None)
    else:
        against_dense, against_torch = _compare(model, samples, call, with_torch)
    checks = [*checks_of_file, _finite(against_dense), *_same(against_torch, model, call)]
    budget = None if recipe is None else recipe.budget
    kept = _kept(errors, recipe, arguments.share) if budget is None else _inside(budget, against_dense)
    checks.append(kept)
    report = {
        "file": arguments.file,
        "samples": len(samples),
        "against_dense": _figures(against_dense),
        "against_torch": _figures(against_torch) if against_torch else None,
        "promise": None if errors is None or recipe is None else _spread(errors, error_limit(recipe)[0]),
        "checks": [asdict(check) for check in checks],
    }
    if arguments.json:
        print(json.dumps(_without_nan(report), indent=1))
    else:
        _print(report, checks)
    return 1 if any(check.passed is False for check in checks) else 0


def _file(arguments: argparse.Namespace) -> tuple[Recipe | None, Call | None, list[Check]]:
    """The recipe, the file ready to be called (a recipe alone is not), and what is known of it before it runs."""
    path = Path(arguments.file)
    if path.suffix.lower() == SUFFIX:
        if arguments.recipe is not None:
            raise OptionError("--recipe: not accepted with a FILE that is a recipe itself")
        return load_recipe(arguments.file, "FILE"), None, []
    if path.suffix.lower() not in SUFFIXES.values():
        accepted = ", ".join((SUFFIX, *SUFFIXES.values()))
        raise OptionError(f"FILE: got {path}; accepted: a name that ends in {accepted}")
    if not path.is_file():
        raise OptionError(f"FILE: there is no file {path}")
    program, checks = _program(path)
    with step(f"loading {program}"):
        runner = load(program)
    own = runner.recipe if arguments.recipe is None else load_recipe(arguments.recipe)
    return own, runner, checks


def _program(path: Path) -> tuple[Path, list[Check]]:
    """The file that runs here: of an engine the ONNX program that it was built from."""
    if path.suffix.lower() != SUFFIXES["tensorrt-rtx"]:
        return path, []
    program = program_of(path)
    return program, [
        Check("engine", True, f"built from {program}, which is what runs below, by onnxruntime"),
        Check("engine runs", None, NOT_RUN),
    ]


def _samples(arguments: argparse.Namespace, model: LoadedModel, recipe: Recipe | None) -> list[Sample]:
    length = arguments.seq_len or usual_length(model, recipe, arguments.data)
    return load_samples(arguments.data, model, length=length, count=arguments.samples, reading=Reading.of(arguments))


def _promise(
    model: LoadedModel, recipe: Recipe | None, samples: Sequence[Sample], name: str
) -> list[HeadErrors] | None:
    if recipe is None:
        return None
    with step("running the model"):
        graphs = apply(model.module, recipe, samples, name=name)
    return list(each(head_errors(graphs), "measuring heads", total=sum(len(g.plan.calls) for g in graphs)))


def _compare(
    model: LoadedModel, samples: Sequence[Sample], call: Call, reference: Call | None
) -> tuple[list[Closeness], list[Closeness]]:
    """The file against the dense model and against PyTorch with the same recipe, per sample."""
    against_dense, against_torch = [], []
    for sample in each(samples, "comparing"):
        dense, logits = run_dense(model.module, sample)
        with torch.no_grad():
            out = first_output(call(**sample))
            against_dense.append(closeness(out, dense, sample, logits=logits))
            if reference is not None:
                expected = first_output(reference(**sample))
                against_torch.append(closeness(out, expected, sample, logits=logits))
    return against_dense, against_torch


def _finite(found: Sequence[Closeness]) -> Check:
    wrong = sum(not math.isfinite(one.relative_error) for one in found)
    detail = f"{wrong} of {len(found)} outputs have NaN or infinity" if wrong else f"all {len(found)} outputs"
    return Check("finite", not wrong, detail)


def _same(found: Sequence[Closeness], model: LoadedModel, call: Call | None) -> list[Check]:
    if call is None:
        return []
    if not found:
        return [Check("same as PyTorch", None, "not checked: the file holds no recipe, and --recipe was not given")]
    limit = SAME.get(model.dtype or torch.float32, SAME_IN_HALF)
    worst = max((one.largest_difference for one in found), key=lambda d: math.inf if math.isnan(d) else d)
    detail = f"largest difference {worst:.2g} of the largest value, {limit:g} accepted"
    return [Check("same as PyTorch", worst <= limit, detail)]


def _kept(errors: Sequence[HeadErrors] | None, recipe: Recipe | None, share: float | None) -> Check:
    if errors is None or recipe is None:
        return Check("promise", None, "not checked: the file holds no recipe, and --recipe was not given")
    if not errors:
        return Check("promise", True, "no call is sparse, so nothing can err")
    assert recipe.tolerance is not None  # a budget is checked on the output
    spread = _spread(errors, recipe.tolerance)
    share = _promised(recipe) if share is None else share
    detail = (
        f"{spread['share_within_tolerance']:.1%} of {spread['pairs']} (head, input) pairs within {recipe.tolerance:g}, "
        f"{share:.0%} asked; worst {spread['worst']:.3f} ({spread['worst_site']} head {spread['worst_head']}, "
        f"input {spread['worst_input']})"
    )
    return Check("promise", spread["share_within_tolerance"] >= share, detail)


def _inside(budget: BudgetRecord, against_dense: Sequence[Closeness]) -> Check:
    """Whether the output stays inside the recipe's budget on this data."""
    figures = _figures(against_dense)
    if budget.quantity == "output":
        cost = figures["relative_error_mean"]
    elif budget.quantity == "kl":
        cost = figures["kl"]
    else:
        ours, theirs = figures["perplexity"], figures["perplexity_compared_with"]
        cost = None if ours is None else ours / theirs - 1
    if cost is None:
        return Check("promise", None, "not checked: the output on this data says nothing about next tokens")
    return Check(
        "promise", cost <= budget.limit, f"{budget.amount(cost)}, {budget.amount(budget.limit, 'at most ')} accepted"
    )


def _promised(recipe: Recipe) -> float:
    """The share of inputs on which a head keeps the tolerance, by the recipe's promise where that says more."""
    promise = weakest_promise(recipe)
    return SHARE if promise is None else max(SHARE, 1 - promise.head_bound)


def _spread(errors: Sequence[HeadErrors], tolerance: float) -> dict[str, Any]:
    """How the errors of all (head, input) pairs lie about the tolerance; NaN counts as beyond it."""
    if not errors:
        return {"tolerance": tolerance, "pairs": 0}
    everything = torch.cat([site.errors.flatten() for site in errors])
    worst = max(errors, key=lambda site: float(site.errors.nan_to_num(math.inf).max()))
    place = int(worst.errors.nan_to_num(math.inf).argmax())
    return {
        "tolerance": tolerance,
        "pairs": everything.numel(),
        "share_within_tolerance": float((everything <= tolerance).double().mean()),
        "worst": float(worst.errors.flatten()[place]),
        "worst_site": worst.site,
        "worst_head": worst.heads[place % len(worst.heads)],
        "worst_input": place // len(worst.heads),
    }


def _figures(found: Sequence[Closeness]) -> dict[str, Any]:
    positions = sum(one.positions for one in found)
    losses = [one.losses for one in found if one.losses is not None]
    divergences = [one.kl for one in found if one.kl is not None]
    return {
        "relative_error_mean": statistics.mean(one.relative_error for one in found),
        "relative_error_worst": max(one.relative_error for one in found),
        "largest_difference": max(one.largest_difference for one in found),
        "positions": positions,
        "kl": statistics.mean(divergences) if divergences else None,
        "same_first_choice": sum(one.agreeing for one in found) / positions if positions else None,
        "perplexity": math.exp(statistics.mean(ours for ours, _ in losses)) if losses else None,
        "perplexity_compared_with": math.exp(statistics.mean(theirs for _, theirs in losses)) if losses else None,
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: ``null`` stands for both."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(report: dict[str, Any], checks: Sequence[Check]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    dense = report["against_dense"]
    console.print(Text(f"{report['file']} on {report['samples']} samples, against the dense model"))
    mean, worst = dense["relative_error_mean"], dense["relative_error_worst"]
    console.print(f"  relative error of the output  {mean:.4f}, worst sample {worst:.4f}")
    if dense["positions"]:
        console.print(f"  same first choice             {dense['same_first_choice']:.1%} of {dense['positions']:,}")
    if dense["perplexity"] is not None:
        ours, theirs = dense["perplexity"], dense["perplexity_compared_with"]
        console.print(f"  perplexity                    {ours:.2f}, dense {theirs:.2f} ({ours / theirs - 1:+.1%})")
    for check in checks:
        word, style = {True: ("PASS", "green"), False: ("FAIL", "red"), None: ("----", "dim")}[check.passed]
        console.print(Text(word, style=style), Text(f"{check.name}: {check.detail}"))
