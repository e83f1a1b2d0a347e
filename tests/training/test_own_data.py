"""SFT, a cold start, DPO and a reward model on the user's own rows."""

import json
import sqlite3

import pytest

import coterie
from coterie.errors import UserError
from coterie.recipe import make_recipe
from coterie.training.problem import Problem

MODEL = {"type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 96}  # fmt: skip
COMMON = {"model": MODEL, "tokenizer": "bytes", "steps": 40, "prompts_per_step": 8, "sampling": {"max_new_tokens": 8},
          "optimiser": {"learning_rate": 3.0e-3}, "evaluation": {"prompts": 4, "samples": 1}}  # fmt: skip


def rows(path, as_messages):
    """Forty prompts; the right answer says yes, the other no."""

    def answer(text):
        return [{"role": "assistant", "content": text}] if as_messages else text

    with path.open("w") as file:
        for n in range(40):
            row = {"prompt": f"{n} ok? ", "good": answer("yes"), "bad": answer("no"), "note": n}
            file.write(json.dumps(row) + "\n")
    return {"data": str(path), "prompt": "prompt", "answer": "good", "chosen": "good", "rejected": "bad"}


def metrics(run, name):
    with sqlite3.connect(run.folder / "run.db") as db:
        return [v for (v,) in db.execute("SELECT value FROM metrics WHERE name = ? ORDER BY stage, step", (name,))]


@pytest.mark.parametrize("as_messages", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("preset", ["sft", "dpo", "reward_model"])
def test_methods_learn_from_the_user_s_rows(tmp_path, preset, as_messages):
    values = {**COMMON, "preset": preset, "task": rows(tmp_path / "rows.jsonl", as_messages)}
    if preset == "reward_model":
        del values["sampling"]
        values["evaluation"] = {"prompts": 4}
    run = coterie.train(make_recipe(values), out=str(tmp_path / "run"))
    losses = metrics(run, "loss/total")
    assert losses[-1] < 0.3 * losses[0]


def test_a_cold_start_takes_the_answers_too(tmp_path):
    task = rows(tmp_path / "rows.jsonl", False)
    (tmp_path / "yes.py").write_text("def yes(completions, **_): return [float('y' in c) for c in completions]\n")
    start = {"steps": 80, "rows_per_step": 8, "learning_rate": 3.0e-3, "warmup_steps": 0}
    values = {**COMMON, "task": task, "cold_start": start, "rewards": [f"{tmp_path}/yes.py:yes"], "steps": 1}
    run = coterie.train(make_recipe(values), out=str(tmp_path / "run"))
    assert metrics(run, "reward/mean")[0] > 0.5


def test_an_answer_that_is_none_is_refused_with_its_line(tmp_path):
    task = rows(tmp_path / "rows.jsonl", False)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x", "good": 3, "bad": "no"}) + "\n")
    recipe = make_recipe({**COMMON, "preset": "dpo", "task": task})
    with pytest.raises(UserError, match=r"rows\.jsonl:41: column 'good' holds 3"):
        Problem.of(recipe)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x", "goood": "y", "bad": "no"}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: has no column 'good'.*goood"):
        Problem.of(recipe)


def test_an_answer_beyond_the_context_is_refused_with_its_line(tmp_path):
    task = rows(tmp_path / "rows.jsonl", False)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x", "good": "y" * 100, "bad": "no"}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:41: the prompt and column 'good' have 102 tokens"):
        Problem.of(make_recipe({**COMMON, "preset": "dpo", "task": task}))
