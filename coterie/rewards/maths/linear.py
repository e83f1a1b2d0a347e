"""Worked solutions of linear equations, read and checked: each written step must really follow.

A solution is a chain of equations in one unknown. Every line is compared, in exact fractions, with the equation it has to
follow from; the last line answers.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

_MAX_LINES, _MAX_LINE = 50, 200  # of a longer completion only the last line is read, and it has no steps
_MAX_DIGITS = 12


@dataclass(frozen=True)
class Term:
    """One product of a sum, `value` or `value * x`. factors: the numbers in it without sign, a divisor as its inverse."""

    value: Fraction
    with_x: bool
    factors: tuple[Fraction, ...]


@dataclass(frozen=True)
class Side:
    """One side of an equation, a sum of terms."""

    terms: tuple[Term, ...]

    @property
    def slope(self) -> Fraction:
        return sum((term.value for term in self.terms if term.with_x), Fraction(0))

    @property
    def constant(self) -> Fraction:
        return sum((term.value for term in self.terms if not term.with_x), Fraction(0))

    @property
    def constants(self) -> Counter[Fraction]:
        """The numbers that stand in the sum, zeros left out."""
        return Counter(term.value for term in self.terms if not term.with_x and term.value)

    @property
    def worked_out(self) -> bool:
        return len(self.terms) == 1 and len(self.terms[0].factors) <= 1


@dataclass(frozen=True)
class Equation:
    left: Side
    right: Side

    @property
    def slope(self) -> Fraction:
        return self.left.slope - self.right.slope

    @property
    def constant(self) -> Fraction:
        """What slope * x is equal to."""
        return self.right.constant - self.left.constant

    @property
    def solution(self) -> Fraction | None:
        return None if self.slope == 0 else self.constant / self.slope

    @property
    def isolated(self) -> bool:
        """Whether the unknown stands alone on the left, as in `3x = 10 + 5`."""
        return self.left.slope != 0 == self.right.slope and all(term.with_x for term in self.left.terms)

    @property
    def worked_out(self) -> bool:
        """Whether this is `3x = 15`: isolated, and no arithmetic is left to do."""
        return self.isolated and len(self.left.terms) == 1 and self.right.worked_out

    @property
    def answers(self) -> bool:
        """Whether this is `x = number`; a number that is not whole may be a fraction in lowest terms."""
        if not (self.isolated and len(self.left.terms) == 1 and self.left.terms[0].factors == ()):
            return False
        value, terms = self.right.constant, self.right.terms
        written = Fraction(abs(value.numerator)), Fraction(1, value.denominator)  # 5 / 2: its factors are 5 and 1/2
        lowest = len(terms) == 1 and Counter(terms[0].factors) == Counter(written)
        return self.left.slope == 1 and (self.right.worked_out or lowest)

    def turned(self) -> Equation:
        """With the unknown on the left, where it stands on the right alone."""
        return Equation(self.right, self.left) if self.left.slope == 0 != self.right.slope else self


@dataclass(frozen=True)
class Report:
    """What is true of a solution.

    right: its last line is the answer. follows: every equation in it follows. num_steps: the different steps it writes, of
    the three below, without the answer. complete: none of them is left out, in order: to move the numbers to one side
    (`3x = 10 + 5`), to work that out (`3x = 15`), to divide (`x = 15 / 3`), and to work that out, which is the answer.
    """

    right: bool
    follows: bool
    num_steps: int
    complete: bool

    def points(self, guess: float, terse: float, whole: float) -> float:
        """Of a wrong answer 0; of a right one by what stands before it."""
        if not self.right:
            return 0.0
        if not (self.follows and self.num_steps):
            return guess
        return whole if self.complete else terse


def all_steps(report: Report) -> bool:
    """Whether a solution is right, follows throughout and leaves nothing out."""
    return report.right and report.follows and report.complete


@functools.lru_cache(maxsize=1 << 14)  # both rewards and the evaluation ask, and completions of a group are often equal
def check(equation: str, text: str) -> Report:
    """Read a solution line by line. Words before a colon explain; every line must end in an equation that follows."""
    problem = parse_equation(equation)
    assert problem is not None, f"{equation!r} is not a linear equation"
    problem = problem.turned()
    lines = [line for line in text.splitlines() if line.strip()]
    last = parse_equation(re.split("[:：]", lines[-1])[-1]) if lines else None
    right = last is not None and last.answers and last.solution == problem.solution
    if len(lines) > _MAX_LINES or any(len(line) > _MAX_LINE for line in lines):
        return Report(right, False, 0, False)
    pieces = [re.split("[:：]", line) for line in lines]
    claims = [piece for parts in pieces for i, piece in enumerate(parts) if "=" in piece or i == len(parts) - 1]
    steps = [parse_equation(claim) for claim in claims]
    known = [step.turned() for step in steps if step is not None]
    follows = len(known) == len(steps) and all(step.solution == problem.solution for step in known)
    return Report(right, follows, *_steps(problem, known))


def _steps(problem: Equation, known: Sequence[Equation]) -> tuple[int, bool]:
    """How many different steps there are, and whether they are all there and in order."""
    slope, constant = problem.slope, problem.constant
    moved = problem.right.constants + Counter({-value: n for value, n in problem.left.constants.items()})
    division = Counter((abs(constant), abs(1 / slope))) if slope else Counter()

    def moves(step: Equation) -> bool:
        return step.isolated and step.slope == slope and step.right.constants == moved and not step.right.worked_out

    def works_out(step: Equation) -> bool:
        return step.worked_out and step.slope == slope and step.constant == constant

    def divides(step: Equation) -> bool:
        terms = step.right.terms
        return step.isolated and step.left.slope == 1 and len(terms) == 1 and Counter(terms[0].factors) == division

    wanted: list[Callable[[Equation], bool]] = []
    if not problem.worked_out:
        wanted += [moves, works_out] if len(list(moved.elements())) > 1 else [works_out]
    if slope != 1:
        wanted.append(divides)
    needed = [step for step in wanted if not (step is works_out and slope == 1)]  # that one is the answer
    num_steps = sum(any(step(line) for line in known) for step in needed)
    wanted.append(lambda step: step.answers)
    for line in known:
        while wanted and wanted[0](line):
            wanted.pop(0)
    return num_steps, not wanted and bool(num_steps)


def parse_equation(text: str) -> Equation | None:
    """`3x - 5 = 10`, `x = 15 / 3`: two sides, each a sum of products of numbers and x, linear in it. None if it is not."""
    sides = text.strip().rstrip(".。").split("=") if len(text) <= _MAX_LINE else []
    if len(sides) != 2:
        return None
    left, right = (_parse_side(side) for side in sides)
    return Equation(left, right) if left is not None and right is not None else None


_NUMBER = r"\d+(?:\.\d+)?"
_FACTOR = rf"(?:{_NUMBER}x?|x)"
_TERM = re.compile(rf"[-+]?{_FACTOR}(?:[*/]-?{_FACTOR})*+", re.ASCII)
_SIDE = re.compile(rf"{_TERM.pattern}(?:(?=[-+]){_TERM.pattern})*+", re.ASCII)
_SPACE = re.compile(r"(?<![\d.\s])\s++|\s++(?![\d.])", re.ASCII)  # not what keeps two numbers apart


def _parse_side(text: str) -> Side | None:
    text = _SPACE.sub("", text)
    if not _SIDE.fullmatch(text) or any(len(number) > _MAX_DIGITS for number in re.findall(_NUMBER, text)):
        return None
    terms = [_parse_term(term) for term in _TERM.findall(text)]
    return None if None in terms else Side(tuple(term for term in terms if term is not None))


def _parse_term(text: str) -> Term | None:
    """A product: `3x`, `15 / 3`, `2 * -x`. None if it is not linear, or divides by zero."""
    factors = [(sign, Fraction(number)) for sign, number in re.findall(rf"(/?)-?({_NUMBER})", text)]
    if text.count("x") > 1 or re.search("/-?x", text) or ("/", 0) in factors:
        return None
    numbers = tuple(1 / number if sign else number for sign, number in factors)
    return Term(math.prod(numbers, start=Fraction((-1) ** text.count("-"))), "x" in text, numbers)
