"""One threshold for all heads of a model, found by bracketing on what it does to the model's output.

What heads differ in was measured to belong to the text more than to the head (``docs/figures.md``, "One threshold"): a
threshold for each head wins on the text that it was chosen on and loses on others. So a single number moves all heads
along one family of operating points, and any model takes the same few forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from afbs_compile.kernels.call import SparseCall
from afbs_compile.passes.capture import SampleRun
from afbs_compile.tuner.budget import Budget
from afbs_compile.tuner.end_to_end import EndToEnd, OutputChange

START = 0.02
"""Strength that a block must exceed in the first try: about +1 % of perplexity of a 40M Llama at 4K to 32K tokens."""

SLOPE = 1.5
"""``log cost`` over ``log threshold`` where only one point is known; measured: 1.2 to 2."""

FLATTEST = 0.5
"""The least slope that two points on one side of the limit are believed to have."""

FARTHEST = 8.0
"""Factor between one try and the next, at most."""

SPENT = 0.85
"""A cost in [SPENT, 1] x budget ends the search."""

QUICK_TRIES, TRIES = 3, 4
"""Thresholds tried on one sample, then on all that choose."""

TRIES_OF_CONTENDER = 2
"""Thresholds tried with each family where there are several: on one sample, once where that is all there is."""

MOST_STEPS_BACK = 3
"""Times that a threshold which failed the check is made more careful, before all heads stay dense."""

CAREFUL, LEAST_STEP = 0.9, 0.85
"""The first step back aims at this share of the budget, as if the cost grew with the threshold itself, and is this at
most; the second is two such steps, the third three."""

UNDERSPENT = 0.7
"""A step back that leaves more of the budget than the rest of this went too far: one threshold between is tried."""

PIECES = 5
"""Windows of tokens that the output of each sample is compared in; twice as many where there is one sample."""


class Judge:
    """What thresholds cost, on the samples that choose and on those that had no say.

    Every other sample chooses: neighbours are often of one kind. Of a single sample every other window of tokens does,
    and a forward pass serves the choice and the check.

    Args:
        runs: samples.
        budget: of the output.

    Raises:
        OptionError: the graph returns no such output, or no tokens are known to compute a perplexity on.

    Attributes:
        unit: what :attr:`chosen_on` and :attr:`checked_on` count: ``"samples"`` or ``"windows"``.
    """

    def __init__(self, runs: Sequence[SampleRun], budget: Budget) -> None:
        self.budget = budget
        self._choosing = EndToEnd(runs[::2], budget.quantity)
        self._checking = EndToEnd(runs[1::2], budget.quantity) if runs[1:] else None
        self.unit: Literal["samples", "windows"] = "windows" if self._checking is None else "samples"
        self._seen: tuple[Mapping[str, SparseCall], list[OutputChange]] | None = None
        compared = len(runs) if self._checking else self._choosing.pieces_of(2 * PIECES)
        self.chosen_on, self.checked_on = (compared + 1) // 2, compared // 2

    @property
    def evaluations(self) -> int:
        """Forward passes on one sample so far."""
        return self._choosing.evaluations + (self._checking.evaluations if self._checking else 0)

    @property
    def is_quick(self) -> bool:
        """Whether one of the samples that choose is less work than all of them."""
        return self._checking is not None and self.chosen_on > 1

    def quickly(self, calls: Mapping[str, SparseCall]) -> float:
        """Cost on one of the samples that choose."""
        return self.budget.cost(self._choosing(calls, samples=1))

    def choosing(self, calls: Mapping[str, SparseCall]) -> float:
        """Cost on all that choose."""
        if self._checking is None:
            return self.budget.cost(self._windows(calls)[::2])
        return self.budget.cost(self._choosing(calls))

    def checking(self, calls: Mapping[str, SparseCall]) -> tuple[float, float | None] | None:
        """Cost and its upper end on what had no say; ``None`` where nothing had none."""
        checking = self._checking
        changes = self._windows(calls)[1::2] if checking is None else checking(calls, pieces=PIECES)
        return (self.budget.cost(changes), self.budget.upper(changes)) if changes else None

    def _windows(self, calls: Mapping[str, SparseCall]) -> list[OutputChange]:
        if self._seen is None or self._seen[0] != calls:
            self._seen = calls, self._choosing(calls, pieces=2 * PIECES)
        return self._seen[1]


@dataclass(frozen=True)
class Spending:
    """The threshold that was found.

    Attributes:
        threshold: strength that a block must exceed; 0 keeps everything.
        measured: its cost on what chose; checked: on what had no say, ``None`` where nothing had none, or nothing is
            sparse; upper: of the latter, the upper end of its confidence interval.
        steps_back: times that the check failed.
    """

    threshold: float
    measured: float
    checked: float | None
    upper: float | None
    steps_back: int


def about(
    judge: Judge, chosen: Callable[[float], Mapping[str, SparseCall]], progress: Callable[[], None], *, tries: int
) -> float:
    """About the threshold that spends the budget, found on one sample.

    Args:
        judge: of the cost; tries: passes, one where all that chooses is one sample.
        chosen: the calls at a threshold; progress: called after each pass.
    """

    cost, tries = (judge.quickly, tries) if judge.is_quick else (judge.choosing, 1)
    return search(_counted(cost, chosen, progress), judge.budget.limit, START, tries).next


def spend(
    judge: Judge,
    chosen: Callable[[float], Mapping[str, SparseCall]],
    progress: Callable[[], None],
    start: float | None = None,
) -> Spending:
    """Find the largest threshold whose cost is inside the budget, on what chooses and on what checks.

    Args:
        judge: of the cost.
        chosen: the calls at a threshold; progress: called after each pass.
        start: about where it is, where that is known.
    """

    limit, cost = judge.budget.limit, _counted(judge.choosing, chosen, progress)
    if start is None:
        start = about(judge, chosen, progress, tries=QUICK_TRIES) if judge.is_quick else START
    found = search(cost, limit, start, TRIES)
    threshold, measured = found.inside, found.cost
    if threshold == 0.0:
        return Spending(0.0, 0.0, None, None, 0)
    failed: tuple[float, float] | None = None
    for steps_back in range(MOST_STEPS_BACK + 1):
        check = judge.checking(chosen(threshold))
        if check is None:
            return Spending(threshold, measured, None, None, steps_back)
        progress()
        if check[0] <= limit:
            if failed is not None:
                threshold, check = _half_way_back(judge, chosen, progress, (threshold, check), failed)
                measured = cost(threshold)
            return Spending(threshold, measured, *check, steps_back)
        failed = threshold, check[0]
        threshold *= min(CAREFUL * limit / check[0], LEAST_STEP) ** (steps_back + 1)
    return Spending(0.0, 0.0, None, None, MOST_STEPS_BACK + 1)


Check = tuple[float, float | None]
"""A cost, and the upper end of its confidence interval where there is one."""


def _half_way_back(
    judge: Judge,
    chosen: Callable[[float], Mapping[str, SparseCall]],
    progress: Callable[[], None],
    inside: tuple[float, Check],
    failed: tuple[float, float],
) -> tuple[float, Check]:
    """Take part of a step back that went too far back again, where the check passes there too.

    Args:
        judge, chosen, progress: as of :func:`spend`.
        inside: a threshold that passed, and its check; failed: one that did not, and its cost.
    """
    limit, (threshold, check) = judge.budget.limit, inside
    if check[0] > UNDERSPENT * limit:
        return inside
    costs = {threshold: max(check[0], limit / 64), failed[0]: failed[1]}
    between = _further(costs, CAREFUL * limit) if math.isfinite(failed[1]) else math.sqrt(threshold * failed[0])
    again = judge.checking(chosen(between))
    progress()
    return inside if again is None or not again[0] <= limit else (between, again)


def _counted(
    cost: Callable[[Mapping[str, SparseCall]], float],
    chosen: Callable[[float], Mapping[str, SparseCall]],
    progress: Callable[[], None],
) -> Callable[[float], float]:
    """The cost of a threshold, one step of progress each."""

    def at(threshold: float) -> float:
        found = cost(chosen(threshold))
        progress()
        return found

    return at


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Attributes:
        inside: the largest threshold that was measured to cost at most the limit, 0 where none was; cost: of it.
        next: where it would go on.
    """

    inside: float
    cost: float
    next: float


