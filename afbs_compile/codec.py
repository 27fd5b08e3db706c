"""Frozen dataclasses read back from JSON by their annotations, which say the type and the range of each value."""

from __future__ import annotations

import functools
import json
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from afbs_compile.errors import cut, shown

MOST_CHARACTERS = 10_000
"""Of one string."""

MOST_LEVELS = 4
"""Containers inside each other in a value whose type is not declared."""

NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Halves of surrogate pairs, which no file takes, and what moves a terminal's cursor or worse."""

FINITE = "is not finite; accepted: finite numbers"


class DamagedError(Exception):
    """What is wrong with a decoded value, without the file's name."""


@dataclass(frozen=True)
class Range:
    """What a number may be: ``Annotated[float, Range(0, 1)]``. Numbers are finite wherever they stand.

    Attributes:
        low, high: smallest and largest value.
        inside: whether the ends themselves are not accepted.
    """

    low: float = -math.inf
    high: float = math.inf
    inside: bool = False

    def check(self, value: float, where: str) -> None:
        """Refuse a number out of range.

        Raises:
            DamagedError: saying where it stands.
        """
        if not (self.low < value < self.high if self.inside else self.low <= value <= self.high):
            ends = ", ends left out" if self.inside else ""
            raise DamagedError(f"{where} is {shown(value)}, out of range: {self.low:g} to {self.high:g}{ends}")


def parsed(text: str) -> Any:
    """JSON, strictly: no NaN, no key twice in an object.

    Raises:
        DamagedError: it is not that.
    """
    try:
        return json.loads(text, parse_constant=_refused_constant, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise DamagedError("it is not JSON that a recipe could be: too many levels") from error
    except ValueError as error:
        raise DamagedError(f"it is not JSON ({cut(str(error))})") from error


def _refused_constant(name: str) -> Any:
    raise ValueError(f"{name} {FINITE}")


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def decode(kind: Any, value: Any, where: str) -> Any:
    """Rebuild a value of the annotated type from JSON, refusing anything that does not fit it.

    Fields that have a default may be missing: a file from before they were added means the default.

    Raises:
        DamagedError: saying where it does not fit.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _plain(value, where)
    if origin is Annotated:
        value = decode(arguments[0], value, where)
        for accepted in arguments[1:]:
            accepted.check(value, where)
        return value
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if isinstance(kind, type) and hasattr(kind, "_fields"):
        return _decode_named_tuple(kind, value, where)
    if origin in (Union, types.UnionType):
        inner = next(option for option in arguments if option is not type(None))
        return None if value is None else decode(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise DamagedError(f"{where} is {shown(value)}, not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            raise DamagedError(f"{where} is not a list of the expected length")
        return tuple(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise DamagedError(f"{where} is not an object")
        return {_plain(key, where): decode(arguments[1], item, f"{where}.{cut(key)}") for key, item in value.items()}
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise DamagedError(f"{where} is {shown(value)}, not {kind.__name__}")
    return float(_plain(value, where)) if kind is float else _plain(value, where)


def _plain(value: Any, where: str, level: int = 0) -> Any:
    """A value that JSON has, without anything that would fail later: where it is written, shown or computed with."""
    if isinstance(value, str):
        if len(value) > MOST_CHARACTERS or NO_TEXT.search(value):
            raise DamagedError(f"{where} is {shown(value)}, which is too long, or no text")
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            raise DamagedError(f"{where} is {shown(value)}, which is beyond any number that is meant")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise DamagedError(f"{where} {FINITE}")
    elif isinstance(value, list | dict):
        if level == MOST_LEVELS:
            raise DamagedError(f"{where} has too many levels")
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        for item in inside:
            _plain(item, where, level + 1)
    return value


@functools.cache  # thousands of heads have the same ones
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise DamagedError(f"{where} is not an object")
    names = {f.name for f in fields(kind)}
    optional = {f.name for f in fields(kind) if f.default is not MISSING}
    if wrong := (set(value) - names) | (names - optional - set(value)):
        raise DamagedError(f"{where} lacks or has too much: {cut(', '.join(sorted(wrong)))}")
    hints = _hints(kind)
    try:
        return kind(**{name: decode(hints[name], value[name], f"{where}.{name}") for name in names & set(value)})
    except ValueError as error:  # a value that checks itself
        raise DamagedError(f"{where}: {error}") from error


def _decode_named_tuple(kind: Any, value: Any, where: str) -> Any:
    hints = _hints(kind)
    least = len(hints) - len(kind._field_defaults)
    if not isinstance(value, list) or not least <= len(value) <= len(hints):
        count = str(least) if least == len(hints) else f"{least} to {len(hints)}"
        raise DamagedError(f"{where} is not a list of {count}")
    given = zip(hints.items(), value, strict=False)
    return kind(*(decode(hint, item, f"{where}.{name}") for (name, hint), item in given))
