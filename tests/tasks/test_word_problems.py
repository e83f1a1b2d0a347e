"""The recipe `gsm8k`: word problems in a file of one's own, whose answers end in `#### 42`."""

import json

import pytest
from chat_families import FAMILIES
from torch import zeros

from coterie.errors import UserError
from coterie.models.codec import Codec
from coterie.models.template import Chat
from coterie.recipe import load_recipe
from coterie.rewards.load import load_rewards
from coterie.rewards.score import score
from coterie.tasks.dataset import Dataset
from coterie.types import Completion, Group

PROBLEMS = (
    ("A tram has 12 people. At the market 5 get off and 9 get on. How many are in it?",
     "12 - 5 = <<12-5=7>>7 people stay.\nThen 7 + 9 = <<7+9=16>>16 people.\n#### 16", "16"),
    ("A roof of 1,500 tiles takes two more roofs' worth of tiles for its barn. How many tiles are there in all?",
     "The barn takes 2 * 1,500 = <<2*1500=3000>>3,000.\nIn all 1500 + 3000 = $<<1500+3000=4500>>4,500.\n#### 4,500", "4500"),
    ("A frost of 4 degrees below zero gets 3 degrees colder. What is the temperature?",
     "-4 - 3 = <<-4-3=-7>>-7\n#### -7", "-7"),
)  # fmt: skip


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """As a person has it: the two files in the folder where the run is started."""
    for name in ("train", "test"):
        rows = ({"question": f"{question} ({name})", "answer": answer} for question, answer, _ in PROBLEMS)
        (tmp_path / f"gsm8k_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return load_recipe("gsm8k")


@pytest.fixture
def task(recipe):
    return Dataset(recipe.task, Codec.of(FAMILIES["chatml"].tokenizer(), chat=Chat.of(recipe)))


def test_files_are_found_where_the_run_is_started_or_named(recipe, tmp_path):
    assert recipe.task.data == str(tmp_path / "gsm8k_train.jsonl")
    assert recipe.task.evaluation == str(tmp_path / "gsm8k_test.jsonl")
    (tmp_path / "mine.jsonl").write_text((tmp_path / "gsm8k_train.jsonl").read_text())
    assert load_recipe("gsm8k", ["task.data=mine.jsonl"]).task.data == str(tmp_path / "mine.jsonl")
    (tmp_path / "gsm8k_train.jsonl").unlink()
    without = load_recipe("gsm8k")
    with pytest.raises(UserError, match=r"gsm8k_train.jsonl does not exist; name another: --set task.data=FILE"):
        Dataset(without.task, Codec.of(FAMILIES["chatml"].tokenizer()))


def test_a_question_is_asked_in_a_chat_with_the_recipe_s_instructions(recipe, task):
    assert len(task.train) == len(task.heldout) == len(PROBLEMS)
    text = task._codec.as_read(task.train[0].tokens)
    assert text.startswith(
        f"<|im_start|>system\n{recipe.system_prompt}<|im_end|>\n<|im_start|>user\nA tram has 12 people."
    )
    assert text.endswith("<|im_start|>assistant\n")


def right_share(recipe, task, write):
    """What the recipe's reward, and its accuracy, make of completions that `write` makes of the labels."""
    texts = [write(label) for _, _, label in PROBLEMS]
    made = [Completion([1], zeros(1), zeros(1), "stop", text) for text in texts]
    rewards = load_rewards(recipe.rewards)
    scored = score([Group(prompt, [one]) for prompt, one in zip(task.heldout, made, strict=True)], rewards)
    for reward in rewards:
        reward.function.close()
    assert not scored.failures
    assert task.judge(scored)["accuracy"] == [value == 1 for value in scored.rewards[:, 0].tolist()]
    return scored.rewards.mean().item()


@pytest.mark.parametrize(
    "form", ["#### {}", "So it is {} in all.\n#### {}", "It is $\\boxed{{{}}}$.", "The answer is {}.", "1 + 2 = 3\n{}"]
)
def test_the_label_is_read_after_its_mark_and_so_is_an_answer(recipe, task, form):
    assert right_share(recipe, task, lambda label: form.format(label, label)) == 1
    assert right_share(recipe, task, lambda label: form.format(int(label) + 1, int(label) + 1)) == 0


def test_a_row_s_own_solution_is_right_and_no_answer_is_wrong(recipe, task):
    own = iter(answer for _, answer, _ in PROBLEMS)
    assert right_share(recipe, task, lambda label: next(own)) == 1
    assert right_share(recipe, task, lambda label: "I can't tell.") == 0
