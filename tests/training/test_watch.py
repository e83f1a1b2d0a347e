"""Figures that say a run is going wrong become events, and end the run where that is asked for (R36)."""

import sqlite3

import pytest

import coterie
from coterie.settings import Limits
from coterie.training.run import RunFailedError
from coterie.training.watch import alarms

GOOD = {"optimiser/grad_norm": 1.0, "policy/ratio_max": 1.1, "policy/sampler_gap_max": 1e-6, "policy/kl": 0.1, "policy/entropy": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"optimiser/grad_norm": 30.0}, ["grad_norm_times"]),
        ({"optimiser/grad_norm": 20.0}, []),
        ({"policy/ratio_max": 101.0}, ["ratio"]),
        ({"policy/sampler_gap_max": 0.6}, ["sampler_gap"]),
        ({"policy/kl": 3.0}, ["kl"]),
        ({"policy/entropy": 0.001}, ["entropy"]),
        ({"policy/entropy": 0.0, "policy/kl": 9.0}, ["kl", "entropy"]),
    ],
)
def test_r36_limits_that_are_passed(changed, expected):
    found = alarms({**GOOD, **changed}, [1.0] * 20, Limits(kl=2.0))
    assert [alarm.limit for alarm in found] == expected


def test_r36_a_gradient_is_compared_with_the_median_of_enough_steps():
    big = {"optimiser/grad_norm": 30.0}
    assert alarms(big, [1.0] * 9, Limits()) == []
    (alarm,) = alarms(big, [1.0] * 9 + [1000.0], Limits())
    assert "30 times the usual 1" in alarm.message
    assert alarms(big, [0.0] * 10, Limits()) == []  # nothing usual to compare with


def events(folder):
    with sqlite3.connect(folder / "run.db") as db:
        return db.execute("SELECT step, message FROM events WHERE kind = 'limit' ORDER BY step").fetchall()


def test_r36_a_limit_is_an_event_once_and_ends_the_run_where_it_is_named(tiny_recipe, tmp_path):
    given = [*tiny_recipe, "cold_start=null", "evaluation={prompts: 2, samples: 1}", "limits.entropy=100"]
    run = coterie.train("equations", overrides=given, out=str(tmp_path / "goes_on"))
    ((step, message),) = events(run.folder)
    assert step == 1
    assert message.startswith("limits.entropy: ")
    with pytest.raises(RunFailedError, match="stop_on names entropy"):
        coterie.train("equations", overrides=[*given, "limits.stop_on=[entropy]"], out=str(tmp_path / "ends"))
    assert len(events(tmp_path / "ends")) == 1
