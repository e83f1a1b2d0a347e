"""`coterie score`: rewards over completions of a file or a run, without a model."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import coterie
from coterie.commands.scoring import Candidate, score_completions, score_rows
from coterie.errors import UserError
from coterie.recipe import load_recipe
from coterie.rewards.base import Reward
from coterie.types import Prompt

COTERIE = str(Path(sys.executable).parent / "coterie")
REWARDS = """
import asyncio, time
closed = []

def length(completions):
    return [float(len(text)) for text in completions]

def starts(completions, letter):
    if any(text == "?" for text in completions):
        raise ValueError("a question\\nis no answer")
    return [None if text == "" else float(text.startswith(wanted)) for text, wanted in zip(completions, letter)]

async def slow(completions):
    await asyncio.sleep(0.2)
    return [1.0] * len(completions)

def chat(prompts, completions):
    assert all(p[-1]["role"] == "user" for p in prompts)
    return [float(len(c[0]["content"])) for c in completions]

def ids(completions, completion_ids):
    return [float(len(tokens)) for tokens in completion_ids]

def perhaps_ids(completions, completion_ids=None):
    return [-1.0 if completion_ids is None else len(completion_ids[0])] * len(completions)

def ids_in_passing(completions, **columns):
    return [float(len(tokens)) for tokens in columns["completion_ids"]]
