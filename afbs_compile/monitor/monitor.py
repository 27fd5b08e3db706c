"""Watches the sparse calls of one graph or model while it runs: looks, evidence, alarms, and heads made dense."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
from torch import Tensor

from afbs_compile.errors import AfbsWarning, CalibrationError, first_line
from afbs_compile.kernels.attend import machine
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.launcher import device_constants
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.sight import without_idle_parts
from afbs_compile.monitor.betting import STREAK, Streak, Wealth, enduring, exceeding
from afbs_compile.monitor.metrics import prometheus_text
from afbs_compile.monitor.promised import Promised
from afbs_compile.monitor.rows import row_errors
from afbs_compile.monitor.settings import COST, SHARE, MonitorSettings
from afbs_compile.recipe import Recipe
from afbs_compile.tuner.space import all_dense

MARGIN = 2.0
"""Standard errors that the error of the sampled rows must exceed the tolerance by: a head that keeps just within it,
as calibrated heads do, would else exceed it in half of all samples."""

SHORTEST_MS = 1e-6
"""So much a call takes at least: clocks have ticks."""

SHOWN = 8
"""Heads that an alarm's sentence names."""

OUTPUT = "output"
"""The name under which the model's own output is watched."""

OUTPUT_RATE = 0.25
"""Of a budget. What one call costs is cut at its inverse, four times the budget, and counted as a share of that: the
promise that the mean is within the budget is the promise that the mean share is at most this."""


Milliseconds = Callable[[], float]


@dataclass(frozen=True)
class Alarm:
    """Evidence that a promise is broken.

    Attributes:
        when: ISO 8601, UTC. heads: the call and number of each head that is named; none where it is only known that
            some head exceeds. For a budget the call is ``"output"``.
        evidence: mean of the heads' E-values, which is at least 1/delta; the longest streak by the paper's rule.
        sampled: looks so far; reason: for a reader, one sentence.
    """

    when: str
    heads: tuple[tuple[str, int], ...]
    evidence: float
    sampled: int
    reason: str


@dataclass
class _Watched:
    """A call: what was promised of it, how often it is looked at, what is known, and what recent looks took."""

    promised: Promised
    share: float
    calls: int = 0
    sampled: int = 0
    dense: list[bool] = field(default_factory=list)
    evidence: Wealth | Streak | None = None
    losses: Tensor | None = None
    judged: Tensor | None = None
    with_dense: dict[SparseCall, SparseCall] = field(default_factory=dict)
    took: list[tuple[Milliseconds, Milliseconds]] = field(default_factory=list)

    def in_force(self, call: SparseCall) -> SparseCall:
        """The call with alarmed heads DENSE."""
        if not any(self.dense):
            return call
        if call not in self.with_dense:
            self.with_dense[call] = call.where([not dense for dense in self.dense], all_dense(call))
        return self.with_dense[call]

    def look_less(self) -> None:
        """Let looks cost :data:`COST` of the calls at most, by what recent ones took; the device is waited for."""
        if self.took:
            ratio = median(look() / max(call(), SHORTEST_MS) for call, look in self.took)
            self.share = min(SHARE, COST / max(ratio, COST))
            self.took.clear()

    def note(self, loss: Tensor) -> None:
        """Take one look's losses ``[H]`` into account, NaN for heads that were not judged."""
        if self.evidence is None or self.losses is None or self.judged is None:
            kind = Streak if self.promised.by_streak else Wealth
            self.evidence = kind(len(loss), self.promised.rate, loss.device)
            self.losses, self.judged = torch.zeros(2, len(loss), dtype=torch.float64, device=loss.device)
        self.evidence.update(loss)
        self.losses += loss.nan_to_num(0.0)
        self.judged += ~loss.isnan()
        self.sampled += 1


