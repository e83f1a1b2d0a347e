"""Rewards for worked solutions: arithmetic in any words, and linear equations.

A claimed equality is checked in exact fractions. A solution is followed by its numbers: a step takes numbers that the
problem or an earlier step gave, and makes a new one. Where each step does one operation, and they lead to the answer,
nothing is left out.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import or_
from typing import Any, Literal, get_args

from coterie.errors import RewardError, UserError
from coterie.rewards.maths.claims import Claim, claims_of, lines_of
from coterie.rewards.maths.expressions import (
    NUMBER,
    Node,
    Operation,
    is_idle,
    is_plain,
    num_operations,
    number_of,
    numbers,
    one_step,
)
from coterie.rewards.maths.linear import Report, all_steps, check, parse_equation
from coterie.rewards.maths.numbers import WORDS_BELOW_100
from coterie.rewards.maths.origins import Origins
from coterie.rewards.text_of import completion_text, prompt_text

Part = Literal["points", "right", "follows", "complete"]
_MAX_CHARACTERS, _MAX_CLAIMS = 50_000, 300  # of a longer solution only the last line is read
_END = 2000  # characters of a text in which its last line is looked for


@dataclass(frozen=True)
class Steps:
    """What a worked solution is worth, from 0 to 1: points, divided by those of a complete one.

    A wrong answer gets 0 points; a right one without steps that lead to it, or with one that does not follow, `guess`; a right
    one whose steps follow and lead to it `terse`; and `whole` if nothing is left out. part: the points, or one of what they are made of, as 0 or 1.
    follows abstains where no step is written.

    The data has the column `equation`, of an equation in x that is linear and has no brackets, or `answer`, a number.
    """

    part: Part = "points"
    guess: float = 6.0
    terse: float = 8.0
    whole: float = 9.0

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise UserError(f"rewards: steps: part is one of {', '.join(get_args(Part))}, got {self.part!r}")
        points = (self.guess, self.terse, self.whole)
        if not all(isinstance(p, int | float) and not isinstance(p, bool) for p in points):
            raise UserError(f"rewards: steps: guess, terse and whole are numbers, got {points}")
        if not 0 <= self.guess <= self.terse <= self.whole or not self.whole:
            raise UserError(f"rewards: steps: 0 <= guess <= terse <= whole, and whole above 0; got {points}")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        equation: Sequence[str | None] | None = None,
        **_: Any,
    ) -> list[float | Exception | None]:
        if answer is None and equation is None:
            raise UserError("reward steps: the data has neither a column answer nor a column equation")
        none = [None] * len(completions)
        rows = zip(prompts, completions, answer or none, equation or none, strict=True)
        return [self._scored(prompt_text(p), completion_text(c), wanted, e) for p, c, wanted, e in rows]

    def _scored(self, prompt: str, text: str, answer: Any, equation: str | None) -> float | Exception | None:
        if equation is not None:
            problem = parse_equation(equation)
            if problem is None or problem.solution is None:
                return RewardError(f"the equation {equation!r:.60} is not linear in x, or has brackets")
            return self._value(check(equation, text))
        wanted = _answer(answer)
        if wanted is None:
            return RewardError(f"the answer {answer!r:.60} is no number")
        return self._value(check_arithmetic(prompt, wanted, text))

    def _value(self, report: Report) -> float | None:
        if self.part == "points":
            return report.points(self.guess, self.terse, self.whole) / self.whole
        if self.part == "follows" and report.follows and not report.num_steps:
            return None
        return float({"right": report.right, "follows": report.follows, "complete": all_steps(report)}[self.part])


def _answer(answer: Any) -> Fraction | None:
    """The number of a data set's answer; of a solution that ends in `#### 18`, as those of GSM8K, that number."""
    return None if isinstance(answer, bool) else number_of(_bare(str(answer)[-_END:].rpartition("####")[2]))


def _bare(text: str) -> str:
    return re.sub(r"[$€£¥￥\s]", "", text).rstrip(".。")


@functools.lru_cache(maxsize=1 << 12)  # several parts ask for the same
def check_arithmetic(prompt: str, answer: Fraction, text: str) -> Report:
    """Follow a solution claim by claim from the numbers of the prompt to the answer."""
    right = final_number(text) == answer
    if len(text) > _MAX_CHARACTERS:
        return Report(right, False, 0, False)
    claims = [claim for line in lines_of(text) for claim in claims_of(line)]
    if len(claims) > _MAX_CLAIMS or not all(claim.holds for claim in claims):
        return Report(right, False, 0, False)
    stated = stated_numbers(prompt)
    trail = _Trail(set(stated), Origins(stated, _CONSTANTS))
    for claim in claims:
        trail.follow(claim)
    complete = trail.num_steps > 0 and not trail.gaps and abs(answer) in trail.reached
    return Report(right, True, trail.num_steps if not right or trail.leads_to(abs(answer)) else 0, complete)


# Of an hour, a day, a week, a year, a dozen; halves, hundreds, thousands. No step is made of these alone.
_CONSTANTS = frozenset(map(Fraction, (1, 2, 7, 10, 12, 24, 60, 100, 365, 1000)))


