"""The options, each declared once: the backend, :func:`afbs_compile.calibrate`, command line and cache follow.

To add one, add a declaration to :data:`OPTIONS`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from afbs_compile.errors import OptionError
from afbs_compile.kernels.call import PRECISIONS
from afbs_compile.monitor.settings import MonitorSettings
from afbs_compile.recipe import METHODS, Recipe
from afbs_compile.tuner.budget import QUANTITIES, Budget
from afbs_compile.tuner.lengths import OUTSIDE
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.space import PARAMETERIZATIONS

Rule = tuple[Callable[[Any, Mapping[str, Any]], bool], str]
"""Whether a value is accepted, given it and all values; and what is accepted, for the error."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: in ``options={...}`` and as an argument; default: where it is not given.
        meaning: for a reader, one sentence.
        rules: what must hold, in the order in which they are asked; the first looks at the value alone.
        calibrates: whether it is an option of calibration; runs: of what runs. An option of calibration alone is not
            accepted beside a recipe, and recipes of another value of it are not reused.
        flag: on the command line, where calibration is asked for by name; empty for none.
        text: reads the value from the command line; ``None`` where the command reads it itself. written: how it is
            written there, where that is not plain.
        recorded: whether a recipe says what was given.
    """

    name: str
    default: Any
    meaning: str
    rules: tuple[Rule, ...]
    calibrates: bool
    runs: bool
    flag: str
    text: Callable[[str], Any] | None = str
    written: str = ""
    recorded: bool = True

    def check(self, value: Any, values: Mapping[str, Any]) -> None:
        """Refuse a value.

        Raises:
            OptionError: names the option, what came and what is accepted.
        """
        for accepts, accepted in self.rules:
            if not accepts(value, values):
                came = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
                raise OptionError(f"{self.name}: got {came}; accepted: {accepted}")


def one_of(values: Iterable[str]) -> Rule:
    """A rule that accepts some words."""
    accepted = tuple(values)
    return (lambda value, _: isinstance(value, str) and value in accepted), " or ".join(map(repr, accepted))


def tolerance_of(text: str) -> float | dict[str, float]:
    """``0.055``, ``kl=0.01``, ``perplexity=0.01`` or ``output=0.01``.

    Raises:
        ValueError: it is no number.
    """
    quantity, equals, number = text.rpartition("=")
    return {quantity: float(number)} if equals else float(number)


def whole_number(text: str) -> int:
    """``8192``, ``8,192`` or ``8_192``.

    Raises:
        ValueError: it is no whole number.
    """
    return int(text.replace(",", ""))


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < 1


def _is_tolerance(value: object, _: Mapping[str, Any]) -> bool:
    if isinstance(value, Mapping):
        return len(value) == 1 and set(value) <= set(QUANTITIES) and all(map(_is_share, value.values()))
    return value is None or _is_share(value)


def _is_whole(value: object, _: Mapping[str, Any]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_samples(value: object, _: Mapping[str, Any]) -> bool:
    one_input = isinstance(value, str | Mapping | Tensor)
    return value is None or (isinstance(value, Iterable) and not one_input)


def _has_budget(values: Mapping[str, Any]) -> bool:
    return isinstance(values["tolerance"], Mapping)


_QUANTITIES = " or ".join(map(repr, QUANTITIES))

_DECLARED = (
    Option(
        "tolerance",
        None,
        "Largest relative L1 error of a head's output, on every validation input; or a budget on the model's output, "
        "kept by one threshold for all heads: {'kl': nats}, {'perplexity': relative rise} or {'output': relative L1 "
        "error}. Left out: {'kl': 0.01} for a graph that returns the logits of its tokens, else 0.055.",
        ((_is_tolerance, f"a number between 0 and 1, or one of {_QUANTITIES} mapped to one"),),
        calibrates=True,
        runs=False,
        flag="--tolerance",
        text=tolerance_of,
        written="0.055, kl=0.01, perplexity=0.01 or output=0.01",
    ),
    Option(
        "method",
        "afbs",
        "'afbs': largest sparsity within the tolerance, validated until it passes, else DENSE; 'paper': Algorithm 1 as "
        "printed.",
        (
            one_of(METHODS),
            (lambda value, all_: not (_has_budget(all_) and value == "paper"), "'afbs' with a budget on the output"),
        ),
        calibrates=True,
        runs=False,
        flag="--method",
    ),
    Option(
        "parameterization",
        "corrected",
        "Reading of the paper's Eq. 2, used by method 'paper'.",
        (one_of(PARAMETERIZATIONS),),
        calibrates=True,
        runs=False,
        flag="--parameterization",
    ),
    Option(
        "precision",
        "own",
        "'own': that of the operands; 'fp8': heads compute in FP8 where that is faster, the device and the call allow "
        "it, and the error stays within the tolerance, rounding included; explain says why the others do not.",
        (
            one_of(PRECISIONS),
            (
                lambda value, all_: value == "own" or (all_["method"] == "afbs" and not _has_budget(all_)),
                "'own' unless method is 'afbs' and tolerance a number: FP8 is decided by the error of each head",
            ),
        ),
        calibrates=True,
        runs=False,
        flag="--precision",
    ),
    Option(
        "min_length",
        1024,
        "Attention over fewer tokens is refused as too short.",
        ((_is_whole, "a whole number of tokens, at least 1"),),
        calibrates=True,
        runs=True,
        flag="--min-length",
        text=whole_number,
    ),
    Option(
        "samples",
        None,
        "Model inputs to calibrate on, by default the inputs of the first call; each is a mapping of argument names to "
        "tensors or, for a model that is called with one tensor, that tensor.",
        ((_are_samples, "an iterable of model inputs, e.g. a list"),),
        calibrates=True,
        runs=False,
        flag="--data",
        text=None,
        recorded=False,
    ),
    Option(
        "recipe",
        None,
        "A Recipe or its file; nothing is calibrated then.",
        (
            (
                lambda value, _: value is None or isinstance(value, str | os.PathLike | Recipe),
                "a Recipe or the path of one",
            ),
        ),
        calibrates=False,
        runs=True,
        flag="--recipe",
        text=None,
    ),
    Option(
        "outside",
        "extrapolate",
        "What runs at a length at which the thresholds were not validated: 'extrapolate': sparse attention, tau raised "
        "where the error was seen to grow that way; 'dense'; 'recalibrate': that length is calibrated on its own.",
        (
            one_of(OUTSIDE),
            (
                lambda value, all_: all_["recipe"] is None or value != "recalibrate",
                "'extrapolate' or 'dense' where a recipe is named",
            ),
        ),
        calibrates=False,
        runs=True,
        flag="--outside",
    ),
    Option(
        "first_call",
        "calibrate",
        "What happens where no recipe is named or cached: 'calibrate' on the samples or the first call; 'dense': every "
        "call stays dense.",
        (one_of(("calibrate", "dense")),),
        calibrates=False,
        runs=False,
        flag="",
    ),
    Option(
        "monitor",
        None,
        "Whether quality is watched while the model runs, and how: True, or a mapping of the attributes of "
        "afbs_compile.monitor.settings.MonitorSettings.",
        ((lambda value, _: MonitorSettings.parse(value) is None or True, "True, or a mapping"),),
        calibrates=False,
        runs=True,
        flag="",
    ),
    Option(
        "dump",
        None,
        "Folder for the text of every graph before and after the rewrite.",
        (
            (lambda value, _: value is None or isinstance(value, str | os.PathLike), "the path of a folder"),
            (
                lambda value, _: value is None or not Path(value).is_file(),
                "the path of a folder, and this is a file",
            ),
        ),
        calibrates=False,
        runs=True,
        flag="--dump",
    ),
)

OPTIONS: dict[str, Option] = {option.name: option for option in _DECLARED}
"""Every option by name; code outside the package adds an entry."""


class Options:
    """Checked values of all options; an option is an attribute, e.g. ``options.tolerance``."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self._values == other._values

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"there is no option {name}") from None

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None = None, known: Iterable[Option] | None = None) -> Options:
        """Check names, types and ranges.

        Args:
            given: values by name.
            known: the options that are accepted here, by default all.

        Raises:
            OptionError: names the option, what came and what is accepted.
        """
        given, names = dict(given or {}), [option.name for option in (OPTIONS.values() if known is None else known)]
        if unknown := sorted(set(given) - set(names)):
            raise OptionError(f"unknown option {', '.join(map(repr, unknown))}; known options: {', '.join(names)}")
        done = {option.name for option in OPTIONS.values() if not option.runs}
        if given.get("recipe") is not None and (unused := sorted(set(given) & done)):
            raise OptionError(f"{', '.join(unused)}: not accepted together with recipe, which was calibrated already")
        values = {option.name: given.get(option.name, option.default) for option in OPTIONS.values()}
        for option in OPTIONS.values():
            option.check(values[option.name], values)
        return cls(values)

    @property
    def recorded(self) -> dict[str, Any]:
        """What a recipe says was asked of calibration, as JSON has it."""
        mine = [option.name for option in OPTIONS.values() if option.calibrates and option.recorded]
        return {name: _plain(self._values[name]) for name in mine}

    @property
    def key(self) -> dict[str, Any]:
        """What must be equal for a cached recipe to be used; samples are told by their values, elsewhere."""
        return {name: value for name, value in self.recorded.items() if not OPTIONS[name].runs}

    @property
    def budget(self) -> Budget | None:
        """The budget on the output, where there is one."""
        if not _has_budget(self._values):
            return None
        ((quantity, limit),) = self.tolerance.items()
        return Budget(quantity, float(limit))

    @property
    def recipe_file(self) -> Path | None:
        """The file of the recipe that is named; ``None`` where none is, or as an object."""
        return None if self.recipe is None or isinstance(self.recipe, Recipe) else Path(self.recipe)

    @property
    def watching(self) -> MonitorSettings | None:
        """How quality is watched, where it is."""
        return MonitorSettings.parse(self.monitor)

    @property
    def tuning(self) -> TuneSettings:
        """The part that the tuner needs."""
        is_number = self.tolerance is not None and not _has_budget(self._values)
        return TuneSettings(
            tolerance=float(self.tolerance) if is_number else TuneSettings.tolerance,
            automatic=self.tolerance is None and self.method == "afbs" and self.precision == "own",
            method=self.method,
            parameterization=self.parameterization,
            budget=self.budget,
            precision=self.precision,
            asked=self.recorded,
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value


def of_calibration() -> list[Option]:
    """The options that :func:`afbs_compile.calibrate` takes, as keyword arguments but for the samples."""
    return [option for option in OPTIONS.values() if option.calibrates]


def accepts_options(function: Function) -> Function:
    """Give :func:`afbs_compile.calibrate` the signature and the description that follow from the declarations."""
    kind = inspect.Parameter.KEYWORD_ONLY
    options = [option for option in of_calibration() if option.recorded]
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [inspect.Parameter(option.name, kind, default=option.default) for option in options]
    function.__signature__ = inspect.Signature([*parameters, *keywords])  # type: ignore[attr-defined]
    described = "\n".join(f"    {option.name} (default {option.default!r}): {option.meaning}" for option in options)
    function.__doc__ = f"{inspect.getdoc(function)}\n\nOptions:\n{described}\n"
    return function
