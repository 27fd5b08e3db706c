"""Errors and warnings that a user sees."""


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
