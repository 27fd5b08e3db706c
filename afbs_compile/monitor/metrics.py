"""What a monitor knows in the text format of Prometheus (version 0.0.4), for a server to show at ``/metrics``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HELP = {
    "calls": ("counter", "Calls of an attention call of the model."),
    "sampled": ("counter", "Looks at a head: calls of which some rows were computed densely."),
    "rate": ("gauge", "Share of looks at which the head was beyond its limit."),
    "promised_rate": ("gauge", "Share of inputs on which the head may be beyond its limit."),
    "limit": ("gauge", "Largest relative L1 error of the head; of the output, its budget."),
    "evidence": ("gauge", "E-value against the promise; by the paper's rule the length of the streak."),
    "dense": ("gauge", "1 where an alarm made the head dense."),
}
"""By name of a record's entry: the kind of the metric, and what it is."""


def prometheus_text(heads: Sequence[Mapping[str, Any]], alarms: int) -> str:
    """The text.

    Args:
        heads: records of :meth:`afbs_compile.monitor.monitor.Monitor.to_records`; alarms: how many there were.
    """
    lines = ["# HELP afbs_alarms_total Alarms of the monitor.", "# TYPE afbs_alarms_total counter"]
    lines.append(f"afbs_alarms_total {alarms}")
    for name, (kind, meaning) in HELP.items():
        full = f"afbs_head_{name}" + ("_total" if kind == "counter" else "")
        lines += [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}"]
        lines += [f"{full}{{{_labels(row)}}} {float(row[name]):g}" for row in heads]
    return "\n".join(lines) + "\n"


def _labels(row: Mapping[str, Any]) -> str:
    site = str(row["site"]).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'site="{site}",head="{row["head"]}"'
