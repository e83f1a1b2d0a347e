"""Sums and differences of numbers of up to two digits, asked in words: what a small pretrained model gets wrong, and can learn.

`What is 47 plus 38?` with numbers from 2 to 99. The same 400 problems are held out in every run, and none of them is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from coterie.models.codec import Codec
from coterie.noise import key, permutation
from coterie.rewards.maths.extract import final_answer
from coterie.rewards.maths.values import equal
from coterie.tasks.base import Encoded, Task
from coterie.tasks.draw import draw
from coterie.tasks.words import make_word_tokenizer
from coterie.types import Messages, Prompt, Scored, entries_of

_NUMBERS = range(2, 100)
_SIGNS = {"plus": "+", "minus": "-"}
_NUM_HELDOUT, _NUM_TRAIN = 400, 4_000
_ASKED = re.compile(rf"(-?\d+)\s*({'|'.join(_SIGNS)}|[-+])\s*(-?\d+)")


@dataclass(frozen=True)
class Sum:
    """One sum or difference."""

    first: int
    operation: str
    second: int

    @property
    def answer(self) -> int:
        return self.first + self.second if self.operation == "plus" else self.first - self.second

    @property
    def question(self) -> str:
        return f"What is {self.first} {self.operation} {self.second}?"

    @property
    def worked(self) -> str:
        return f"{self.first} {_SIGNS[self.operation]} {self.second} = {self.answer}"


def sums() -> tuple[list[Sum], list[Sum]]:
    """What is trained on, and what is held out: the same in every run."""
    every = [Sum(a, operation, b) for a in _NUMBERS for operation in _SIGNS for b in _NUMBERS]
    order = [every[place] for place in permutation(len(every), "arithmetic")[: _NUM_HELDOUT + _NUM_TRAIN]]
    return order[_NUM_HELDOUT:], order[:_NUM_HELDOUT]


class Arithmetic(Task):
    """The task. Prompts are chats where the tokenizer has a chat template; the column `answer` is what the reward `answer` reads."""

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec)
        train, heldout = sums()
        self.train, self.heldout = self._prompts(train), self._prompts(heldout)
        self.examples = self.heldout[:2]

    def _prompts(self, of: list[Sum]) -> list[Prompt]:
        prompts = []
        for number, problem in enumerate(of):
            columns = {"answer": str(problem.answer), "worked": problem.worked}
            prompts.append(Prompt(number, *self._codec.encode_user(problem.question), columns))
        return prompts

    def demonstrations(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """Each problem with its answer: `47 + 38 = 85`."""
        drawn = draw(self, count, seed=seed, step=step)
        return [self.encoded(prompt.content, prompt.columns["worked"]) for prompt in drawn]

    def preferences(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """The right answer beside one that is off by up to 9."""
        return [self._pair(prompt, seed, step) for prompt in draw(self, count, seed=seed, step=step)]

    def heldout_preferences(self, count: int, *, seed: int) -> list[Encoded]:
        chosen = permutation(len(self.heldout), seed, "heldout preferences")[:count]
        return [self._pair(self.heldout[place], seed, 0) for place in chosen]

    def _pair(self, prompt: Prompt, seed: int, step: int) -> Encoded:
        sum_, _, answer = prompt.columns["worked"].rpartition(" ")
        off = key(seed, "preferences", step, prompt.text) % 18 - 9
        wrong = int(answer) + (off if off < 0 else off + 1)
        return self.encoded(prompt.content, prompt.columns["worked"], f"{sum_} {wrong}")

    def asked(self, text: str) -> str | Messages:
        return self._codec.encode_user(text)[0]

    def columns_of(self, text: str) -> Mapping[str, Any] | None:
        """Of any sum or difference of two numbers, in words or signs."""
        found = _ASKED.search(text)
        if found is None:
            return None
        operation = {"+": "plus", "-": "minus"}.get(found[2], found[2])
        problem = Sum(int(found[1]), operation, int(found[3]))
        return {"answer": str(problem.answer), "worked": problem.worked}

    def judge(self, scored: Scored) -> Mapping[str, list[bool]]:
        """Whether a completion gives the right answer, alone or behind its sum (`47 + 38 = 85`), as the reward `answer` reads it."""
        told = [(p.columns["answer"], final_answer(c.text)) for p, c in entries_of(scored.groups)]
        return {"accuracy": [equal(right, answer.rpartition("=")[2], _is_no_number) for right, answer in told]}


def _is_no_number(right: str, answer: str) -> bool:
    """What only algebra could compare with a number is none: `47 + 38`."""
    return False


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of a fresh model for the task: single characters, a few words, and an end token."""
    return make_word_tokenizer([chr(code) for code in range(32, 127)], ("What is ", " plus ", " minus ", " = "))
