"""What a user may set, checked in one place for the backend and for :func:`afbs_compile.calibrate`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from afbs_compile.errors import OptionError
from afbs_compile.kernels.precision import PRECISIONS
from afbs_compile.recipe import Precision, Recipe
from afbs_compile.tuner.budget import QUANTITIES, Budget, Quantity
from afbs_compile.tuner.lengths import OUTSIDE, Outside
from afbs_compile.tuner.site import METHODS, Method, TuneSettings
from afbs_compile.tuner.space import PARAMETERIZATIONS, Parameterization


@dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(model, backend="afbs", options={...})``.

    Attributes:
        tolerance: largest relative L1 error of a head's output, on every validation input, in (0, 1); or a budget on
            the model's output that all heads share: ``{"kl": nats}`` or ``{"perplexity": relative rise}``.
        method: ``"afbs"`` or ``"paper"`` (Algorithm 1 as printed).
        parameterization: reading of the paper's Eq. 2, used by ``method="paper"``: ``"corrected"`` or ``"paper"``.
        precision: ``"own"``, that of the operands, or ``"fp8"``: attention computes in FP8 where that is faster, the
            device and the call allow it, and the error stays within the tolerance, rounding included, head by head. The
            other heads keep their own precision, and ``explain`` says why.
        min_length: attention over fewer tokens is refused as too short.
        samples: model inputs to calibrate on; by default the inputs of the first call. Each is a mapping of argument
            names to tensors or, for a model that is called with one tensor, that tensor.
        recipe: a :class:`Recipe` or its file; nothing is calibrated then.
        outside: what runs at a length at which the thresholds were not validated (``validated_lengths`` in the recipe).
            ``"extrapolate"``: block-sparse attention; where the error was seen to grow that way, tau is raised by as
            much as the measured law says it takes to keep the error. ``"dense"``: dense attention. ``"recalibrate"``:
            that length is calibrated on its own, on the inputs of its first call or on the samples cut to it. A graph
            compiled for all lengths keeps its thresholds for the first, and runs dense outside for the others.
        dump: folder for the text of every graph before and after the rewrite.
    """

    tolerance: float | Mapping[str, float] = 0.055
    method: Method = "afbs"
    parameterization: Parameterization = "corrected"
    precision: Precision = "own"
    min_length: int = 1024
    samples: Iterable[Any] | None = None
    recipe: str | os.PathLike[str] | Recipe | None = None
    outside: Outside = "extrapolate"
    dump: str | os.PathLike[str] | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Check names, types and ranges.

        Raises:
            OptionError: names the option, what came and what is accepted.
        """
        given = dict(given or {})
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise OptionError(f"unknown option {', '.join(map(repr, unknown))}; known options: {', '.join(known)}")
        if given.get("recipe") is not None and (unused := sorted(set(given) & _CALIBRATION_OPTIONS)):
            raise OptionError(f"{', '.join(unused)}: not accepted together with recipe, which was calibrated already")
        options = cls(**given)
        options._check()
        return options

    @property
    def tuning(self) -> TuneSettings:
        """The part that the tuner needs."""
        searched: dict[str, Any] = {
            "method": self.method,
            "parameterization": self.parameterization,
            "precision": self.precision,
        }
        if isinstance(self.tolerance, Mapping):
            ((quantity, limit),) = self.tolerance.items()
            return TuneSettings(budget=Budget(cast(Quantity, quantity), float(limit)), **searched)
        return TuneSettings(tolerance=float(self.tolerance), **searched)

    def _check(self) -> None:
        accepted = f"a number between 0 and 1, or one of {_one_of(QUANTITIES)} mapped to one"
        _accept("tolerance", self.tolerance, _is_tolerance(self.tolerance), accepted)
        _accept("method", self.method, self.method in METHODS, _one_of(METHODS))
        budget_on_paper = isinstance(self.tolerance, Mapping) and self.method == "paper"
        _accept("method", self.method, not budget_on_paper, "'afbs' with a budget on the output")
        _accept(
            "parameterization",
            self.parameterization,
            self.parameterization in PARAMETERIZATIONS,
            _one_of(PARAMETERIZATIONS),
        )
        _accept("precision", self.precision, self.precision in PRECISIONS, _one_of(PRECISIONS))
        per_head = self.method == "afbs" and not isinstance(self.tolerance, Mapping)
        only = "'own' unless method is 'afbs' and tolerance a number: FP8 is decided by the error of each head"
        _accept("precision", self.precision, self.precision == "own" or per_head, only)
        whole = isinstance(self.min_length, int) and not isinstance(self.min_length, bool)
        _accept("min_length", self.min_length, whole and self.min_length >= 1, "a whole number of tokens, at least 1")
        one_input = isinstance(self.samples, str | Mapping | Tensor)
        iterable = isinstance(self.samples, Iterable) and not one_input
        _accept("samples", self.samples, self.samples is None or iterable, "an iterable of model inputs, e.g. a list")
        _accept("outside", self.outside, self.outside in OUTSIDE, _one_of(OUTSIDE))
        named = self.recipe is not None and self.outside == "recalibrate"
        _accept("outside", self.outside, not named, "'extrapolate' or 'dense' where a recipe is named")
        path = isinstance(self.recipe, str | os.PathLike | Recipe)
        _accept("recipe", self.recipe, self.recipe is None or path, "a Recipe or the path of one")
        folder = self.dump is None or isinstance(self.dump, str | os.PathLike)
        _accept("dump", self.dump, folder, "the path of a folder")
        file_in_the_way = self.dump is not None and Path(self.dump).is_file()
        _accept("dump", self.dump, not file_in_the_way, "the path of a folder, and this is a file")


_CALIBRATION_OPTIONS = {"tolerance", "method", "parameterization", "precision", "samples"}


def _is_tolerance(value: object) -> bool:
    if isinstance(value, Mapping):
        return len(value) == 1 and set(value) <= set(QUANTITIES) and all(map(_is_share, value.values()))
    return _is_share(value)


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < 1


def _accept(name: str, value: object, accepted: bool, what: str) -> None:
    if not accepted:
        came = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
        raise OptionError(f"{name}: got {came}; accepted: {what}")


def _one_of(values: Iterable[str]) -> str:
    return " or ".join(map(repr, values))