"""


@pytest.fixture
def write(tmp_path):
    """A recipe with the rewards named, and a file of rows. Its model and data are not there, and nobody may look for them."""

    def make(rewards, rows, **settings):
        (tmp_path / "rewards.py").write_text(REWARDS)
        lines = [f"- {{function: 'rewards.py:{name}', weight: {weight}}}" for name, weight in rewards.items()]
        values = {"model": "nowhere/model", "task": {"data": "nowhere.jsonl"}, **settings}
        texts = [f"{name}: {json.dumps(value)}" for name, value in values.items()]
        (tmp_path / "recipe.yaml").write_text("\n".join([*texts, "rewards:", *lines]))
        content = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(content) + "\n")
        return str(tmp_path / "recipe.yaml"), str(tmp_path / "rows.jsonl")

    return make


ROWS = [
    {"prompt": "p", "completion": "ab", "letter": "a"},
    {"prompt": "q", "completions": ["cccc", "c", ""], "letter": "c"},
    {"prompt": "p", "completion": "bbbb", "letter": "a"},
    {"prompt": "r", "completion": "?", "letter": "x"},
]


def table(printed, title):
    """The cells of a printed table, by the first of each row."""
    lines = itertools.takewhile(lambda line: line.startswith("  "), printed.partition(title)[2].splitlines()[1:])
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_the_command_prints_parts_spread_failures_and_time(write, tmp_path):
    """By hand: lengths 2, 4, 4, 1, 0, 1; in groups (2, 4), (4, 1, 0) and one alone."""
    recipe, rows = write({"length": 1, "starts": 2}, ROWS)
    out = tmp_path / "scores.jsonl"
    done = subprocess.run(
        [COTERIE, "score", recipe, rows, "--out", str(out)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "6 completions of 3 prompts" in done.stdout
    parts = table(done.stdout, "6 completions")
    within = (math.sqrt(2) + math.sqrt(13 / 3)) / 2
    assert parts["length"][:8] == ["1", "2", "1.673", "0", "4", "0", "0", f"{within:.4g}"]
    assert parts["starts"][:7] == ["2", "0.75", "0.5", "0", "1", "1", "1"]
    assert parts["length"][8] == "0%"
    assert parts["starts"][8] == "50%"  # both completions of q that it speaks of start with c
    assert parts["sum"][0] == "3.4"  # (4 + 4 + 6 + 3 + 0) / 5: the failed completion has none
    assert f"{rows}:4  raised ValueError: a question is no answer" in done.stdout
    assert re.search(r"length +[\d.e-]+ s +[\d.e-]+ ms +6", done.stdout)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [entry["completion"] for entry in written] == ["ab", "bbbb", "cccc", "c", "", "?"]
    assert [entry["reward"] for entry in written] == [4.0, 4.0, 6.0, 3.0, 0.0, None]
    assert written[4] == {
        "row": f"{rows}:2", "prompt": "q", "completion": "", "reward": 0.0, "parts": {"length": 0.0, "starts": None},
        "failures": {},
    }  # fmt: skip
    assert "a question" in written[5]["failures"]["starts"]


def test_chats_are_scored_as_in_training(write, capsys):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    answer = [{"role": "assistant", "content": "four"}]
    recipe, rows = write(
        {"chat": 1}, [{"messages": prompt, "completions": ["two", answer]}], task={"data": "d", "prompt": "messages"}
    )
    score_completions(load_recipe(recipe), rows, None)
    assert table(capsys.readouterr().out, "2 completions")["chat"][:5] == ["1", "3.5", "0.7071", "3", "4"]


def test_texts_that_a_recipe_makes_chats_of_are_scored_as_chats(write, capsys):
    task = {"data": "d", "prompt": "question", "chat": True}
    recipe, rows = write({"chat": 1}, [{"question": "u", "completions": ["two", "four"]}], task=task)
    score_completions(load_recipe(recipe), rows, None)
    assert table(capsys.readouterr().out, "2 completions")["chat"][:5] == ["1", "3.5", "0.7071", "3", "4"]


def test_no_share_is_given_where_no_prompt_has_two_completions(write, capsys):
    recipe, rows = write({"length": 1}, [{"prompt": "p", "completion": "ab"}, {"prompt": "q", "completion": "c"}])
    score_completions(load_recipe(recipe), rows, None)
    printed = capsys.readouterr().out
    assert table(printed, "2 completions")["length"][7:] == ["-", "-"]
    assert "no prompt has two completions" in printed


def test_half_a_character_is_written_as_its_escape(write, tmp_path, capsys):
    recipe, rows = write({"length": 1}, [{"prompt": "p", "completions": ["a\ud800", "b"], "letter": "a"}])
    score_completions(load_recipe(recipe), rows, tmp_path / "out.jsonl")
    first, _ = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["completion"] == "a\ud800"


def test_the_time_of_an_async_reward_is_that_of_its_answer(write, capsys):
    recipe, rows = write({"slow": 1, "length": 1}, ROWS)
    score_completions(load_recipe(recipe), rows, None)
    times = table(capsys.readouterr().out, "Time")
    assert 0.2 <= float(times["slow"][0].split()[0]) < 5
    assert float(times["length"][0].split()[0]) < 0.1


def test_a_call_gets_whole_groups_as_many_as_a_step_has():
    calls = []

    def reward(prompts, completions):
        calls.append(list(prompts))
        return [1.0] * len(completions)

    rows = [Candidate("", p, Prompt(0, p, [1]), "x") for p in "abcabca"]
    scores = score_rows(rows, [Reward("r", reward)], groups_per_call=2)
    assert calls == [["a", "a", "a", "b", "b"], ["c", "c"]]
    assert scores.sizes == [3, 2, 2]


def test_failures_of_later_calls_name_their_own_rows():
    def reward(completions):
        return [float(text) for text in completions]

    rows = [Candidate(f"f:{i}", text, Prompt(0, text, [1]), text) for i, text in enumerate(["1", "2", "x"])]
    scores = score_rows(rows, [Reward("r", reward)], groups_per_call=2)
    assert [scores.rows[failure.group].origin for failure in scores.failures] == ["f:2"]
    assert scores.rewards[:2].tolist() == [1, 2]


def test_tokens_that_nobody_knows_are_not_made_up(write, capsys):
    """A reward that asks for them needs the tokenizer, which is not there; one that takes them in passing fails by name."""
    recipe, rows = write({"ids": 1}, ROWS)
    with pytest.raises(UserError, match="nowhere/model"):
        score_completions(load_recipe(recipe), rows, None)
    score_completions(load_recipe(recipe, ["tokenizer=bytes"]), rows, None)
    assert table(capsys.readouterr().out, "6 completions")["ids"][1] == "3"  # a byte each and the end token
    recipe, rows = write({"perhaps_ids": 1}, ROWS)
    score_completions(load_recipe(recipe), rows, None)
    printed = capsys.readouterr().out
    assert "rewards get no completion_ids" in printed
    assert table(printed, "6 completions")["perhaps_ids"][1] == "-1"
    recipe, rows = write({"ids_in_passing": 1}, ROWS)
    score_completions(load_recipe(recipe), rows, None)
    assert "raised KeyError: 'completion_ids'" in capsys.readouterr().out


def test_a_length_in_characters_needs_no_tokenizer(write, tmp_path, capsys):
    recipe, rows = write({"length": 1}, ROWS)
    built_in = "rewards=[{function: length, options: {at_most: 2, unit: UNIT}}]"
    score_completions(load_recipe(recipe, [built_in.replace("UNIT", "characters")]), rows, None)
    printed = capsys.readouterr().out
    assert table(printed, "6 completions")["length"][3:5] == ["-1", "0"]
    assert "warning" not in printed
    with pytest.raises(UserError, match="counts tokens and there are none here"):
        score_completions(load_recipe(recipe, [built_in.replace("UNIT", "tokens")]), rows, None)
    assert "nowhere/model" in capsys.readouterr().out


def test_rewards_are_closed_after_a_mistake_too(write, monkeypatch):
    closed = []
    monkeypatch.setattr(Reward, "close", lambda reward: closed.append(reward.name))
    recipe, rows = write({"length": 1, "starts": 1}, [{"prompt": "p", "completion": "c"}])
    with pytest.raises(UserError, match="needs letter, which is no column"):
        score_completions(load_recipe(recipe), rows, None)
    assert sorted(closed) == ["length", "starts"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"rows.jsonl:2: is not valid JSON"),
        ("[1]", r"rows.jsonl:2: is a list"),
        ({"completion": "c"}, r"rows.jsonl:2: has no column 'prompt'"),
        ({"prompt": 3, "completion": "c"}, r"rows.jsonl:2: column 'prompt' holds 3"),
        ({"prompt": "p"}, r"rows.jsonl:2: has neither of the columns 'completion' and 'completions'"),
        ({"prompt": "p", "completion": "c", "completions": ["c"]}, r"rows.jsonl:2: has both"),
        ({"prompt": "p", "completion": None}, r"rows.jsonl:2: column 'completion' holds None"),
        ({"prompt": "p", "completions": []}, r"rows.jsonl:2: column 'completions' holds \[\]"),
        ({"prompt": "p", "completions": "c"}, r"rows.jsonl:2: column 'completions' holds 'c'"),
        ({"prompt": "p", "completions": ["c", 4]}, r"rows.jsonl:2: column 'completions' holds 4"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write, row, message):
    recipe, rows = write({"length": 1}, [{"prompt": "p", "completion": "c"}, row])
    with pytest.raises(UserError, match=message):
        score_completions(load_recipe(recipe), rows, None)


def test_what_can_t_be_scored_is_refused(write, tmp_path):
    recipe, rows = write({"length": 1}, ROWS)
    with pytest.raises(UserError, match=r"missing.jsonl is neither a file nor a run folder"):
        score_completions(load_recipe(recipe), str(tmp_path / "missing.jsonl"), None)
    with pytest.raises(UserError, match=r"run.db does not exist"):
        score_completions(load_recipe(recipe), str(tmp_path), None)
    for out, said in ((tmp_path / "no" / "folder.jsonl", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=said):
            score_completions(load_recipe(recipe), rows, out)
    with pytest.raises(UserError, match="has no rewards"):
        score_completions(load_recipe("equations_reward_model"), rows, None)


def test_what_a_run_recorded_is_scored_as_it_was(tiny_recipe, tmp_path, capsys):
    folder = coterie.train("equations", overrides=[*tiny_recipe, "steps=2"], out=str(tmp_path / "run")).folder
    capsys.readouterr()
    score_completions(load_recipe(str(folder / "recipe.yaml")), str(folder), tmp_path / "out.jsonl")
    assert "24 completions of 6 prompts" in capsys.readouterr().out
    import sqlite3

    with sqlite3.connect(folder / "run.db") as db:
        recorded = db.execute(
            "SELECT text, reward FROM completions ORDER BY step, prompt_number, completion_number"
        ).fetchall()
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(entry["completion"], entry["reward"]) for entry in written] == recorded


def test_what_is_written_holds_no_key(write, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "0123456789abcdef")
    hidden = ("0123456789abcdef", "sk-abcdefgh12345678", "hunter2")
    text = "0123456789abcdef Authorization: Bearer hunter2x, sk-abcdefgh12345678"
    rows = [{"prompt": [{"role": "user", "content": text}], "completion": f"? {text}", "letter": "x"}]
    recipe, rows = write({"starts": 1}, rows)
    score_completions(load_recipe(recipe), rows, tmp_path / "out.jsonl")
    written = (tmp_path / "out.jsonl").read_text()
    assert "***" in written
    assert not [value for value in hidden if value in written]
