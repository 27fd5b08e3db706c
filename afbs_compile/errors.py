"""Errors and warnings that a user sees, and how they show what came."""

from __future__ import annotations

import reprlib

OUT_OF_MEMORY = ("out of memory", "t allocate memory", "bad_alloc")
"""What CUDA's, PyTorch's and C++'s allocators say."""

MOST_SHOWN = 80
"""Characters of a value in a sentence."""

_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxstring = _repr.maxother = _repr.maxlong = MOST_SHOWN


class AfbsError(Exception):
    """Base of the errors that afbs_compile raises on purpose."""


class OptionError(AfbsError, ValueError):
    """An option or argument is unknown or out of range; the message names it and what is accepted."""


class CalibrationError(AfbsError, ValueError):
    """No attention call could be calibrated; one sentence says which were found and why each stays dense."""


class RecipeError(AfbsError, ValueError):
    """A recipe is damaged, foreign, from a newer version, or belongs to another model; one sentence says which."""


class ExportError(AfbsError, RuntimeError):
    """A model could not be exported, or a file not be loaded; one sentence says why and what would help."""


class AfbsWarning(UserWarning):
    """Something stayed dense, or was not done, that the user may have expected."""


def first_line(error: BaseException) -> str:
    """What an error of another package says, in one line; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def shown(value: object) -> str:
    """A value in a sentence: on one line, cut at :data:`MOST_SHOWN` characters, whatever it is."""
    text = _repr.repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def cut(text: str) -> str:
    """A name or a list of names in a sentence, as :func:`shown` but without quotes."""
    return shown(text)[1:-1]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the device's or the host's, did not suffice."""
    said = str(error)
    return isinstance(error, MemoryError) or any(word in said for word in OUT_OF_MEMORY)
