"""Frozen dataclasses read back from JSON by their annotations."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class DamagedError(Exception):
    """What is wrong with a decoded value, without the file's name."""


def decode(kind: Any, value: Any, where: str) -> Any:
    """Rebuild a value of the annotated type from JSON, refusing anything that does not fit it.

    Fields that have a default may be missing: a file from before they were added means the default.

    Raises:
        DamagedError: saying where it does not fit.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
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
            raise DamagedError(f"{where} is {value!r}, not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            raise DamagedError(f"{where} is not a list of the expected length")
        return tuple(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise DamagedError(f"{where} is not an object")
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise DamagedError(f"{where} is {value!r}, not {kind.__name__}")
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise DamagedError(f"{where} is not an object")
    names = {f.name for f in fields(kind)}
    optional = {f.name for f in fields(kind) if f.default is not MISSING}
    if wrong := (set(value) - names) | (names - optional - set(value)):
        raise DamagedError(f"{where} lacks or has too much: {', '.join(sorted(wrong))}")
    hints = get_type_hints(kind)
    try:
        return kind(**{name: decode(hints[name], value[name], f"{where}.{name}") for name in names & set(value)})
    except ValueError as error:  # a value that checks itself
        raise DamagedError(f"{where}: {error}") from error


def _decode_named_tuple(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(value, list) or len(value) != len(hints):
        raise DamagedError(f"{where} is not a list of {len(hints)}")
    return kind(
        *(decode(hint, item, f"{where}.{name}") for (name, hint), item in zip(hints.items(), value, strict=True))
    )
