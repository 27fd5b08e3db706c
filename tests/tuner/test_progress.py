"""What a calibration says outside a terminal."""

from __future__ import annotations

import logging
import subprocess
import sys
import time

import pytest

from afbs_compile.tuner import progress


@pytest.fixture
def lines(monkeypatch, caplog):
    """What is logged, every 50 ms."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    caplog.set_level(logging.INFO, logger="afbs_compile")
    return caplog


def test_lines_at_the_start_now_and_then_and_at_the_end(lines):
    with progress.budget_progress(3) as advance:
        assert lines.messages == ["spending the budget of attention: 0 of 3 steps, 0 s"]
        advance()
        time.sleep(0.3)
        assert "spending the budget of attention: 1 of 3 steps, 0 s" in lines.messages[1:]
        advance()
        advance()
    assert lines.messages[-1] == "spending the budget of attention: 3 of 3 steps, 0 s"
    said = len(lines.messages)
    time.sleep(0.2)
    assert len(lines.messages) == said, "and then no more"


def test_an_error_ends_the_lines(lines):
    with pytest.raises(KeyError), progress.calibration_progress(2):
        raise KeyError("x")
    said = len(lines.messages)
    time.sleep(0.2)
    assert len(lines.messages) == said


PROGRAM = """
import logging, sys
{before}
from afbs_compile.tuner.progress import budget_progress
with budget_progress(1) as advance:
    advance()
"""
SAID = "spending the budget of attention: 1 of 1 steps, 0 s\n"


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("", "afbs: " + SAID),
        ("logging.basicConfig()", ""),  # a program that logs has said what it wants to see
        ("logging.basicConfig(level=logging.INFO)", "INFO:afbs_compile:" + SAID),
        ("logging.getLogger('afbs_compile').setLevel(logging.WARNING)", ""),
    ],
)
def test_a_program_without_logging_shows_them_too(before, said):
    program = PROGRAM.format(before=before)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.endswith(said)
    assert bool(done.stderr) == bool(said)
