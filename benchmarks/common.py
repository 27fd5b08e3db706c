"""What every benchmark needs: models, text windows, and result files that say where they came from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import pydoc_data.topics
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.modules["kernels"] = None  # type: ignore[assignment]  # else kernels.py here passes for Hugging Face's package

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from afbs_compile.found import FoundGraph  # noqa: E402
from afbs_compile.passes.capture import SampleRun  # noqa: E402
from afbs_compile.passes.record import record_graphs  # noqa: E402

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STDLIB_FILES = 60
"""Of Python's own modules, in alphabetical order: enough for eight windows of 16K tokens."""

SHIPPED_MODEL = ROOT / "examples" / "model-7m"


def load(folder: str | Path, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    return model, AutoTokenizer.from_pretrained(folder)


def text_windows(tokenizer: Any, source: str, length: int, count: int, device: str) -> list[Tensor]:
    """``count`` disjoint windows ``[1, length]`` spread over a text.

    Args:
        tokenizer: of the model; source: a text file, ``"topics"`` for Python's help topics, or ``"stdlib"`` for the
            code of its standard library.
        length: tokens of a window; count: windows; device: for them.
    """
    if source == "topics":
        text = "\n\n".join(pydoc_data.topics.topics.values())
    elif source == "stdlib":
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:STDLIB_FILES]
        text = "\n\n".join(file.read_text("utf-8", errors="replace") for file in files)
    else:
        text = Path(source).read_text("utf-8")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if len(tokens) < length * count:
        raise SystemExit(f"{source} has {len(tokens)} tokens, fewer than {count} windows of {length}")
    starts = torch.linspace(0, len(tokens) - length, count).long().tolist()
    return [tokens[None, start : start + length].to(device) for start in starts]


def sample_runs(model: Any, windows: Sequence[Tensor]) -> list[SampleRun]:
    """Each window as the graph with the model's attention calls sees it, in the order of the windows."""
    runs = []
    for graph in record_graphs(model, list(windows)):
        found = FoundGraph.of(graph.gm, graph.samples[0], min_length=1)
        if found.sites:
            runs += [SampleRun(found.gm, found.sites, inputs) for inputs in graph.samples]

    def place(run: SampleRun) -> int:
        tensors = [x for x in run.inputs if isinstance(x, Tensor)]
        return next(i for i, ids in enumerate(windows) if any(x.equal(ids) for x in tensors if x.shape == ids.shape))

    return sorted(runs, key=place)  # Dynamo may have captured again in between


def environment() -> dict[str, Any]:
    """Commit (``$GIT_COMMIT`` where there is no checkout), device and versions, for a result file."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = (
        os.environ.get("GIT_COMMIT")
        or subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "triton", "transformers")},
    }


def settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The command's options for a result file; of files and folders their names alone."""
    given = {key: value for key, value in vars(arguments).items() if key not in ("out", "name")}
    lists = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    return {key: " ".join(Path(str(value)).name for value in values) for key, values in lists.items()}


def process_bytes(what: str) -> int:
    """What Linux says of this process's memory: ``"VmRSS"``, what it has now, ``"VmHWM"``, the most that it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{what}:")).split()[1]) * 1024


def empty_figure(size: tuple[float, float]) -> Any:
    """A matplotlib figure of so many inches; ``None``, with a sentence, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no PNG: matplotlib is missing, pip install afbs-compile[report]")
        return None
    return Figure(figsize=size, layout="constrained")


def save(name: str, folder: Path, result: dict[str, Any]) -> None:
    """Write ``<folder>/<name>.json`` and print where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**environment(), **result}, indent=1) + "\n")
    print(f"wrote {path}")
