"""Times that other work on the machine does not decide."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from afbs_compile.tuner import clock
from afbs_compile.tuner.clock import is_busy, timed
from afbs_compile.tuner.speed import CLEAR, SiteSpeed

HERE = torch.zeros(1)


@pytest.fixture
def threads_always_wait(monkeypatch):
    """As if every look at the clock found that threads had waited for another hour."""
    hours = itertools.count(step=3600)
    monkeypatch.setattr(clock, "_waited_seconds", lambda: next(hours))


@pytest.fixture
def nobody_waits(monkeypatch):
    monkeypatch.setattr(clock, "_waited_seconds", lambda: 0.0)


def spinning(seconds):
    """A call that computes for a time."""

    def call():
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return HERE

    return call


def sleeping(seconds):
    """A call that takes time and computes nothing: so is one that is put off."""

    def call():
        time.sleep(seconds)
        return HERE

    return call


@pytest.mark.usefixtures("nobody_waits")
def test_on_a_quiet_machine_the_time_that_passes_counts():
    found = timed([spinning(0.002), sleeping(0.03)])
    assert not found.busy
    assert found.ms[0] >= 2
    assert found.ms[1] >= 30


@pytest.mark.usefixtures("threads_always_wait")
def test_on_a_busy_machine_what_is_computed_counts():
    found = timed([spinning(0.004), sleeping(0.03)])
    assert found.busy
    short = 4 / torch.get_num_threads()
    assert short <= found.ms[0] <= 2 * short
    assert found.ms[1] < 2


@pytest.mark.usefixtures("threads_always_wait")
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_computed_is_computed_by_one_thread(fails):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)

    def call():
        seen.append(torch.get_num_threads())
        if fails and seen[-1] == 1:
            raise RuntimeError("out of memory")
        return HERE

    try:
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                timed([call])
        else:
            timed([call])
        assert torch.get_num_threads() == 3
        assert {1, 3} == set(seen)
    finally:
        torch.set_num_threads(before)


def test_a_machine_is_busy_while_threads_wait(threads_always_wait):
    assert is_busy(HERE.device)


def test_a_machine_is_not_busy_while_none_waits(nobody_waits):
    assert not is_busy(HERE.device)


@pytest.mark.skipif(clock._waited_seconds() == 0.0, reason="this system does not say how long threads wait")
def test_the_system_says_that_threads_wait():
    """More threads than processors that all compute wait for each other; Python's lock would keep them apart."""
    x, before = torch.randn(600, 600), clock._waited_seconds()
    threads = [threading.Thread(target=lambda: [x @ x for _ in range(30)]) for _ in range(16)]
    for thread in threads:
        thread.start()
    most = 0.0
    while any(thread.is_alive() for thread in threads):
        most = max(most, clock._waited_seconds() - before)
        time.sleep(0.005)
    assert most > 0.01


@pytest.mark.parametrize(
    ("sparse_ms", "busy", "unsure"),
    [(0.9, True, True), (1.5, True, True), (CLEAR, True, False), (1 / CLEAR, True, False), (0.9, False, False)],
)
def test_times_of_a_busy_machine_are_unsure_where_they_are_close(sparse_ms, busy, unsure):
    assert SiteSpeed(1.0, sparse_ms, None, busy).is_unsure == unsure


def test_on_a_gpu_that_others_use_the_least_single_call_counts():
    durations = itertools.cycle([0.004, 0.001, 0.004])
    made = []

    def call():
        made.append(1)
        time.sleep(next(durations))
        return HERE

    found = timed([call, spinning(0.002)], crowded=True)
    assert found.busy
    assert len(made) == 1 + clock.SINGLE_CALLS
    assert 1 <= found.ms[0] < 4
    assert found.ms[1] >= 2
