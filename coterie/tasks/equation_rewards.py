"""The rewards of the task `equations`: the right answer, and the steps that lead to it.

With the weights 6 and 3 a lucky guess gets 6 points, a right and terse solution 8, a right and complete one 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coterie.rewards.maths.linear import check
from coterie.rewards.text_of import completion_text


def right_answer(completions: Sequence[Any], equation: Sequence[str], **_: Any) -> list[float]:
    """1 for a completion whose last line is `x = number` with the right number, else 0."""
    return [float(check(e, completion_text(c)).right) for c, e in zip(completions, equation, strict=True)]


def written_steps(completions: Sequence[Any], equation: Sequence[str], **_: Any) -> list[float]:
    """1 for a right solution with every step, 2/3 with some; 0 for a bare answer or where any line does not follow."""
    return [check(e, completion_text(c)).points(0.0, 2 / 3, 1.0) for c, e in zip(completions, equation, strict=True)]
