"""What the option ``monitor`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from afbs_compile.errors import OptionError, shown

WHEN = ("on demand", "automatically")

SHARE, COST = 0.01, 0.01
"""By default: calls that are looked at, and what looks may take of the time of calls."""


@dataclass(frozen=True)
class MonitorSettings:
    """How a running model is watched.

    Attributes:
        share: chance that a call is looked at; of a budget on the output a quarter of it, for there a look is a dense
            pass of the model. ``None`` for :data:`SHARE`, and for attention calls less where their looks would take
            more than :data:`COST` of their time.
        rows: query rows that are computed densely when a call is looked at.
        delta: chance of a false alarm, over all heads and all time.
        rate: the share of inputs on which a head may exceed its tolerance; ``None`` for what the recipe promised.
        look_every: looks at each call between two reads of the evidence, which wait for the device.
        keep: inputs of a compiled graph, of those calls that are looked at, that are kept in memory to calibrate on
            again; 0 for none: they may be private. A model that is served without a graph needs none.
        recalibrate: ``"on demand"`` or, after each alarm that names heads, ``"automatically"``.
        on_alarm: called with each :class:`afbs_compile.monitor.monitor.Alarm`.
    """

    share: float | None = None
    rows: int = 64
    delta: float = 0.05
    rate: float | None = None
    look_every: int = 4
    keep: int = 0
    recalibrate: str = "on demand"
    on_alarm: Callable[[Any], Any] | None = None

    @property
    def chance(self) -> float:
        """That a call is looked at before it is known what a look costs."""
        return SHARE if self.share is None else self.share

    @classmethod
    def parse(cls, given: Any) -> MonitorSettings | None:
        """Check what the user gave; ``None`` and ``False`` are no monitor, ``True`` is one as by default.

        Raises:
            OptionError: names the entry, what came and what is accepted.
        """
        if given is None or given is False:
            return None
        if given is not True and not isinstance(given, Mapping):
            raise OptionError(f"monitor: got {shown(given)}; accepted: True, or a mapping of {', '.join(_names())}")
        values = {} if given is True else dict(given)
        if unknown := [name for name in values if name not in _names()]:
            raise OptionError(f"monitor: unknown {shown(unknown[0])}; accepted: {', '.join(_names())}")
        for name, value in values.items():
            accepts, accepted = _RULES[name]
            if not accepts(value):
                raise OptionError(f"monitor: {name} is {shown(value)}; accepted: {accepted}")
        return cls(**values)


def _names() -> list[str]:
    return [field.name for field in fields(MonitorSettings)]


def _is_share(value: object, *, largest: bool = False) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and float(value) > 0 and (float(value) < 1 or (largest and float(value) == 1))  # type: ignore[arg-type]


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "share": (lambda value: value is None or _is_share(value, largest=True), "None, or a number above 0, at most 1"),
    "rows": (lambda value: _is_whole(value, 8), "a whole number, at least 8"),
    "delta": (_is_share, "a number between 0 and 1"),
    "rate": (lambda value: value is None or _is_share(value), "None, or a number between 0 and 1"),
    "look_every": (lambda value: _is_whole(value, 1), "a whole number, at least 1"),
    "keep": (lambda value: _is_whole(value, 0), "a whole number, 0 for none"),
    "recalibrate": (lambda value: value in WHEN, " or ".join(map(repr, WHEN))),
    "on_alarm": (lambda value: value is None or callable(value), "None, or a function of one alarm"),
}
