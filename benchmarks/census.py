"""How many attention calls of a library's architectures become sites, why the others do not, and whether any is wrong.

    python benchmarks/census.py --workers 8
    python benchmarks/census.py --models llama t5 swin --forms alone
    python benchmarks/census.py --resume                  go on with what an earlier run left

Every architecture of transformers' AutoModel map is made small from its configuration class (census_models.py), with
random weights, and run in eval mode and fp32 on inputs made from its signature (census_inputs.py): alone; with an
attention_mask of ones; as a left-padded batch of two, a third of one row hidden. Its graphs are captured by Dynamo.
Without inductor, its output is computed with every site rewritten to a call whose heads are dense, and with every site
by the specification that visits every block; both must agree with the model to 1e-3 of the largest number.

Models run in processes of their own, with a time limit. A record a line goes to OUT with the suffix .jsonl.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from census_check import FORMS, TOLERANCE, examine
from census_models import architectures
from common import RESULTS, save, settings

FORK = multiprocessing.get_context("fork")  # libraries take longer to import than most models to examine

WAITING = 5
"""Times the limit that a process may exist, for others share the processor."""


Examine = Callable[[str, list[str]], dict[str, Any]]


class Job(NamedTuple):
    """A model that is being examined."""

    model: str
    process: multiprocessing.process.BaseProcess
    began: float


def _work(model: str, forms: list[str], seconds: int, examine: Examine, out: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    out.send(examine(model, forms))


def records(
    models: list[str], forms: list[str], workers: int, seconds: int, examine: Examine = examine
) -> Iterator[dict[str, Any]]:
    """The record of each model, as they come.

    Args:
        models: to examine; forms: of each; workers: models at a time; seconds: of a processor that each may take.
        examine: makes the record.
    """
    waiting, running = list(reversed(models)), dict[Connection, Job]()
    while waiting or running:
        while waiting and len(running) < workers:
            model = waiting.pop()
            receive, send = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_work, args=(model, forms, seconds, examine, send), daemon=True)
            process.start()
            send.close()
            running[receive] = Job(model, process, time.perf_counter())
        ready = wait(list(running), timeout=0.2)
        for connection, job in list(running.items()):
            spent = time.perf_counter() - job.began
            if connection in ready:
                record = _received(connection, job)
            elif spent > WAITING * seconds:
                record = {"not_run": f"no end after {spent:.0f} s"}
            else:
                continue
            job.process.kill()
            job.process.join()
            del running[connection]
            yield {"model": job.model, "seconds": round(spent, 1), **record}


def _received(connection: Connection, job: Job) -> dict[str, Any]:
    try:
        return connection.recv()
    except EOFError:
        job.process.join()
        code = job.process.exitcode
        late = code is not None and -code in (signal.SIGXCPU, signal.SIGKILL)
        return {"not_run": "out of time or memory" if late else f"its process ended with {code}"}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the records say together: per form models, calls and sites; refusals; what is wrong; what did not run."""
    table, refused = {}, dict[str, dict[str, Any]]()
    lists: dict[str, list[str]] = {"wrong": [], "crashes": [], "blind": [], "not run": []}
    for form in FORMS:
        results = [(r["model"], r["forms"][form]) for r in found if form in r.get("forms", {})]
        lists["not run"] += [f"{model}, {form}: {r['not_run']}" for model, r in results if "not_run" in r]
        results = [(model, r) for model, r in results if "not_run" not in r]
        table[form] = _row([r for _, r in results])
        for model, result in results:
            for _, reason in result["refusals"]:
                entry = refused.setdefault(
                    f"{form}: {reason.split(':')[0]}", {"calls": 0, "models": Counter(), "example": reason}
                )
                entry["calls"] += 1
                entry["models"][model] += 1
            wrong = {what: error for what, error in result["errors"].items() if error > TOLERANCE}
            lists["wrong"] += [f"{model}, {form}: {what} {error:.1e}" for what, error in wrong.items()]
            lists["crashes"] += [f"{model}, {form}: {crash}" for crash in result["crashes"]]
            lists["blind"] += [f"{model}, {form}"] if result.get("blind") else []
    lists["not run"] += [f"{r['model']}: {r['not_run']}" for r in found if "not_run" in r]
    lists["without attention calls"] = [
        r["model"] for r in found if "forms" in r and not any(_calls(result) for result in r["forms"].values())
    ]
    return {"models": len(found), "forms": table, "refused": refused, **lists}