@dataclass
class _Trail:
    """Which numbers are known, which of them a step has made, and whether one came from nowhere."""

    known: set[Fraction]
    origins: Origins
    num_steps: int = 0
    gaps: bool = False

    def follow(self, claim: Claim) -> None:
        left, right = claim.left, claim.right
        assert left is not None
        assert right is not None
        if not self._knows(left):
            self.gaps |= num_operations(left) > num_operations(right)
        elif num_operations(left) > num_operations(right) and not is_idle(left):
            self.gaps |= not _one_operation_away(claim, left, right)
            self.num_steps += 1
            self.origins.add(left, _numbers_of(right))
            self.known |= _numbers_of(right)
        elif _rewrites_fractions(left, right):
            self.known |= _numbers_of(right)

    @property
    def reached(self) -> set[Fraction]:
        """What steps have made of what the problem states, and have not counted up to."""
        return {number for number in self.origins.made if not self.origins.counted(number)}

    def leads_to(self, answer: Fraction) -> bool:
        """Whether the steps have made the answer, or left one operation to it: true arithmetic beside a guess has not."""
        reached = self.reached
        known = reached.union(self.origins.stated)
        return (
            answer in reached
            or any(answer in (one + other, abs(one - other)) for one in reached for other in known)
            or any(
                answer == one * other or one == answer * other != 0 or other == answer * one != 0
                for one in reached
                for other in known | _CONSTANTS
            )
        )

    def _knows(self, node: Node) -> bool:
        """Whether every number in it is known, and not all of them are constants of anything."""
        stated = [bool(self.known & {abs(number.value), number.written}) for number in numbers(node)]
        common = [abs(number.value) in _CONSTANTS for number in numbers(node)]
        return any(stated) and all(map(or_, stated, common))


def _one_operation_away(claim: Claim, left: Node, right: Node) -> bool:
    """Whether one operation leads from the left side to the right: what is new on the right is the value of one."""
    made = one_step(left)
    if num_operations(right) == 0 or (is_plain(right) and abs(right.value) in made):
        return abs(right.value) in made or (claim.rounded is not None and num_operations(left) == 1)
    return _numbers_of(right) <= made | {abs(number.value) for number in numbers(left)}


def _rewrites_fractions(left: Node, right: Node) -> bool:
    """`6/8 = 3/4`, and part by part, `1/2 + 1/3 = 3/6 + 2/6`."""
    if is_plain(left) or not isinstance(left, Operation) or not isinstance(right, Operation):
        return is_plain(left) and is_plain(right)
    plain = all(is_plain(part) for node in (left, right) for _, part in node.parts)
    return plain and (left.kind, left.values) == (right.kind, right.values)


def _numbers_of(node: Node) -> set[Fraction]:
    """The numbers in it, and its value where it is a fraction."""
    return {abs(number.value) for number in numbers(node)} | ({abs(node.value)} if is_plain(node) else set())


_WORDS = WORDS_BELOW_100 | {
    "hundred": 100, "half": 2, "twice": 2, "double": 2, "pair": 2, "thrice": 3, "triple": 3, "third": 3, "thirds": 3,
    "quarter": 4, "quarters": 4, "fifth": 5, "dozen": 12,
    "一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9, "十": 10, "百": 100, "半": 2,
}  # fmt: skip
_GIVEN = re.compile(rf"(?P<number>{NUMBER})|(?P<word>[A-Za-z]+|[一二两三四五六七八九十百半])", re.ASCII)


def stated_numbers(prompt: str) -> Counter[Fraction]:
    """The numbers that a problem states, in digits or as words up to a hundred, and how often."""
    found: Counter[Fraction] = Counter()
    for match in _GIVEN.finditer(prompt[:_MAX_CHARACTERS]):
        if match["number"] and len(match["number"]) <= 20:
            found[Fraction(match["number"].replace(",", ""))] += 1
        elif match["word"] and match["word"].lower() in _WORDS:
            found[Fraction(_WORDS[match["word"].lower()])] += 1
    return found


_LAST = re.compile(rf"(?<![\d.])(?P<value>[-−]?\s?[$€£¥￥]?(?:{NUMBER})(?:\s?/\s?\d+)?\s?%?)", re.ASCII)
_MARKED = re.compile(
    r"(?:####|answer(?: is)?\s*[:=]?|答案(?:是|为)?\s*[:：=]?|[=:：])\s*(?:\\boxed\{|\*\*)?\s*$", re.IGNORECASE
)


def final_number(text: str) -> Fraction | None:
    """The number that the last line answers with: in a box, after `answer`, `=` or a colon, else the last one in it."""
    lines = [line for line in text[-_END:].splitlines() if line.strip()]
    if not lines:
        return None
    line = lines[-1][-_END:]
    found = list(_LAST.finditer(line))
    marked = [match for match in found if _MARKED.search(line[max(0, match.start() - 40) : match.start()])]
    if not found:
        return None
    value = (marked or found)[-1]["value"].replace("−", "-")
    before = line[: (marked or found)[-1].start()].rstrip()
    minus_is_operation = before[-1:].isdigit() or before[-1:] == ")"  # 7 - 3 ends in 3
    return number_of(_bare(value).lstrip("-") if minus_is_operation else _bare(value))
