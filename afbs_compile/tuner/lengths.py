"""How a head's error moves with the length of the sequence at fixed thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from afbs_compile.recipe import LARGEST_EXPONENT

Outside = Literal["extrapolate", "dense", "recalibrate"]
"""What runs at lengths that were not validated: see :class:`afbs_compile.options.Options`."""
OUTSIDE: tuple[str, ...] = get_args(Outside)

MOST_CAREFUL = 0.05
"""Extrapolation lowers a head's ``1 - tau`` to this share of itself at most."""


@dataclass(frozen=True)
class Lengths:
    """What was learnt about other lengths.

    Attributes:
        validated: shortest and longest length between which every length that was measured held the tolerance.
        exponent: fp32 ``[H]``, b of ``error ~ length ** b``; 0 where only one length was measured.
    """

    validated: tuple[int, int]
    exponent: Tensor


def fit_lengths(
    lengths: Sequence[int],
    error: Tensor,
    prefixes: Mapping[int, Tensor],
    sparse: Tensor,
    tolerance: float,
    telling: Callable[[int], bool] = lambda _: True,
) -> Lengths:
    """Fit error against length.

    Args:
        lengths: of the inputs.
        error: fp32 ``[inputs, H]``, of whole inputs.
        prefixes: fp32 ``[n, H]`` by length, errors of causal prefixes.
        sparse: bool ``[H]``, heads that skip anything; tolerance: relative L1.
        telling: of a length, whether it has blocks enough to skip that its error tells how errors move.
    """
    by_length: dict[int, list[Tensor]] = {}
    for length, row in zip(lengths, error, strict=True):
        by_length.setdefault(length, []).append(row[None])
    whole = set(by_length)
    for length, rows in prefixes.items():
        by_length.setdefault(length, []).append(rows)
    measured = {length: torch.cat(rows) for length, rows in sorted(by_length.items())}
    shortest = max(whole)
    for length in sorted(measured, reverse=True):
        if length not in whole and not (measured[length][:, sparse] <= tolerance).all():
            break
        shortest = min(shortest, length)
    return Lengths(
        (shortest, max(whole)), _exponent({n: rows for n, rows in measured.items() if telling(n)}, error.shape[1])
    )


def extrapolated_tau(
    tau: float, exponents: tuple[float, float], validated: tuple[int, int], length: int, room: float = 1.0
) -> float:
    """A head's tau at another length, raised where the error was seen to grow towards that length beyond its room.

    Args:
        tau: validated; exponents: a and b of ``error ~ (1 - tau) ** a * length ** b``.
        validated: shortest and longest validated length; length: the other one.
        room: how many times its validated error a head may have, at least 1.
    """
    tau_exponent, length_exponent = exponents
    nearest = min(max(length, validated[0]), validated[1])
    if tau_exponent <= 0 or length == nearest:
        return tau
    # (1 - tau') ** a * length ** b = room * (1 - tau) ** a * nearest ** b
    growth: float = (length / nearest) ** length_exponent
    share: float = (room / growth) ** (1 / tau_exponent) if growth > room else 1.0
    return 1 - (1 - tau) * max(MOST_CAREFUL, share)


def _exponent(measured: Mapping[int, Tensor], heads: int) -> Tensor:
    """Least squares of the log of the mean error over the log of the length; 0 without two lengths."""
    if len(measured) < 2:
        return torch.zeros(heads)
    x = torch.tensor([float(length) for length in measured]).log()
    y = torch.stack([rows.mean(0) for rows in measured.values()]).clamp_min(1e-9).log()
    dx = (x - x.mean())[:, None]
    slope = (dx * y).sum(0) / dx.square().sum()
    return slope.nan_to_num(0.0).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
