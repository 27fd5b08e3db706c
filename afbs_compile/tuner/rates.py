"""What kernels took on this machine while it was quiet: what a calibration goes by that finds it busy.

A kernel's time is its work times a rate, as in a roofline: dense attention's work is pairs of a row and a key, a sparse
call's is such pairs in blocks, a predictor's is blocks. Rates are learnt as calibrations time their calls, kept in the
cache's folder, and hold for calls of about the same size: short ones have other bounds than long ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from afbs_compile.cache import cache_path, read_private, write_private
from afbs_compile.kernels.attend.machine import identity
from afbs_compile.version import __version__

APART = 2
"""Doublings of work over which a rate still holds."""

LARGEST = 1 << 20
"""Bytes of a file of rates."""


class Work(NamedTuple):
    """What one call of a kernel has to do.

    Attributes:
        kernel: its name; amount: in units of the kernel's own.
    """

    kernel: str
    amount: float

    @property
    def doublings(self) -> int:
        """Of the unit, about."""
        return round(math.log2(self.amount))


@dataclass
class Rates:
    """Milliseconds per unit of work, by kernel and by the doublings of the work that it was measured at.

    Args:
        path: where they are kept; ``None``: nowhere.
        known: to begin with.
    """

    path: Path | None = None
    known: dict[str, dict[int, float]] = field(default_factory=dict)
    _learnt: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Rates:
        """Those of a device of this machine; none where their file is missing, damaged, or not to be trusted."""
        conditions = {"device": identity(device), "versions": [torch.__version__, __version__]}
        path = cache_path(conditions, "rates-")
        try:
            return cls(path, _parsed(read_private(path, LARGEST).decode("utf-8")))
        except (OSError, ValueError):
            return cls(path)

    def learn(self, work: Work, ms: float) -> None:
        """Remember what a kernel took on a quiet machine; the least counts, for other work only adds to it."""
        if work.amount <= 0 or not 0 < ms < math.inf:
            return
        rates, rate = self.known.setdefault(work.kernel, {}), ms / work.amount
        if rate < rates.get(work.doublings, math.inf):
            rates[work.doublings] = rate
            self._learnt = True

    def ms(self, work: Work) -> float | None:
        """What a kernel would take on a quiet machine; ``None`` where nothing of that size is known."""
        rates = self.known.get(work.kernel, {})
        if not rates or work.amount <= 0:
            return None
        nearest = min(rates, key=lambda place: abs(place - work.doublings))
        return rates[nearest] * work.amount if abs(nearest - work.doublings) <= APART else None

    def save(self) -> None:
        """Write what is new. A folder that cannot be written loses nothing but time: it is not told."""
        if self._learnt and self.path is not None:
            self._learnt = False
            text = json.dumps(self.known, sort_keys=True)
            with contextlib.suppress(OSError):
                write_private(self.path, json.dumps({"digest": _digest(text), "rates": text}))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed(text: str) -> dict[str, dict[int, float]]:
    """The rates of a file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        whole = json.loads(text)
        if not isinstance(whole, Mapping) or _digest(whole["rates"]) != whole["digest"]:
            raise ValueError("the digest is of something else")
        rates = json.loads(whole["rates"])
        return {
            str(kernel): {int(place): float(rate) for place, rate in each.items()} for kernel, each in rates.items()
        }
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("it is no file of rates") from error
