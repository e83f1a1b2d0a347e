"""Sums and differences: what is asked, what is right, and what is held out."""

from dataclasses import replace

import pytest
import torch

from coterie.models.load import codec_of
from coterie.tasks.arithmetic import Arithmetic, Sum, make_tokenizer, sums
from coterie.types import Completion, Group, Scored


@pytest.fixture(scope="module")
def task():
    return Arithmetic(codec_of(make_tokenizer()))


@pytest.mark.parametrize(("first", "operation", "second", "answer"), [(47, "plus", 38, 85), (12, "minus", 30, -18)])
def test_a_sum_has_a_question_and_an_answer(first, operation, second, answer):
    one = Sum(first, operation, second)
    assert one.question == f"What is {first} {operation} {second}?"
    assert one.answer == answer
    assert one.worked.endswith(f"= {answer}")


def test_no_held_out_sum_is_trained_on(task):
    train, heldout = sums()
    assert len(heldout) == 400
    assert not set(train) & set(heldout)
    assert {prompt.text for prompt in task.heldout} == {one.question for one in heldout}


def test_the_last_answer_of_a_completion_is_judged(task):
    prompt = next(prompt for prompt in task.heldout if "-" not in prompt.columns["answer"])
    right = prompt.columns["answer"]
    texts = {
        f"It is {right}.": True,
        f"{right}1": False,
        f"First 3, so the answer is {right}": True,
        "": False,
        f"-{right}": False,
        prompt.columns["worked"]: True,
        prompt.columns["worked"] + ".": True,
        prompt.columns["worked"] + "1": False,
        prompt.columns["worked"].partition(" =")[0]: False,
    }
    made = [Completion([1], torch.zeros(1), torch.zeros(1), "stop", text) for text in texts]
    scored = Scored([Group(prompt, made)], torch.zeros(1, len(made)), {}, [])
    assert task.judge(scored)["accuracy"] == list(texts.values())


@pytest.mark.parametrize(
    ("asked", "answer"), [("What is 47 plus 38?", "85"), ("3-10", "-7"), ("2 + -5", "-3"), ("hello", None)]
)
def test_what_a_person_types_is_understood(task, asked, answer):
    columns = task.columns_of(asked)
    assert (columns and columns["answer"]) == answer


def test_a_preference_is_between_the_answer_and_another(task):
    for prompt, better, worse in task.preferences(20, seed=0, step=1):
        assert better != worse
        assert prompt
    assert task.preferences(3, seed=0, step=2) == task.preferences(3, seed=0, step=2)
    assert task.heldout_preferences(5, seed=1)


def test_a_demonstration_is_the_sum_worked_out(task):
    (prompt, answer), *_ = task.demonstrations(1, seed=0, step=1)
    text = task._codec.decode(answer)
    left, _, right = text.partition(" = ")
    assert eval(left) == int(right)
    assert replace(task.train[0]).tokens[:1] == prompt[:1]
