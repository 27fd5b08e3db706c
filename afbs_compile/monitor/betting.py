"""Evidence that a loss is larger than was promised, which may be looked at at any time: testing by betting.

A loss ``x`` in [0, 1] comes again and again, and the null hypothesis is that its expectation, given all that came
before, is at most ``p``. Whoever bets on more pays 1 for a game that multiplies the stake by

    1 + lambda (x - p),   0 <= lambda < 1 / p,

whose expectation is at most 1 under the null, so that the wealth of a gambler who began with 1 is a nonnegative
supermartingale, and by Ville's inequality (1939) reaches ``1 / delta`` with a chance of at most delta, EVER, and
whatever the losses have to do with each other (Waudby-Smith and Ramdas 2024; Podkopaev and Ramdas 2022 watch the risk
of a deployed model so, Timans et al. 2025 that of prediction sets). So does any mixture of such gamblers. Here they
differ in two ways: in the rate ``q`` that each bets on, ``lambda = (q - p) / (p (1 - p))``, which for losses of 0 and 1
makes the wealth the likelihood ratio of q and p; and in when they begin, for a rate that has only now begun to be too
large is not found by gamblers who lost their stakes before. Half of the stakes begin at once; the rest enters
slowly, as ``1 / (1 + log t)`` falls.

Over many heads with wealths ``E`` the mean of E is such a wealth against "all heads keep the promise": at
``1 / delta`` some head does not. Which ones the e-BH procedure says (Wang and Ramdas 2022), under any
dependence: the k heads of largest E, for the largest k with ``E_(k) >= K / (k delta)``; the expected share of
false ones among them is at most delta.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAPS = (0.05, 0.1, 0.2, 0.4, 0.7)
"""The rates that are bet on, as shares of the way from the promised rate to 1."""

AT_ONCE = 0.5
"""Of the stakes."""

LARGEST = 1e100
"""Wealth is cut here: it says all that can be said, and products of it stay finite."""


def waiting(t: int) -> float:
    """Share of the stakes that has not entered the game after ``t`` losses."""
    return (1 - AT_ONCE) / (1 + math.log(t)) if t else 1.0


class Wealth:
    """Of the gamblers against each of some heads; on one device, which nothing here waits for.

    Args:
        heads: H; rate: p, promised, between 0 and 1; device: for the state.
    """

    def __init__(self, heads: int, rate: float, device: torch.device) -> None:
        rates = rate + (1 - rate) * torch.tensor(GAPS, dtype=torch.float64)
        self._rate = rate
        self._stake = ((rates - rate) / (rate * (1 - rate))).to(device)
        self._held = torch.zeros(heads, len(GAPS), dtype=torch.float64, device=device)
        self._waiting = 1.0
        self._seen = 0

    def update(self, loss: Tensor) -> None:
        """Play one round.

        Args:
            loss: ``[H]``, from 0 to 1; NaN where nothing is known of a head: it does not play.
        """
        self._seen += 1
        waiting_now = waiting(self._seen)
        entering, self._waiting = self._waiting - waiting_now, waiting_now
        x = loss.to(torch.float64)[:, None]
        factor = torch.where(x.isnan(), 1.0, 1 + self._stake * (x - self._rate))
        self._held = ((self._held + entering) * factor).clamp_max_(LARGEST)

    @property
    def values(self) -> Tensor:
        """``[H]`` fp64: what a stake of 1 has become; 1 before the first loss."""
        return self._held.mean(-1) + self._waiting


def exceeding(values: Tensor, delta: float) -> tuple[bool, Tensor]:
    """Whether some head breaks its promise, and which ones do, with all that is known of all of them.

    Args:
        values: ``[K]``, the wealth of every head; delta: chance of a false alarm.

    Returns:
        Whether the mean reaches ``1 / delta``; bool ``[K]``, the heads that e-BH names, none where it does not.
    """
    count = len(values)
    named = torch.zeros(count, dtype=torch.bool)
    if not count or float(values.mean()) < 1 / delta:
        return False, named
    order = values.argsort(descending=True, stable=True)
    enough = values[order] * torch.arange(1, count + 1) >= count / delta
    if enough.any():
        named[order[: int(enough.nonzero().max()) + 1]] = True
    return True, named


class Streak:
    """The paper's rule (section III-D): how many losses in a row each head has had.

    It has no rate of false alarms, and a head that keeps its promise now and then never meets it. Arguments as
    of :class:`Wealth`.
    """

    def __init__(self, heads: int, rate: float, device: torch.device) -> None:
        self._length = torch.zeros(heads, dtype=torch.float64, device=device)

    def update(self, loss: Tensor) -> None:
        """Count one round; NaN leaves a head as it is."""
        longer = torch.where(loss >= 1, self._length + 1, 0.0)
        self._length = torch.where(loss.isnan(), self._length, longer)

    @property
    def values(self) -> Tensor:
        """``[H]`` fp64, lengths."""
        return self._length


STREAK = 100
"""Losses in a row that the paper asks for: "over 100 consecutive batches"."""


def enduring(values: Tensor, delta: float) -> tuple[bool, Tensor]:
    """As :func:`exceeding`, by the paper's rule; ``delta`` has no say."""
    named = values >= STREAK
    return bool(named.any()), named