class Monitor:
    """Of the calls of one compiled graph, or of one model that is served without one.

    Args:
        settings: how to watch; recipe: that the calls run with, ``None`` where that comes later.
        recalibrate: what :meth:`recalibrate` does; react: what is done after an alarm that names heads, where that is
            asked for.

    Attributes:
        recipe: that the calls run with now; alarms: in the order in which they came.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        recipe: Recipe | None,
        recalibrate: Callable[[], Recipe | None],
        react: Callable[[], object],
    ) -> None:
        self.settings, self.recipe = settings, recipe
        self.alarms: tuple[Alarm, ...] = ()
        self._recalibrate, self._react = recalibrate, react
        self._watched: dict[str, _Watched] = {}
        self._random = random.Random()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._lock = threading.Lock()
        self._looks = 0

    def watches(self, name: str) -> bool:
        """Whether it is known what was promised of a call."""
        return name in self._watched

    def watch(self, name: str, promised: Promised) -> None:
        """Begin to watch a call, or begin again: it has other thresholds now."""
        with self._lock:
            self._watched[name] = _Watched(promised, self.settings.chance, dense=[False] * len(promised.limits))

    def forget(self, name: str) -> None:
        """Watch a call, or the output, no more."""
        with self._lock:
            del self._watched[name]

    def attend(self, name: str, operands: Operands, call: SparseCall) -> Tensor | None:
        """The result of a call ``[B, H, q_len, D_v]``; ``None`` where it is to be computed densely.

        Args:
            name: of a call that is watched; operands: of it; call: its constants.
        """
        watched = self._watched[name]
        watched.calls += 1
        call = watched.in_force(call)
        if call.dense_at(operands.q_len, operands.k_len):
            return None
        operands, device = without_idle_parts(operands), operands.device
        looked_at = watched.promised.is_tested and self.draws(watched.share)
        if not looked_at or machine.is_recording(device):
            return run(operands, call)[0]
        (out, _), call_ms = machine.clocked(lambda: run(operands, call), device)
        _, look_ms = machine.clocked(lambda: self._look(watched, operands, call, out), device)
        if self.settings.share is None:
            watched.took.append((call_ms, look_ms))
        self._count_look()
        return out

    def draws(self, share: float) -> bool:
        """Whether a call is looked at that is looked at with this chance."""
        return share >= 1 or self._random.random() < share

    def see_output(self, cost: float) -> None:
        """Take into account what a call of the model cost of its budget, as a share of the budget."""
        share = min(max(cost * OUTPUT_RATE, 0.0), 1.0) if cost == cost else 1.0
        with self._lock:
            self._watched[OUTPUT].note(torch.tensor([share], dtype=torch.float64))
        self._count_look()

    @torch.no_grad()
    def _look(self, watched: _Watched, operands: Operands, call: SparseCall, out: Tensor) -> None:
        """Compare some rows of one batch element with dense attention."""
        device = operands.device
        element = self._random.randrange(operands.q.shape[0])
        with self._lock, machine.without_autocast(device):
            generator = self._generators.get(device)
            if generator is None:
                generator = torch.Generator(device)
                generator.manual_seed(self._random.getrandbits(63))
                self._generators[device] = generator
            found = row_errors(operands.element(element), out[element : element + 1], self.settings.rows, generator)
            limits = device_constants(watched.promised.limits, device)
            left_out = device_constants(tuple(map(float, call.dense_heads)), device).bool() | found.error.isnan()
            holds = found.error - MARGIN * found.deviation <= limits
            watched.note((~holds).double().masked_fill(left_out, torch.nan))

    def _count_look(self) -> None:
        self._looks += 1
        if self._looks >= self.settings.look_every * sum(each.evidence is not None for each in self._watched.values()):
            self._looks = 0
            self.read()

    def read(self) -> None:
        """Read the evidence off the device, and react to it; it is done by itself every few looks."""
        with self._lock:
            alarm = self._alarm()
            for watched in self._watched.values():
                watched.look_less()
        if alarm is None:
            return
        self.alarms = (*self.alarms, alarm)
        warnings.warn(f"afbs monitor: {alarm.reason}", AfbsWarning, stacklevel=2)
        if self.settings.on_alarm is not None:
            try:
                self.settings.on_alarm(alarm)
            except Exception as error:  # a broken pager must not stop the model
                warnings.warn(f"afbs monitor: on_alarm failed: {first_line(error)}", AfbsWarning, stacklevel=2)
        if alarm.heads and self.settings.recalibrate == "automatically":
            try:
                self._react()
            except CalibrationError as error:  # the alarmed heads are dense
                warnings.warn(first_line(error), AfbsWarning, stacklevel=2)

    def recalibrate(self) -> Recipe | None:
        """Calibrate again: a compiled graph on the inputs that were kept, a served model on those that come next.

        Returns:
            The recipe that holds from now on; ``None`` where it comes later.

        Raises:
            CalibrationError: nothing was kept, or the graph cannot be calibrated while it runs.
        """
        return self._recalibrate()

    def to_records(self) -> list[dict[str, Any]]:
        """What is known of each head, as plain dictionaries; waits for the device.

        Returns:
            Of each head: ``site``, ``head``, ``calls``, ``sampled`` (looks at it), ``rate`` (of losses among them),
            ``promised_rate``, ``limit``, ``evidence`` (its E-value, or its streak by the paper's rule), ``dense``
            (whether an alarm made it so).
        """
        with self._lock:
            return [row for name, watched in self._watched.items() for row in _records(name, watched)]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it: the heads, the alarms, the recipe's history."""
        history = () if self.recipe is None else self.recipe.history
        return {
            "heads": self.to_records(),
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "history": [asdict(entry) for entry in history],
        }

    def to_prometheus(self) -> str:
        """The heads and the number of alarms in the text format of Prometheus; waits for the device."""
        return prometheus_text(self.to_records(), len(self.alarms))

    @property
    def note(self) -> str:
        """One sentence for a table; waits for the device."""
        rows = self.to_records()
        calls = max((row["calls"] for row in rows), default=0)
        looks, dense = max((row["sampled"] for row in rows), default=0), sum(row["dense"] for row in rows)
        said = [f"monitor: {looks:,} looks at a head in {calls:,} calls, {len(self.alarms)} alarms"]
        if looks:
            most = max(rows, key=lambda row: float(row["evidence"]))
            where = f"{most['site']} head {most['head']}"
            said.append(f"most evidence: {where}, E = {most['evidence']:.3g}, {most['rate']:.1%} beyond its limit")
        return "; ".join([*said, f"{dense} heads made dense"] if dense else said)

    def _alarm(self) -> Alarm | None:
        """What the evidence says that was not said yet, and the heads that it names made dense."""
        known = {name: each for name, each in self._watched.items() if each.evidence is not None}
        streaks = any(each.promised.by_streak for each in known.values())
        values = {name: each.evidence.values.cpu() for name, each in known.items() if each.evidence is not None}
        if not values:
            return None
        everything = torch.cat(list(values.values()))
        some, named = (enduring if streaks else exceeding)(everything, self.settings.delta)
        if not some:
            return None
        new, at = [], 0
        for name, each in known.items():
            mine = named[at : at + len(values[name])].tolist()
            at += len(mine)
            new += [(name, head) for head, is_named in enumerate(mine) if is_named and not each.dense[head]]
            each.dense = [was or now for was, now in zip(each.dense, mine, strict=True)]
            each.with_dense.clear()
        if (OUTPUT, 0) in new:  # the budget is one for all calls
            for each in self._watched.values():
                each.dense = [True] * len(each.dense)
                each.with_dense.clear()
        first = not self.alarms
        if not new and not first:
            return None
        evidence = float(everything.max() if streaks else everything.mean())
        sampled = sum(each.sampled for each in known.values())
        when = datetime.now(UTC).isoformat(timespec="seconds")
        rates = {name: each.promised.rate for name, each in known.items()}
        return Alarm(when, tuple(new), evidence, sampled, _sentence(new, rates, evidence, sampled, streaks=streaks))


def _sentence(
    heads: Sequence[tuple[str, int]], rates: Mapping[str, float], evidence: float, sampled: int, *, streaks: bool
) -> str:
    """What an alarm says to a reader."""
    found = f"E = {evidence:.3g} after {sampled:,} looks"
    if not heads:
        return f"some head is beyond its tolerance on more inputs than promised ({found}); which one is not known yet."
    if (OUTPUT, 0) in heads:
        return f"the output changes by more than the budget ({found}): every call is dense from now on."
    names = ", ".join(f"{name} head {head}" for name, head in heads[:SHOWN])
    names += f" and {len(heads) - SHOWN} more" if len(heads) > SHOWN else ""
    if streaks:
        return f"{names}: beyond the tolerance in {STREAK} looks in a row; dense from now on."
    most = max(rates[name] for name, _ in heads)
    return f"{names}: beyond the tolerance on more than {most:.1%} of inputs ({found}); dense from now on."


def _records(name: str, watched: _Watched) -> list[dict[str, Any]]:
    if watched.evidence is None or watched.losses is None or watched.judged is None:
        evidence = losses = judged = [0.0] * len(watched.promised.limits)
    else:
        evidence, losses, judged = (x.tolist() for x in (watched.evidence.values, watched.losses, watched.judged))
    return [
        {
            "site": name,
            "head": head,
            "calls": watched.calls,
            "sampled": int(judged[head]),
            "rate": losses[head] / max(judged[head], 1.0),
            "promised_rate": watched.promised.rate,
            "limit": limit,
            "evidence": evidence[head],
            "dense": watched.dense[head],
        }
        for head, limit in enumerate(watched.promised.limits)
    ]
