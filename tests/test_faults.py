"""What goes wrong while a model compiles: memory does not suffice, the user interrupts, threads call at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import afbs_compile
from afbs_compile.errors import AfbsWarning, CalibrationError
from afbs_compile.reasons import NO_MEMORY
from tests.toy import Toy, drifting

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "sparse_is_faster")

LENGTH = 512
OPTIONS = {"min_length": 128, "tolerance": 0.055}

OUT_OF_MEMORY = [
    MemoryError("std::bad_alloc"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    OSError(12, "Cannot allocate memory"),
]


def failing(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def compiled() -> Any:
    return torch.compile(Toy().eval(), backend="afbs", options=OPTIONS)


def cached() -> list[Path]:
    folder = Path(os.environ["AFBS_CACHE_DIR"])
    return list(folder.iterdir()) if folder.exists() else []


@torch.no_grad()
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_leaves_the_graph_dense_with_a_sentence(monkeypatch, error):
    monkeypatch.setattr("afbs_compile.tuner.graph.tune_site", failing(error))
    x = drifting(LENGTH)
    with pytest.warns(AfbsWarning, match=f"2 x {NO_MEMORY}"):
        output = compiled()(x)
    torch.testing.assert_close(output, Toy().eval()(x))
    assert not cached()
    with pytest.raises(CalibrationError, match="^out of memory: calibrate on fewer or shorter samples.$"):
        afbs_compile.calibrate(Toy().eval(), [x], **OPTIONS)


@torch.no_grad()
def test_another_error_is_no_lack_of_memory(monkeypatch):
    monkeypatch.setattr("afbs_compile.tuner.graph.tune_site", failing(RuntimeError("a bug")))
    with pytest.raises(BackendCompilerFailed, match="a bug"):
        compiled()(drifting(LENGTH))


@torch.no_grad()
def test_an_interrupt_leaves_nothing_behind(monkeypatch):
    x = drifting(LENGTH)
    expected = compiled()(x)
    (entry,) = cached()
    entry.unlink()
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr("afbs_compile.tuner.graph.tune_site", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            compiled()(x)
    assert not cached()
    assert torch.equal(compiled()(x), expected)


def test_threads_call_one_compiled_model(monkeypatch):
    x = drifting(LENGTH)
    with torch.no_grad():
        expected = compiled()(x)
    torch._dynamo.reset()
    monkeypatch.setattr("afbs_compile.backend.calibrate_graph", None)  # the cache has it
    sparse, outputs = compiled(), []

    @torch.no_grad()
    def call() -> None:
        outputs.append(sparse(x))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4
    assert all(torch.equal(output, expected) for output in outputs)
