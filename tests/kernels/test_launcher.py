"""A launch goes past Triton's inspection only where Triton would have found the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from afbs_compile.kernels import launcher
from afbs_compile.kernels.launcher import Launcher, layout


class Jitted:
    """Stands in for a jitted kernel: notes what it compiled and what it launched."""

    def __init__(self, compiles: bool = True) -> None:
        self.compiles, self.inspected, self.launched = compiles, [], []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def inspect(*arguments: Any, **options: int) -> Any:
            self.inspected.append((grid, arguments, options))
            return Compiled(self) if self.compiles else None

        return inspect


class Compiled:
    def __init__(self, jitted: Jitted) -> None:
        self._jitted = jitted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self._jitted.launched.append((grid, arguments))


def test_the_second_call_of_a_kind_launches_directly() -> None:
    jitted = Jitted()
    run = Launcher(jitted)
    for seed in range(3):
        run("kind", 7, torch.full((4,), float(seed)), 16, True, warps=4, stages=2)
    assert [(grid, options) for grid, _, options in jitted.inspected] == [((7,), {"num_warps": 4, "num_stages": 2})]
    assert [(grid, float(arguments[0][0])) for grid, arguments in jitted.launched] == [((7, 1, 1), 1), ((7, 1, 1), 2)]


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(4, 4, dtype=torch.bfloat16),
        torch.zeros(20)[1:17].view(4, 4),
        torch.zeros(4, 5),
        torch.zeros(4, 4).T,
    ],
    ids=["dtype", "alignment", "size", "stride"],
)
def test_what_triton_compiles_for_is_another_layout(other: torch.Tensor) -> None:
    assert layout(torch.ones(4, 4)) == layout(torch.zeros(4, 4))
    assert layout(other) != layout(torch.zeros(4, 4))


def test_kinds_are_forgotten_before_they_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "MOST_KINDS", 3)
    jitted = Jitted()
    run = Launcher(jitted)
    for number in (1, 2, 3, 4, 4, 1):
        run(number, 7, number, warps=4)
    assert [arguments[0] for _, arguments, _ in jitted.inspected] == [1, 2, 3, 4, 1]


def test_the_interpreter_is_never_remembered() -> None:
    jitted = Jitted(compiles=False)
    run = Launcher(jitted)
    for _ in range(2):
        run("kind", 7, torch.zeros(4), warps=4)
    assert len(jitted.inspected) == 2
