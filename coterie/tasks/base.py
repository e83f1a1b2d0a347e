"""What a task is: prompts to train on, held-out prompts, and perhaps demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

from coterie.noise import permutation
from coterie.types import Completion, Group, Messages, Prompt, Scored

Demonstration = tuple[list[int], list[int]]  # prompt and answer tokens
Preference = tuple[list[int], list[int], list[int]]  # prompt, the preferred answer's tokens, the other's


class Task(Protocol):
    """Prompts are drawn by step, so that a resumed run goes on where it was."""

    @property
    def train(self) -> Sequence[Prompt]: ...

    @property
    def heldout(self) -> Sequence[Prompt]: ...

    @property
    def examples(self) -> Sequence[Prompt]: ...

    def demonstrations(self, count: int, *, seed: int, step: int) -> list[Demonstration]:
        """What supervised fine-tuning learns in a step."""
        ...

    def preferences(self, count: int, *, seed: int, step: int) -> list[Preference]:
        """The pairs that DPO or a reward model learns from in a step."""
        ...

    def heldout_preferences(self, count: int, *, seed: int) -> list[Preference]:
        """At most `count` pairs whose prompts are held out."""
        ...

    def asked(self, text: str) -> str | Messages:
        """What a person typed, as the content of a prompt of this task."""
        ...

    def columns_of(self, text: str) -> Mapping[str, Any] | None:
        """What rewards may look at for a prompt that a person typed, or None where the task does not know it."""
        ...

    def judge(self, scored: Scored) -> Mapping[str, list[bool]]:
        """What is counted in an evaluation, by name, for each completion [P * G]; "accuracy" among them if it has one."""
        ...


def draw(task: Task, count: int, *, seed: int, step: int) -> list[Prompt]:
    """The prompts of a step (numbered from 1): every prompt once an epoch, in an order that each epoch shuffles anew."""
    size = len(task.train)
    prompts = []
    for number in range((step - 1) * count, step * count):
        epoch, place = divmod(number, size)
        prompt = task.train[_order(size, seed, epoch)[place]]
        key = epoch * size + prompt.key  # a prompt drawn twice in a step, across epochs, gets noise of its own
        prompts.append(replace(prompt, key=key))
    return prompts


@lru_cache(maxsize=2)  # a step lies in one epoch, or in two
def _order(size: int, seed: int, epoch: int) -> list[int]:
    return permutation(size, seed, "draw", epoch)


def draw_again(task: Task, count: int, *, seed: int, step: int, attempt: int) -> list[Prompt]:
    """More prompts for a step, in place of groups without signal: at random, no prompt twice in an attempt."""
    return [task.train[i] for i in permutation(len(task.train), seed, "redraw", step, attempt)[:count]]


def completions_of(groups: Sequence[Group]) -> list[tuple[Prompt, Completion]]:
    """Every completion with its prompt, in order."""
    return [(group.prompt, completion) for group in groups for completion in group.completions]