def search(cost: Callable[[float], float], limit: float, start: float, tries: int) -> Found:
    """Bracket the threshold whose cost is the limit, by secants in the logarithms of both.

    Args:
        cost: of a threshold; grows with it but for noise, and may be negative.
        limit: above 0; start: first threshold; tries: thresholds measured.
    """
    points: dict[float, float] = {}
    x = start
    for _ in range(tries):
        points[x] = cost(x)
        if SPENT * limit <= points[x] <= limit:
            return Found(x, points[x], x)
        x = _further(points, limit)
    safe = [threshold for threshold, found in points.items() if found <= limit]
    # A threshold above one that exceeds the limit is inside by noise alone.
    below = min((threshold for threshold, found in points.items() if not found <= limit), default=math.inf)
    inside = max((threshold for threshold in safe if threshold < below), default=0.0)
    return Found(inside, points.get(inside, 0.0), x)


def _further(points: Mapping[float, float], limit: float) -> float:
    """Where the cost is expected to lie in the middle of what ends the search."""
    aim = math.log(limit * (1 + SPENT) / 2)
    known = {x: found if math.isfinite(found) else 64 * limit for x, found in points.items()}
    logs = sorted((math.log(x), math.log(max(found, limit / 64))) for x, found in known.items())
    outside = next((i for i, (_, y) in enumerate(logs) if y > math.log(limit)), len(logs))
    if 0 < outside < len(logs):
        (x0, y0), (x1, y1) = logs[outside - 1], logs[outside]
        share = min(max((aim - y0) / (y1 - y0), 0.1), 0.9) if y1 > y0 else 0.5
        return math.exp(x0 + share * (x1 - x0))
    nearest, next_one = (logs[0], logs[1:2]) if outside == 0 else (logs[-1], logs[-2:-1])
    slope = SLOPE
    if next_one:
        slope = min(max((next_one[0][1] - nearest[1]) / (next_one[0][0] - nearest[0]), FLATTEST), SLOPE)
    step = min(max((aim - nearest[1]) / slope, -math.log(FARTHEST)), math.log(FARTHEST))
    return math.exp(nearest[0] + step)
