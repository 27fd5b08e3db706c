"""Sweeps over many cases: `make test` takes the first ones, `make test-all` and CI take them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """Parameters of which those after the first ``count`` are marked slow; a tuple is the values of several names."""
    marks = pytest.mark.slow
    return [
        case if index < count else pytest.param(*(case if type(case) is tuple else (case,)), marks=marks)
        for index, case in enumerate(cases)
    ]
