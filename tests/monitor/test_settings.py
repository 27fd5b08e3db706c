"""What the option takes, and what it says of the rest."""

from __future__ import annotations

import pytest

from afbs_compile.errors import OptionError
from afbs_compile.monitor.settings import MonitorSettings
from afbs_compile.options import Options


def test_true_is_as_by_default_and_false_is_none():
    assert Options.parse({"monitor": True}).watching == MonitorSettings()
    assert Options.parse({"monitor": False}).watching is None
    assert Options.parse({}).watching is None
    assert Options.parse({"monitor": {"share": 0.5}, "recipe": "r.json"}).watching == MonitorSettings(share=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "monitor: got 3; accepted: True, or a mapping of share, rows, delta"),
        ({"shares": 1}, "monitor: unknown 'shares'; accepted: share, rows"),
        ({"share": 0}, "monitor: share is 0; accepted: None, or a number above 0, at most 1"),
        ({"share": 1.5}, "monitor: share is 1.5; accepted"),
        ({"share": True}, "monitor: share is True; accepted"),
        ({"rows": 4}, "monitor: rows is 4; accepted: a whole number, at least 8"),
        ({"delta": 1}, "monitor: delta is 1; accepted: a number between 0 and 1"),
        ({"rate": float("nan")}, "monitor: rate is nan; accepted: None, or"),
        ({"look_every": 0}, "monitor: look_every is 0; accepted"),
        ({"keep": -1}, "monitor: keep is -1; accepted: a whole number, 0 for none"),
        ({"recalibrate": "now"}, "monitor: recalibrate is 'now'; accepted: 'on demand' or 'automatically'"),
        ({"on_alarm": "pager"}, "monitor: on_alarm is 'pager'; accepted: None, or a function of one alarm"),
    ],
)
def test_what_is_not_accepted_is_said_in_one_sentence(given, message):
    with pytest.raises(OptionError) as raised:
        Options.parse({"monitor": given})
    assert str(raised.value).startswith(message)


def test_a_recipe_is_reused_whatever_watches():
    assert Options.parse({"monitor": True}).key == Options.parse({}).key
