"""Which prompts a step draws: a function of the seed and the step, so that a resume draws the same."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from coterie.noise import permutation
from coterie.tasks.base import Task
from coterie.types import Prompt


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
