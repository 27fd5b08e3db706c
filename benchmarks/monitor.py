"""What the monitor promises and costs: false alarms, delays, and the time of a look.

    python benchmarks/monitor.py                           simulation, and the shipped model at 4,096 tokens
    python benchmarks/monitor.py --model M --length 8192 --dtype bfloat16 --name monitor_40m_8k

The simulation draws losses of one head at the promised rate, 2,000 times as many as are looked at, and at larger
rates, for the delay. The model's part times one attention call of each layer as it runs in a compiled model, with and
without a look, in turns: the monitor's cost is the look's share of it, times the share of calls that are looked at by
default, which is less where that is more than 1 %. Calls without a look are timed with a monitor and without one. With
--calls many calls of the middle layer are timed, watched as by default and not watched.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, SHIPPED_MODEL, load, sample_runs, save, settings, text_windows
from timing import times

import afbs_compile
from afbs_compile.kernels.attend.machine import wait
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.sight import without_idle_parts
from afbs_compile.monitor.betting import Wealth, exceeding
from afbs_compile.monitor.monitor import Monitor
from afbs_compile.monitor.promised import Promised
from afbs_compile.monitor.settings import COST, SHARE, MonitorSettings
from afbs_compile.passes.capture import capture

PROMISED = 0.098
"""As 29 inputs promise with 95 % confidence."""

RATES = (0.15, 0.2, 0.3, 0.5)
DELTA = MonitorSettings.delta
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a causal language model")
    parser.add_argument("--text", default="topics", help="text file, 'topics', or 'stdlib' (Python's code)")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tolerance", type=float, default=0.055)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=2000, help="of the simulation")
    parser.add_argument("--calls", type=int, default=0, help="of one layer, watched as by default; 0 for none")
    parser.add_argument("--no-model", action="store_true", help="the simulation alone")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="monitor_7m_4k_cpu", help="name of the result file")
    arguments = parser.parse_args()

    result: dict[str, Any] = {"settings": settings(arguments), "simulation": simulated(arguments.runs)}
    if not arguments.no_model:
        result["cost"] = cost(arguments)
    save(arguments.name, arguments.out, result)


def simulated(runs: int) -> dict[str, Any]:
    """False alarms at the promised rate, and delays at larger ones, in looks."""
    one = alarms(PROMISED, 2000, runs)
    found: dict[str, Any] = {
        "promised": PROMISED,
        "delta": DELTA,
        "one head, false alarms in 2,000 looks": share(one),
        "96 heads, false alarms in 500 looks": share(of_models(PROMISED, 500, 96, max(1, runs // 10))),
        "delays": {str(rate): quartiles(alarms(rate, 3000, runs)) for rate in RATES},
        "delays of a rate of 0.05 that rises after 1,000 looks": {
            str(rate): quartiles(alarms(rate, 3000, runs, before=1000)) for rate in RATES
        },
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    return found


def alarms(rate: float, looks: int, runs: int, before: int = 0) -> torch.Tensor:
    """The look at which each run of one head has its alarm, counted from the rise of its rate; infinite for none."""
    draw = torch.Generator().manual_seed(0)
    wealth = Wealth(runs, PROMISED, torch.device("cpu"))
    when = torch.full((runs,), torch.inf)
    for look in range(before + looks):
        wealth.update((torch.rand(runs, generator=draw) < (0.05 if look < before else rate)).double())
        now = (wealth.values >= 1 / DELTA) & when.isinf()
        when = torch.where(now, float(look + 1 - before), when)
    return when


def of_models(rate: float, looks: int, heads: int, runs: int) -> torch.Tensor:
    """The look at which the mean of all heads of a model reaches 1/delta, in each run."""
    draw = torch.Generator().manual_seed(1)
    when = torch.full((runs,), torch.inf)
    for number in range(runs):
        wealth = Wealth(heads, PROMISED, torch.device("cpu"))
        for look in range(looks):
            wealth.update((torch.rand(heads, generator=draw) < rate).double())
            if exceeding(wealth.values, DELTA)[0]:
                when[number] = look + 1
                break
    return when


def share(when: torch.Tensor) -> float:
    """Of the runs that had an alarm."""
    return round(float(when.isfinite().double().mean()), 4)


def quartiles(when: torch.Tensor) -> list[float]:
    """Of the runs."""
    return [float(x) for x in torch.quantile(when, torch.tensor([0.25, 0.5, 0.75]))]


def cost(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each layer's call, without a monitor, with one that does not look, and with one that does."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(arguments.model, device, getattr(torch, arguments.dtype))
    windows = text_windows(tokenizer, arguments.text, arguments.length, 2, device)
    recipe = afbs_compile.calibrate(model, windows[:1], tolerance=arguments.tolerance)
    sites = {site.name: site for site in recipe.sites if site.heads}  # also where dense is the faster one
    rows, many = [], {}
    for name, (operands,) in capture(sample_runs(model, windows[1:])):
        if name in sites and not sites[name].calibrated.is_dense:
            call = sites[name].calibrated.rounded()
            rows.append(
                {"site": name, **timed(operands, call, Promised.by(recipe, sites[name], None), arguments.rounds)}
            )
            print(rows[-1], flush=True)
        if arguments.calls and len(rows) == len(sites) // 2:
            many = watched_calls(operands, call, Promised.by(recipe, sites[name], None), arguments.calls)
    looked = [row["look_ms"] / row["plain_ms"] for row in rows]
    idle = [row["idle_ms"] / row["plain_ms"] - 1 for row in rows]
    summary = {
        "a look, in calls": [min(looked), median(looked), max(looked)],
        "looks by default, of calls": median(min(SHARE, COST / ratio) for ratio in looked),
        "cost by default": median(min(SHARE * ratio, COST) for ratio in looked),
        "a call that is not looked at, against one without a monitor": [min(idle), median(idle), max(idle)],
        **many,
    }
    print(summary)
    return {"calls": rows, **summary}


@torch.no_grad()
def timed(operands: Operands, call: SparseCall, promised: Promised, rounds: int) -> dict[str, float]:
    """One call in its three forms, in turns: medians, in milliseconds; and what a look adds."""
    monitors = {}
    for name, chance in (("idle", 1e-12), ("looking", 1.0)):
        monitors[name] = Monitor(MonitorSettings(share=chance), None, lambda: None, lambda: None)
        monitors[name].watch("call", promised)
    forms: dict[str, Callable[[], object]] = {
        "plain": lambda: run(without_idle_parts(operands), call)[0],
        **{name: partial(monitor.attend, "call", operands, call) for name, monitor in monitors.items()},
    }
    found = {name: each.median for name, each in times(forms, rounds).items()}
    return {"plain_ms": found["plain"], "idle_ms": found["idle"], "look_ms": found["looking"] - found["idle"]}


@torch.no_grad()
def watched_calls(operands: Operands, call: SparseCall, promised: Promised, count: int) -> dict[str, list[float]]:
    """What watching as by default adds to so many calls one after another, over rounds in turns."""
    monitor = Monitor(MonitorSettings(), None, lambda: None, lambda: None)
    monitor.watch("call", promised)

    def seconds(attend: Callable[[], object]) -> float:
        wait(operands.q)
        began = time.perf_counter()
        for _ in range(count):
            attend()
        wait(operands.q)
        return time.perf_counter() - began

    watched = partial(monitor.attend, "call", operands, call)
    seconds(watched)  # what a look costs becomes known
    pairs = [(seconds(watched), seconds(lambda: run(without_idle_parts(operands), call)[0])) for _ in range(ROUNDS)]
    added = [one / other - 1 for one, other in pairs]
    return {f"{count} calls watched by default, against as many that are not": [min(added), median(added), max(added)]}


if __name__ == "__main__":
    main()
