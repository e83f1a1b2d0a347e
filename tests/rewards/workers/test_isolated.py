"""A user's reward in processes of its own: a completion that breaks it is counted and named, the others are scored."""

import inspect
import math
import re
import time
import traceback

import pytest
import torch

from coterie.errors import UserError
from coterie.recipe.settings import RewardSpec
from coterie.rewards.load import load_rewards
from coterie.rewards.score import score
from coterie.types import Completion, Group, Prompt

REWARDS = """
import asyncio, os, time

def mixed(prompts, completions, letter, bonus=0.0):
    (text,), (own,) = completions, letter
    if text == "sleep":
        time.sleep(1000)
    if text == "spin":
        sum(range(10**12))
    if text == "raise":
        raise KeyError("lost")
    if text == "die":
        os._exit(9)
    special = {"nan": [float("nan")], "inf": [float("inf")], "string": ["1.0"], "few": [], "number": 1.0, "none": [None],
               "failure": [ValueError("inside")]}
    return special.get(text, [len(text) + bonus + (own == "b")])

async def slowly(completions, scale):
    await asyncio.sleep(0.01)
    return [scale[1] * len(text) for text in completions]

class Holder:
    def __init__(self):
        self.values = []

def imported_only_here(completions):
    return [float(os.getpid() == HOME) for _ in completions]

HOME = os.getpid()
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "own.py").write_text(REWARDS)
    made = []

    def one(name, **settings):
        spec = RewardSpec(function=f"{tmp_path}/own.py:{name}", workers=2, **settings)
        made.extend(load_rewards([spec]))
        return made[-1]

    yield one
    for reward in made:
        reward.close()


def groups(*texts, letter="a"):
    zeros = torch.zeros(1)
    return [
        Group(Prompt(0, "p", [1], {"letter": letter}), [Completion([1], zeros, zeros, "stop", text) for text in texts])
    ]


@pytest.mark.timed
def test_whatever_one_completion_does_the_others_get_theirs(load):
    bad = {
        5: ("sleep", "took longer than 1 s"),
        6: ("spin", "took longer than 1 s"),
        12: ("raise", "raised KeyError: 'lost' (PLACE)"),
        20: ("die", "the worker died: exit status 9"),
        30: ("nan", "returned nan"),
        31: ("inf", "returned inf"),
        40: ("string", "returned the text '1.0', not a number"),
        50: ("few", "returned 0 values for 1 completion"),
        51: ("number", "returned 1.0; a list with a number or None is needed"),
        63: ("failure", "raised ValueError: inside"),
    }
    texts = [bad[i][0] if i in bad else "x" * i for i in range(64)]
    texts[62] = "none"
    began = time.monotonic()
    result = score(groups(*texts, letter="b"), [load("mixed", timeout=1.0, options={"bonus": 0.5})])
    assert time.monotonic() - began < 20
    reasons = {f.completion: re.sub(r"\(.*own\.py, line \d+, in mixed\)", "(PLACE)", f.reason) for f in result.failures}
    assert reasons == {i: reason for i, (_, reason) in bad.items()}
    wanted = [math.nan if i in bad or i == 62 else i + 1.5 for i in range(64)]
    torch.testing.assert_close(result.rewards, torch.tensor([wanted], dtype=torch.float64), equal_nan=True)


def test_what_a_worker_raises_ends_the_run_with_its_traceback(load):
    with pytest.raises(UserError, match=r"KeyError: 'lost' \(.*own\.py, line \d+, in mixed\)") as error:
        score(groups("raise", letter="b"), [load("mixed", options={"bonus": 0.5})], max_failed_share=0.0)
    assert "in mixed\n" in "".join(traceback.format_exception(error.value))


def test_an_async_function_is_awaited_and_its_options_stay_whole(load):
    """A list among the options is no column."""
    result = score(groups("a", "bb"), [load("slowly", options={"scale": [10, 100]})])
    assert result.rewards.tolist() == [[100, 200]]


def test_the_function_runs_in_another_process(load):
    """The file is imported here too, for its signature, but the call is elsewhere."""
    result = score(groups("a", "bb"), [load("imported_only_here")])
    assert result.rewards.tolist() == [[1, 1]]


def test_the_signature_is_the_users(load):
    reward = load("mixed")
    assert list(inspect.signature(reward.function).parameters) == ["prompts", "completions", "letter", "bonus"]
    with pytest.raises(UserError, match="takes no colour"):
        score(groups("a"), [load("slowly", options={"scale": [1, 1], "colour": 1})])


def test_close_ends_the_workers(load):
    reward = load("mixed")
    score(groups("a"), [reward])
    assert reward.function._pool._workers
    reward.close()
    assert not reward.function._pool._workers
