"""Shared fixtures: a cache of its own for every test, and no global mode left behind by one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # decided before any test imports triton

MOST_WORKERS = 8
"""Of pytest-xdist. A worker takes about 1.5 GB."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto`` means: a worker for each core; one process where a GPU is shared, whose tests time it."""
    return 0 if torch.cuda.is_available() else min(os.cpu_count() or 1, MOST_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist share the cores: each takes its part of them, and so does what it starts."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the compiler runs in the worker's turn, not in a pool beside it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def own_inductor_cache() -> Iterator[None]:
    """No test takes code that another version of the operator left in inductor's cache on this machine."""
    from afbs_compile.kernels.op import sparse_attention

    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"tests of {sparse_attention._opoverload._schema}"):
        yield


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("AFBS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before, nothing left behind. Not for every test: it would compile FlexAttention for each."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def sparse_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sparse call is found to pay, and no predictor to cost: no decision may depend on the machine's speed."""
    from tests.toy import without_a_clock

    without_a_clock(monkeypatch)


@pytest.fixture(autouse=True)
def no_mode_left_behind() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
