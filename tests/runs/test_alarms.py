"""Figures that say a run is going wrong become events, and end the run where that is asked for."""

import sqlite3

import pytest

import coterie
from coterie.errors import RunFailedError
from coterie.recipe import load_recipe
from coterie.recipe.settings import Limits
from coterie.runs.alarms import alarms, usual_norm
from coterie.runs.console import Console
from coterie.runs.folder import RunFolder
from coterie.training.session import Session

GOOD = {"optimiser/grad_norm": 1.0, "policy/ratio_max": 1.1, "policy/sampler_gap_max": 1e-6, "policy/kl": 0.1, "policy/entropy": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"optimiser/grad_norm": 30.0}, ["grad_norm_times"]),
        ({"optimiser/grad_norm": 20.0}, []),
        ({"policy/ratio_max": 101.0}, ["ratio"]),
        ({"policy/sampler_gap_max": 0.6}, []),  # nothing was found out about what rounding explains
        ({"policy/sampler_gap_max": 0.6, "policy/sampler_rounding": 0.7}, []),
        ({"policy/sampler_gap_max": 0.6, "policy/sampler_rounding": 0.5}, ["sampler_gap"]),
        ({"policy/kl": 3.0}, ["kl"]),
        ({"policy/entropy": 0.001}, ["entropy"]),
        ({"policy/entropy": 0.0, "policy/kl": 9.0}, ["kl", "entropy"]),
    ],
)
def test_limits_that_are_passed(changed, expected):
    found = alarms({**GOOD, **changed}, 1.0, Limits(kl=2.0))
    assert [alarm.limit for alarm in found] == expected


def test_a_gradient_is_compared_with_the_median_of_enough_steps():
    assert usual_norm([1.0] * 9, [1.0] * 9) is None
    (alarm,) = alarms({"optimiser/grad_norm": 30.0}, usual_norm([], [1.0] * 9 + [1000.0]), Limits())
    assert "30 times the usual 1" in alarm.message
    assert (
        alarms({"optimiser/grad_norm": 30.0}, usual_norm([], [0.0] * 10), Limits()) == []
    )  # nothing usual to compare with


def test_at_most_learning_a_gradient_is_held_against_the_start():
    start, solved = [0.5] * 50, [1e-5, 0.006, 0.2, 1e-5, 0.05] * 10
    assert alarms({"optimiser/grad_norm": 0.7}, usual_norm(start, solved), Limits()) == []
    (alarm,) = alarms({"optimiser/grad_norm": 12.0}, usual_norm(start, solved), Limits())
    assert alarm.limit == "grad_norm_times"
    (alarm,) = alarms({"optimiser/grad_norm": 12.0}, usual_norm([0.01] * 50, start), Limits())  # they may grow, too
    assert "24 times the usual 0.5" in alarm.message


def test_a_policy_that_is_always_right_has_not_collapsed():
    settled = {**GOOD, "policy/entropy": 0.0}
    assert alarms(settled, 1.0, Limits(), solved=True) == []
    assert [alarm.limit for alarm in alarms(settled, 1.0, Limits())] == ["entropy"]
    both = alarms({**settled, "policy/ratio_max": 101.0}, 1.0, Limits(), solved=True)  # what else is wrong is said
    assert [alarm.limit for alarm in both] == ["ratio"]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1.0, 1.0, 1.0, 0.98], {"sign/saturation"}), ([1.0, 1.0, 0.0, 0.0], {"limit", "sign/no_signal"})],
)
def test_a_solved_task_is_told_from_a_collapsed_policy(rewards, expected, tmp_path, tiny_recipe):
    """A quarter of a run in which completions differ, then one in which each prompt always gets the same reward."""
    mean = sum(rewards) / len(rewards)
    std = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5
    learning = {
        "reward/mean": 0.5, "reward/right_answer": 0.5, "reward/written_steps": 0.5, "reward/std": 0.5, "reward/highest": 1.0, "reward/lowest": 0.0, "group/no_signal_share": 0.2,
        "policy/entropy": 1.0, "optimiser/grad_norm": 0.5,
    }  # fmt: skip
    settled = {
        "reward/mean": mean, "reward/right_answer": mean, "reward/written_steps": mean, "reward/std": std, "reward/highest": max(rewards), "reward/lowest": min(rewards),
        "group/no_signal_share": 1.0, "policy/entropy": 0.001, "optimiser/grad_norm": 1e-5,
    }  # fmt: skip
    run = Session(RunFolder.create(load_recipe("equations", tiny_recipe), "run", str(tmp_path / "run"), Console()))
    for step in range(1, 61):
        run.recorder.record(
            "train",
            step,
            learning if step <= 15 else {**settled, "optimiser/grad_norm": 0.5} if step == 60 else settled,
        )
    run.close()
    with sqlite3.connect(tmp_path / "run" / "run.db") as db:
        assert {kind for (kind,) in db.execute("SELECT kind FROM events")} == expected


def events(folder):
    with sqlite3.connect(folder / "run.db") as db:
        return db.execute("SELECT step, message FROM events WHERE kind = 'limit' ORDER BY step").fetchall()


def test_a_limit_is_one_event_and_ends_the_run_if_named(tiny_recipe, tmp_path):
    given = [*tiny_recipe, "cold_start=null", "evaluation={prompts: 2, samples: 1}", "limits.entropy=100"]
    run = coterie.train("equations", overrides=given, out=str(tmp_path / "goes_on"))
    ((step, message),) = events(run.folder)
    assert step == 1
    assert message.startswith("limits.entropy: ")
    with pytest.raises(RunFailedError, match="stop_on names entropy"):
        coterie.train("equations", overrides=[*given, "limits.stop_on=[entropy]"], out=str(tmp_path / "ends"))
    assert len(events(tmp_path / "ends")) == 1
