"""What is known of a quiet machine, and that a busy one goes by it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import afbs_compile
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.tuner import clock as clock_module
from afbs_compile.tuner import speed
from afbs_compile.tuner.clock import Times
from afbs_compile.tuner.rates import Rates, Work
from afbs_compile.tuner.speed import Pair, SiteSpeed, Stopwatch
from tests.toy import Toy, drifting

CPU = torch.device("cpu")
CALL = SparseCall.uniform(2, 0.9, policy="cumulant", shape=BlockShape(64, 64))


def operands(length=1024):
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 1, 2, length, 32, generator=generator)
    return Operands(q, k, v, mask_of("causal"), 32**-0.5)


def test_a_time_is_work_times_a_rate():
    rates = Rates()
    assert rates.ms(Work("dense", 1024.0)) is None
    rates.learn(Work("dense", 1024.0), 2.0)
    rates.learn(Work("dense", 1024.0), 3.0)  # the machine was slower, for whatever reason
    assert rates.ms(Work("dense", 2048.0)) == pytest.approx(4.0)
    assert rates.ms(Work("dense", 4096.0)) == pytest.approx(8.0)
    assert rates.ms(Work("dense", 8192.0)) is None, "short calls have other bounds than long ones"
    assert rates.ms(Work("dense", 0.0)) is None
    assert rates.ms(Work("predictor", 1024.0)) is None


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf])
def test_no_time_teaches_nothing(ms):
    rates = Rates()
    rates.learn(Work("dense", 1024.0), ms)
    rates.learn(Work("dense", 0.0), 1.0)
    assert rates.ms(Work("dense", 1024.0)) is None


def test_the_next_process_knows_them_and_nobody_else_may_write_them():
    rates = Rates.of(CPU)
    rates.save()
    assert rates.path is not None
    assert not rates.path.exists(), "there is nothing to keep"
    rates.learn(Work("dense", 1024.0), 2.0)
    rates.save()
    assert Rates.of(CPU).ms(Work("dense", 1024.0)) == pytest.approx(2.0)
    assert rates.path.stat().st_mode & 0o077 == 0
    rates.path.chmod(0o666)
    assert Rates.of(CPU).known == {}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"rates": 3, "digest": "x"}', '{"rates": "{}", "digest": "0"}', "[" * 100_000, "\udcff"],
)
def test_a_damaged_file_is_as_none(text):
    rates = Rates.of(CPU)
    rates.learn(Work("dense", 1024.0), 2.0)
    rates.save()
    assert rates.path is not None
    rates.path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert Rates.of(CPU).known == {}


def test_what_somebody_changed_is_not_believed():
    rates = Rates.of(CPU)
    rates.learn(Work("dense", 1024.0), 2.0)
    rates.save()
    assert rates.path is not None
    whole = json.loads(rates.path.read_text())
    rates.path.write_text(json.dumps({**whole, "rates": whole["rates"].replace("0.00195", "0.00001")}))
    assert Rates.of(CPU).known == {}


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AFBS_CACHE_DIR", str(tmp_path / "file" / "folder"))
    rates = Rates.of(CPU)
    rates.learn(Work("dense", 1024.0), 2.0)
    rates.save()


@pytest.fixture
def clock(monkeypatch):
    """What every timing says from now on: milliseconds of each call in a row, and whether the machine is busy."""
    said = {"busy": False, "ms": (10.0, 4.0)}

    def timed(calls, *, crowded=False):
        [call() for call in calls]
        return Times(said["ms"][-len(calls) :] if len(calls) > 1 else said["ms"][:1], busy=said["busy"] or crowded)

    monkeypatch.setattr(speed, "timed", timed)
    return said


def test_a_busy_machine_goes_by_what_a_quiet_one_taught(clock):
    quiet, sample = Stopwatch(), operands()
    clock["ms"] = (1.0,)
    assert quiet.predictor_ms(sample, CALL) == 1.0
    clock["ms"] = (5.0,)
    everything = quiet.attention_ms(sample, CALL)
    clock["ms"] = (10.0, 4.0)
    assert quiet.dense_and_sparse_ms(sample, CALL, 0.5) == Pair(10.0, 4.0, busy=False)
    quiet.remember()

    clock.update(busy=True, ms=(70.0, 700.0))
    later = Stopwatch()
    assert later.predictor_ms(sample, CALL) == pytest.approx(1.0)
    assert later.attention_ms(sample, CALL) == pytest.approx(everything)
    known = later.dense_and_sparse_ms(sample, CALL, 0.5)
    assert known.busy, "a quiet machine has the last word"
    assert known.dense_ms == pytest.approx(10.0)
    assert known.sparse_ms == pytest.approx(0.5 * everything + 1.0)
    assert later.dense_and_sparse_ms(sample, CALL, 0.9).sparse_ms == pytest.approx(0.1 * everything + 1.0)
    later.remember()
    assert Rates.of(CPU).known == quiet.rates(CPU).known, "a busy machine teaches nothing"


def test_a_gpu_that_others_use_is_busy_for_all_of_a_site(clock, monkeypatch):
    asked_of = []
    timed = speed.timed
    monkeypatch.setattr(
        speed, "timed", lambda calls, *, crowded: asked_of.append(crowded) or timed(calls, crowded=crowded)
    )
    monkeypatch.setattr(speed, "is_shared", lambda _: False)
    asked = iter([True, False, True])
    monkeypatch.setattr(speed, "is_busy", lambda _: next(asked))
    stopwatch, sample = Stopwatch(), operands()
    stopwatch.predictor_ms(sample, CALL)
    assert asked_of == [True]
    assert stopwatch.rates(CPU).known == {}, "what a crowded GPU says teaches nothing"
    assert not SiteSpeed.measure(sample, CALL, 0.5, stopwatch, dense_ms=10.0, sparse_ms=1.0).busy
    measured = SiteSpeed.measure(sample, CALL, 0.5, stopwatch, dense_ms=10.0, sparse_ms=1.0)
    assert (measured.dense_ms, measured.sparse_ms) == clock["ms"], "and times that are known are measured again"


def test_what_is_not_known_is_measured(clock):
    quiet, sample = Stopwatch(), operands()
    quiet.dense_and_sparse_ms(sample, CALL, 0.5)
    quiet.remember()
    clock.update(busy=True, ms=(70.0, 700.0))
    assert Stopwatch().dense_and_sparse_ms(sample, CALL, 0.5) == Pair(70.0, 700.0, busy=True)
    assert Stopwatch().predictor_ms(sample, CALL) == 70.0


def test_another_kernel_is_another_question(clock):
    quiet, sample = Stopwatch(), operands()
    quiet.predictor_ms(sample, CALL)
    quiet.remember()
    clock.update(busy=True, ms=(70.0, 700.0))
    for other, call in (
        (replace(sample, mask=mask_of("full")), CALL),
        (replace(sample, valid=torch.ones(1, 1024, dtype=torch.bool)), CALL),
        (sample, replace(CALL, shape=BlockShape(128, 64))),
        (sample, SparseCall.uniform(2, 0.9, policy="meansim", shape=CALL.shape)),
    ):
        assert Stopwatch().predictor_ms(other, call) == 70.0
    assert Stopwatch().predictor_ms(sample, CALL) == pytest.approx(10.0)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_calibration_leaves_them_to_the_next(monkeypatch):
    monkeypatch.setattr(clock_module, "_waited_seconds", lambda: 0.0)
    afbs_compile.calibrate(Toy().eval(), [drifting(512)], tolerance=0.05, min_length=128)
    assert {kernel.split()[0].rstrip(",") for kernel in Rates.of(CPU).known} == {"dense", "attention", "predictor"}
