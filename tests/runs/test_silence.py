"""Rewards that abstain from everything: said, recorded, and the end of a run that would learn nothing."""

import json
import os
import sqlite3

import pytest

import coterie
from coterie.commands.models import check_recipe
from coterie.errors import RunFailedError, UserError
from coterie.recipe import load_recipe

REWARDS = """
calls = []

def nothing(completions):
    return [None] * len(completions)

def fails(completions):
    raise ValueError("out of reach")

def length(completions):
    return [float(len(text)) for text in completions]

def of_two(completions):
    calls.append(1)
    return [None if len(calls) in (2, 3) else float(len(text)) for text in completions]
"""
MODEL = {"type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def make(*names, **settings):
        (tmp_path / "rewards.py").write_text(REWARDS)
        rows = [json.dumps({"prompt": str(number), "answer": "1"}) for number in range(8)]
        (tmp_path / "data.jsonl").write_text("\n".join(rows))
        values = {
            "model": MODEL, "tokenizer": "bytes", "task": {"data": "data.jsonl", "heldout": 0}, "prompts_per_step": 2,
            "group_size": 2, "steps": 8, "sampling": {"max_new_tokens": 3}, "max_failed_rewards": 1.0,
            "rewards": [f"rewards.py:{name}" for name in names], **settings,
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(values))
        return str(tmp_path / "recipe.yaml")

    return make


def events(folder):
    with sqlite3.connect(folder / "run.db") as db:
        return db.execute("SELECT step, message FROM events WHERE kind = 'reward_silent' ORDER BY step").fetchall()


@pytest.mark.parametrize(("steps", "last"), [(8, 5), (2, 2)])
def test_a_run_whose_rewards_all_abstain_ends_and_says_why(write, tmp_path, capsys, steps, last):
    with pytest.raises(
        RunFailedError, match=rf"step {last}: the rewards abstained from every completion of {last} steps"
    ):
        coterie.train(write("nothing", steps=steps), out=str(tmp_path / "run"))
    ((step, message),) = events(tmp_path / "run")
    assert step == 1
    assert f"After {last} such steps in a row the run ends" in message
    assert "no completion of this step has a reward" in " ".join(capsys.readouterr().out.split())


def test_one_reward_of_two_that_never_speaks_is_said_once(write, tmp_path):
    coterie.train(write("nothing", "length"), out=str(tmp_path / "run"))
    assert events(tmp_path / "run") == [(5, "reward nothing has said nothing of any completion for 5 steps")]


def test_some_steps_without_a_reward_are_told_and_end_nothing(write, tmp_path):
    recipe = write("of_two", steps=4, limits={"skipped_steps": 3})
    coterie.train(recipe, out=str(tmp_path / "run"))
    assert [step for step, _ in events(tmp_path / "run")] == [2]


def test_a_cold_start_has_no_rewards_that_could_be_silent(write, tmp_path):
    recipe = write(
        "length", cold_start={"steps": 6}, steps=1, task={"data": "data.jsonl", "heldout": 0, "answer": "answer"}
    )
    coterie.train(recipe, out=str(tmp_path / "run"))
    assert events(tmp_path / "run") == []


def test_an_allowed_outage_ends_no_run_and_is_told_with_its_line(write, tmp_path, capsys):
    coterie.train(write("fails", steps=6), out=str(tmp_path / "run"))
    assert events(tmp_path / "run") == [(5, "reward fails has said nothing of any completion for 5 steps")]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("a reward failed: fails, prompt 1, completion 1: raised ValueError: out of reach") == 1
    assert "rewards.py, line 8, in fails" in said


def test_check_tells_rewards_that_abstained_from_equal_ones(write, capsys):
    check_recipe(load_recipe(write("nothing")))
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing abstains" in said
    assert "all 2 completions of this group abstain" in said
    assert "equal" not in said.split("--- 1")[1]
    assert "works" not in said.split("all 2 completions")[1]
    check_recipe(load_recipe(write("fails")))
    said = " ".join(capsys.readouterr().out.split())
    assert "fails failed" in said
    assert "rewards.py, line 8, in fails" in said
    with pytest.raises(UserError, match="out of reach"):
        check_recipe(load_recipe(write("fails", max_failed_rewards=0.5)))


def test_check_eval_and_sample_close_their_rewards(write, tmp_path):
    """A worker's process that is left would outlive the command."""
    recipe = write("length", rewards=[{"function": "rewards.py:length", "workers": 1, "name": "pids"}])
    (tmp_path / "rewards.py").write_text(
        f"import os\n\ndef length(completions):\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    check_recipe(load_recipe(recipe))
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