def _calls(result: dict[str, Any]) -> int:
    return result.get("sites", 0) + len(result.get("refusals", ()))


def _row(results: list[dict[str, Any]]) -> dict[str, Any]:
    with_calls = [result for result in results if _calls(result)]
    calls, sites = (sum(number(result) for result in with_calls) for number in (_calls, lambda result: result["sites"]))
    written_sites, written_refused = (sum(result["written out"][place] for result in with_calls) for place in (0, 1))
    sdpa_calls, sdpa_sites = calls - written_sites - written_refused, sites - written_sites
    return {
        "models run": len(results),
        "with calls": len(with_calls),
        "calls": calls,
        "sites": sites,
        "share": sites / calls if calls else None,
        "SDPA calls": sdpa_calls,
        "SDPA sites": sdpa_sites,
        "SDPA share": sdpa_sites / sdpa_calls if sdpa_calls else None,
        "models without a site": sum(not result["sites"] for result in with_calls),
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['models']} architectures")
    for form, row in result["forms"].items():
        share, sdpa_share = ("" if row[of] is None else f"{row[of]:.1%}" for of in ("share", "SDPA share"))
        print(
            f"{form:12} {row['sites']} of {row['calls']} calls are sites {share} in {row['with calls']} models with "
            f"calls ({row['models without a site']} without a site); {row['models run']} ran; of SDPA's own calls "
            f"{row['SDPA sites']} of {row['SDPA calls']} {sdpa_share}"
        )
    for kind, entry in sorted(result["refused"].items(), key=lambda item: -item[1]["calls"]):
        print(
            f"refused, {kind}: {entry['calls']} calls in {', '.join(sorted(entry['models']))}\n    {entry['example']}"
        )
    for name in ("wrong", "crashes", "blind", "not run", "without attention calls"):
        print(f"{name}: {len(result[name])}")
        for line in result[name] if name != "without attention calls" else [", ".join(result[name])]:
            print(f"    {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=("transformers",), default="transformers")
    parser.add_argument("--models", nargs="+", help="model types; all by default")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--limit", type=int, help="only so many architectures")
    parser.add_argument("--workers", type=int, default=2, help="models at a time, a thread each")
    parser.add_argument("--seconds", type=int, default=60, help="of a processor that a model may take")
    parser.add_argument("--resume", action="store_true", help="keep the records that are there")
    parser.add_argument("--out", type=Path, default=RESULTS / "census_cpu.json")
    arguments = parser.parse_args()
    models = arguments.models or sorted(architectures())
    if unknown := set(models) - set(architectures()):
        parser.error(f"--models: {', '.join(sorted(unknown))}; accepted: {', '.join(sorted(architectures()))}")
    models = models[: arguments.limit]
    lines = arguments.out.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    kept = lines.read_text().splitlines() if arguments.resume and lines.exists() else []
    found = {record["model"]: record for record in map(json.loads, kept)}
    torch.set_num_threads(1)
    left = [model for model in models if model not in found]
    with lines.open("a" if arguments.resume else "w") as file:
        for record in records(left, arguments.forms, arguments.workers, arguments.seconds):
            print(json.dumps(record), file=file, flush=True)
            print(f"{len(found) + 1:4} {record['model']}: {_line(record)}", flush=True)
            found[record["model"]] = record
    result = summary(sorted(found.values(), key=lambda record: record["model"]))
    show(result)
    save(arguments.out.stem, arguments.out.parent, {"settings": settings(arguments), **result})


def _line(record: dict[str, Any]) -> str:
    if "not_run" in record:
        return f"not run, {record['not_run']}"
    parts = (f"{name} {r['sites']}/{_calls(r)}" if "sites" in r else f"{name} -" for name, r in record["forms"].items())
    return f"{', '.join(parts)} ({record['small']}, {record['seconds']} s)"


if __name__ == "__main__":
    main()
