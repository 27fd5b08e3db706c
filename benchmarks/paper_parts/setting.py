"""What every table is measured on: model, texts, windows."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from common import load, sample_runs, save, settings, text_windows
from torch import Tensor

import afbs_compile
from afbs_compile import Recipe
from afbs_compile.kernels.attend.engines import engines_on
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.tuner.speed import SiteSpeed
from paper_parts.head import BLOCK

POLICY = "cumulant"
"""That thresholds of ours are calibrated with."""

SHAPE = BlockShape(BLOCK, BLOCK)


@dataclass(frozen=True, eq=False)
class Setting:
    """As the command line says.

    Attributes:
        arguments: of the command line.
    """

    TOLERANCE: ClassVar[float] = 0.055

    arguments: argparse.Namespace

    @property
    def device(self) -> str:
        """Where everything runs."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        return load(self.arguments.model, self.device, getattr(torch, self.arguments.dtype))

    @property
    def model(self) -> Any:
        """The model, dense."""
        return self.loaded[0]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return int(self.arguments.length)

    @property
    def texts(self) -> list[str]:
        """The texts by name; the first is the one that is calibrated on."""
        return [Path(text).stem for text in self.arguments.texts]

    def windows(self, text: str, length: int, count: int) -> list[Tensor]:
        """``count`` windows ``[1, length]`` spread over a text, of one stride."""
        source = self.arguments.texts[self.texts.index(text)]
        return [w[0][None] for w in text_windows(self.loaded[1], source, length, count, self.device)]

    def calibration_windows(self) -> list[Tensor]:
        """Windows of the first text that no table tests on: every other one of twice as many."""
        return self._of_first_text(self.length)[1::2][: self.arguments.samples]

    def _of_first_text(self, length: int) -> list[Tensor]:
        """Disjoint windows, of which every other one is for calibration."""
        return self.windows(self.texts[0], length, 2 * max(self.arguments.windows, self.arguments.samples))

    @functools.cache  # noqa: B019 (one setting lives as long as the process)
    def tested(self, text: str, length: int) -> tuple[SampleRun, ...]:
        """Windows of a text to test on, as the graph sees them; of the first text others than it is calibrated on."""
        count = self.arguments.windows
        if text == self.texts[0]:
            windows = self._of_first_text(length)[::2][:count]
        else:
            windows = self.windows(text, length, count)
        return tuple(sample_runs(self.model, windows))

    @functools.cache  # noqa: B019
    def recipe(self, *, shape: BlockShape = SHAPE, **options: Any) -> Recipe:
        """Calibrated on the first text; the options as given, a budget as ``budget=("kl", 0.01)``."""
        asked = {key: value for key, value in options.items() if key != "budget"}
        if "budget" in options:
            quantity, limit = options["budget"]
            asked["tolerance"] = {quantity: limit}
        with _one_family(torch.device(self.device), shape):
            return afbs_compile.calibrate(self.model, self.calibration_windows(), **asked)

    def middle_call(self) -> tuple[str, Operands]:
        """A call of the middle layer on the first window that is tested: its name and its operands."""
        run = self.tested(self.texts[0], self.length)[:1]
        wanted = run[0].sites[len(run[0].sites) // 2].name
        return next((name, found[0]) for name, found in capture(run) if name == wanted)

    def save(self, part: str, **result: Any) -> None:
        """Write the result file of a part."""
        save(self._name(part), self.arguments.out, {"settings": settings(self.arguments), **result})

    def picture(self, part: str) -> Path:
        """Where the picture of a part lies."""
        folder: Path = self.arguments.out
        return folder / f"{self._name(part)}.png"

    def _name(self, part: str) -> str:
        return f"paper_{part}_{self.arguments.name}"


@contextmanager
def _one_family(device: torch.device, shape: BlockShape) -> Iterator[None]:
    """Calibrate with one policy and one block shape, every call taken as faster than dense attention.

    What times decide differs between runs, and reruns are to agree: a call's thresholds also depend on which of those
    before it stay dense.
    """
    with ExitStack() as stack:
        faster = SiteSpeed(2.0, 1.0, 1)
        stack.enter_context(patch.object(SiteSpeed, "measure", staticmethod(lambda *_, **__: faster)))
        for engine in engines_on(device):
            stack.enter_context(patch.object(type(engine), "shapes", (shape,)))
        for policy in POLICIES.values():
            if policy.name != POLICY:
                stack.enter_context(patch.object(type(policy), "explored", ()))
        yield
