"""Rewards for worked solutions of linear equations: each written step must really follow (R19).

A solution is a chain of equations in one unknown. Every line is compared, in exact fractions, with the equation it has to
follow from; the last line answers. With the weights 6 and 3 a lucky guess gets 6 points, a right and terse solution 8, a
right and complete one 9.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from coterie.rewards.score import completion_text

_MAX_LENGTH = 2000  # characters of a completion that are looked at
_MAX_DIGITS = 12


@dataclass(frozen=True)
class Side:
    """One side of an equation, slope * x + constant; `plain` where no arithmetic is left to do, `divisors` where some is."""

    slope: Fraction
    constant: Fraction
    plain: bool
    divisors: frozenset[Fraction]


@dataclass(frozen=True)
class Equation:
    left: Side
    right: Side

    @property
    def slope(self) -> Fraction:
        return self.left.slope - self.right.slope

    @property
    def solution(self) -> Fraction | None:
        return None if self.slope == 0 else (self.right.constant - self.left.constant) / self.slope

    @property
    def answers(self) -> bool:
        """Whether this is `x = number`."""
        return (
            (self.left.slope, self.left.constant, self.right.slope) == (1, 0, 0)
            and self.left.plain
            and self.right.plain
        )

    @property
    def isolates(self) -> bool:
        """Whether the unknown stands alone on the left, as in `3x = 10 + 5`."""
        return self.left.slope != 0 and self.left.constant == 0 and self.right.slope == 0

    def divides_by(self, slope: Fraction) -> bool:
        """Whether this is `x = something / slope`, not worked out."""
        return self.isolates and self.left.slope == 1 and slope in self.right.divisors


@dataclass(frozen=True)
class Report:
    """What is true of a solution.

    right: its last line is the answer. follows: every equation in it follows. num_steps: lines that get somewhere without
    being the answer: the unknown isolated, or a division by its factor. complete: no step is left out, which are to isolate
    the unknown, to work out that number, to divide, and to work out that one.
    """

    right: bool
    follows: bool
    num_steps: int
    complete: bool


def right_answer(completions: Sequence[Any], equation: Sequence[str], **_: Any) -> list[float]:
    """1 for a completion whose last line is `x = number` with the right number, else 0."""
    return [float(check(e, completion_text(c)).right) for c, e in zip(completions, equation, strict=True)]


def written_steps(completions: Sequence[Any], equation: Sequence[str], **_: Any) -> list[float]:
    """1 for a right solution with every step, 2/3 with some; 0 for a bare answer or where any line does not follow."""
    reports = [check(e, completion_text(c)) for c, e in zip(completions, equation, strict=True)]
    return [(1.0 if r.complete else 2 / 3) if r.right and r.follows and r.num_steps else 0.0 for r in reports]


def all_steps(report: Report) -> bool:
    """Whether a solution is right, follows throughout and leaves nothing out."""
    return report.right and report.follows and report.complete


def check(equation: str, text: str) -> Report:
    """Read a solution line by line. Text before a colon explains; every other line must be an equation."""
    problem = parse_equation(equation)
    assert problem is not None, f"{equation!r} is not a linear equation"
    lines = [line for line in text[:_MAX_LENGTH].splitlines() if line.strip()]
    steps = [parse_equation(re.split("[:：]", line)[-1]) for line in lines]
    known = [step for step in steps if step is not None]
    last = steps[-1] if steps else None
    right = last is not None and last.answers and last.solution == problem.solution
    follows = len(known) == len(steps) and all(step.solution == problem.solution for step in known)
    gets_somewhere = {
        step
        for step in known
        if step != problem and ((step.isolates and step.left.slope != 1) or step.divides_by(problem.slope))
    }
    return Report(right, follows, len(gets_somewhere), _complete(problem, known))


def _complete(problem: Equation, steps: Sequence[Equation]) -> bool:
    """Whether the steps isolate the unknown, work that out, divide, and work that out, in this order."""
    slope = problem.slope
    wanted: list[Callable[[Equation], bool]] = []
    if not (problem.isolates and problem.right.plain):
        wanted.append(lambda step: step.isolates and step.left.slope == slope and not step.right.plain)
        wanted.append(lambda step: step.isolates and step.left.slope == slope and step.right.plain)
    if slope != 1:
        wanted.append(lambda step: step.divides_by(slope))
        wanted.append(lambda step: step.answers)
    for step in steps:
        if wanted and wanted[0](step):
            wanted.pop(0)
    return not wanted


def parse_equation(text: str) -> Equation | None:
    """`3x - 5 = 10`, `x = 15 / 3`: two sides, each a sum of products of numbers and x, linear in it. None if it is not."""
    sides = text.strip().rstrip(".。").split("=")
    if len(sides) != 2:
        return None
    left, right = (_parse_side(side) for side in sides)
    return Equation(left, right) if left is not None and right is not None else None


_TERM = re.compile(r"\s*(?P<sign>[+-])?\s*(?P<body>[\dx](?:[\d\sx]|[*/]\s*-?\s*\d)*)", re.ASCII)
_FACTOR = re.compile(rf"\s*(?P<sign>[*/]?)\s*(?P<minus>-?)\s*(?P<value>\d{{1,{_MAX_DIGITS}}}|x)", re.ASCII)


def _parse_side(text: str) -> Side | None:
    slope = constant = Fraction(0)
    divisors: frozenset[Fraction] = frozenset()
    at = num_terms = num_operations = 0
    while at < len(text) and text[at:].strip():
        term = _TERM.match(text, at)
        product = _parse_product(term["body"]) if term and (term["sign"] or not num_terms) else None
        if term is None or product is None:
            return None
        value = -product.value if term["sign"] == "-" else product.value
        slope, constant = (slope + value, constant) if product.with_x else (slope, constant + value)
        divisors |= product.divisors
        num_operations += product.num_operations
        at = term.end()
        num_terms += 1
    return Side(slope, constant, num_operations == 0 and num_terms == 1, divisors) if num_terms else None


@dataclass(frozen=True)
class _Product:
    value: Fraction
    with_x: bool
    num_operations: int
    divisors: frozenset[Fraction]


def _parse_product(body: str) -> _Product | None:
    """`3x`, `15 / 3`: a number, perhaps times x, and how many operations are left to do. None if malformed."""
    value, with_x, num_operations, at = Fraction(1), False, 0, 0
    divisors = set()
    while body[at:].strip():
        factor = _FACTOR.match(body, at)
        if factor is None or (at == 0 and factor["sign"]):
            return None
        if factor["value"] == "x":
            if with_x or factor["sign"] == "/" or factor["minus"]:
                return None
            with_x = True
        else:
            number = Fraction(factor["minus"] + factor["value"])
            if at and (not factor["sign"] or (factor["sign"] == "/" and number == 0)):
                return None
            value = value / number if factor["sign"] == "/" else value * number
            num_operations += at > 0
            if factor["sign"] == "/":
                divisors.add(number)
        at = factor.end()
    return _Product(value, with_x, num_operations, frozenset(divisors))
