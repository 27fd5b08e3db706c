"""Table II, as far as a small model goes: RULER's tasks, dense first; recall, and the answer's log-likelihood."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from common import sample_runs
from scipy.stats import binomtest
from torch import Tensor

from afbs_compile.passes.capture import SampleRun, run_with
from afbs_compile.tuner.end_to_end import find_logits
from paper_parts.bench import Matcher, Replacement
from paper_parts.methods import METHODS
from paper_parts.setting import Setting
from paper_parts.tasks import TASKS, prompt

NAME = "table2"
LEAST = 0.5
"""Recall of dense attention from which a task counts."""

CALIBRATED = ("ours, budget", "ours, budget of +1 %", "ours, tolerance", "AFBS-BO as printed")
"""Each as it was calibrated."""

AT_EQUAL_SPARSITY = ("window", "StreamingLLM", "ours, nothing always kept", "top-k blocks, oracle")
"""Each at the sparsity that the first of :data:`CALIBRATED` that is measured has on the same prompts."""

PAPERS_OWN = ("pass key of the paper: 10K tokens, depth 5K", 10240, 0.5)


@dataclass(frozen=True)
class Results:
    """Of one method on the prompts of a task: whether each answer is right, and its log-likelihood."""

    right: tuple[bool, ...]
    likelihood: tuple[float, ...]


def run(setting: Setting) -> None:
    """Measure, print, write ``paper_table2``."""
    count = setting.arguments.prompts
    rows: list[dict[str, Any]] = []
    for name in TASKS:
        rows += _rows(name, setting, _prompts(name, setting, setting.length, [None] * count))
    own, length, depth = PAPERS_OWN
    if length <= setting.arguments.longest * 1.25:
        prompts = _prompts("pass key", setting, length, [depth] * max(1, count // 4))
        rows += _rows(own, setting, prompts, beside=("window",))
    setting.save(NAME, rows=rows)


def _prompts(task: str, setting: Setting, length: int, places: Sequence[float | None]) -> list[tuple[Tensor, int]]:
    draw = random.Random(f"{setting.arguments.seed} {task} {length}")
    haystacks = setting.windows(setting.texts[-1], length, len(places))
    made = []
    for haystack, place in zip(haystacks, places, strict=True):
        facts = TASKS[task](draw)
        at = [draw.random() if place is None else place for _ in facts.hidden]
        made.append(prompt(setting.loaded[1], haystack[0].tolist(), facts, length, sorted(at)))
    return [(ids.to(setting.device), count) for ids, count in made]


def _rows(
    task: str, setting: Setting, prompts: Sequence[tuple[Tensor, int]], beside: Sequence[str] = AT_EQUAL_SPARSITY
) -> list[dict[str, Any]]:
    """One row for each method; only dense attention's where it does not solve the task."""
    by_name = {method.name: method for method in METHODS}
    runs = sample_runs(setting.model, [ids for ids, _ in prompts])
    dense = _results(runs, prompts, None)
    rows = [_row(task, "dense", dense, dense, 0.0)]
    if rows[0]["recall"] >= LEAST:
        knobs = dict.fromkeys(CALIBRATED, 0.5)
        wanted = setting.arguments.methods or (*CALIBRATED, *beside)
        for name in (name for name in (*CALIBRATED, *beside) if name in wanted):
            if name not in knobs:
                knobs[name] = Matcher(by_name[name], setting, runs[:1]).matched(rows[1]["sparsity"]).t
            replacement = Replacement(by_name[name], setting, knobs[name])
            found = _results(runs, prompts, replacement)
            rows.append(_row(task, name, found, dense, replacement.sparsity))
    for row in rows:
        low, high = row["interval"]
        counts = "" if row["recall"] >= LEAST or row["method"] != "dense" else "  (does not count)"
        print(
            f"{task:>22} {row['method']:>20}: {row['recall']:.0%} ({low:.0%} to {high:.0%}), log-likelihood "
            f"{row['likelihood']:.2f}, {row['sparsity']:.0%} sparse, p {row['p_against_dense']:.2f}{counts}",
            flush=True,
        )
    return rows


@torch.no_grad()
def _results(
    runs: Sequence[SampleRun], prompts: Sequence[tuple[Tensor, int]], replacement: Replacement | None
) -> Results:
    right, likelihood = [], []
    for run_, (ids, count) in zip(runs, prompts, strict=True):
        logits = find_logits(run_with(run_, (lambda *_: None) if replacement is None else replacement))
        answer, scores = ids[0, -count:], logits[0, -1 - count : -1].float()
        right.append(bool((scores.argmax(-1) == answer).all()))
        likelihood.append(float(scores.log_softmax(-1).gather(1, answer[:, None]).sum()))
    return Results(tuple(right), tuple(likelihood))


def _row(task: str, method: str, found: Results, dense: Results, sparsity: float) -> dict[str, Any]:
    """Recall with its Wilson interval, and McNemar's exact test against dense attention on the same prompts."""
    interval = binomtest(sum(found.right), len(found.right)).proportion_ci(method="wilson")
    lost = sum(d and not f for f, d in zip(found.right, dense.right, strict=True))
    won = sum(f and not d for f, d in zip(found.right, dense.right, strict=True))
    return {
        "task": task,
        "method": method,
        "prompts": len(found.right),
        "recall": mean(found.right),
        "interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "lost_and_won": [lost, won],
        "p_against_dense": float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
        "likelihood": mean(found.likelihood),
        "sparsity": sparsity,
    }
