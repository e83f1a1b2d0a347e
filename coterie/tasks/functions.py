"""A small grammar of Python functions, of numbers, lists and texts, and what tells them apart.

Functions that do the same with all inputs that prompts show, or with all that tests use, are one function: the first that the
grammar makes, which is the shortest, stands for all.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from coterie.noise import key
from coterie.tasks.chance import chances

KINDS = {"number": "x", "list": "xs", "text": "s"}  # what a function is given, and how it calls it

_MULTIPLES, _SUMMANDS = range(2, 10), range(1, 21)
_STEPS = {
    "list": ("sorted(_)", "_[::-1]", "_[1:]", "_[:-1]"),
    "text": ("_.upper()", "_[::-1]", "_[1:]", "_[:-1]"),
}
_ENDS = {"list": [f"[{digit}]" for digit in "0789"], "text": [f'"{letter}"' for letter in "stuvwxyz"]}
# What a shown list or text holds at each place. No value stands at two places, or is one that a function adds: where a value
# of the result comes from can be read off it, which is what a small model learns soon.
_SHOWN = {"list": ((3, 4), (5, 6), (1, 2)), "text": ("abcd", "efgh", "ijkl")}


@dataclass(frozen=True)
class Function:
    """One function of the grammar. basic: it is a single step, of which the others are made."""

    kind: str
    expression: str
    basic: bool
    row: int

    @property
    def source(self) -> str:
        return program(self.kind, f"    return {self.expression}")


def program(kind: str, body: str) -> str:
    return f"def f({KINDS[kind]}):\n{body}"


@dataclass(frozen=True)
class Grammar:
    """The functions of one kind on all inputs that prompts and tests may hold.

    inputs: of which the first `num_shown` may stand in a prompt and the others in tests. outputs: by function, then by input.
    alike: by input, then by function: which functions give the same there, as a number with a bit for each function.
    """

    functions: list[Function]
    inputs: list[Any]
    num_shown: int
    outputs: list[list[Any]]
    alike: list[list[int]]

    def draw_inputs(self, function: Function, count: int, keyed: int, *, hidden: bool) -> list[int]:
        """Places of `count` inputs that tell the function from all others, from those to show or from the hidden ones."""
        start, stop = (self.num_shown, len(self.inputs)) if hidden else (0, self.num_shown)
        for attempt in range(10_000):
            places = [start + key(keyed, attempt, number) % (stop - start) for number in range(count)]
            left = functools.reduce(operator.and_, (self.alike[place][function.row] for place in places))
            if left == 1 << function.row and len(set(places)) == count:
                return sorted(places)
        raise AssertionError(f"no {count} inputs tell {function.expression} from all others")


@functools.cache
def grammar(kind: str) -> Grammar:
    """The grammar of a kind, made once: some milliseconds."""
    shown, hidden = _inputs(kind)
    inputs = [*shown, *(value for value in hidden if value not in shown)]
    functions: list[Function] = []
    outputs: list[list[Any]] = []
    known: set[str] = set()
    for expression, basic in _expressions(kind):
        run = eval(f"lambda {KINDS[kind]}: {expression}")  # the grammar's own text, nothing that a model wrote
        row = [run(value) for value in inputs]
        behaviour = {f"shown {row[: len(shown)]}", f"hidden {row[len(shown) :]}"}
        if not behaviour & known and row != inputs:  # one that changes nothing is no task
            known |= behaviour
            functions.append(Function(kind, expression, basic, len(functions)))
            outputs.append(row)
    alike = [_alike([row[place] for row in outputs]) for place in range(len(inputs))]
    return Grammar(functions, inputs, len(shown), outputs, alike)


def _alike(values: Sequence[Any]) -> list[int]:
    """For each value a number whose bits say which values equal it."""
    texts = [repr(value) for value in values]
    bits: dict[str, int] = {}
    for number, text in enumerate(texts):
        bits[text] = bits.get(text, 0) | 1 << number
    return [bits[text] for text in texts]


def _expressions(kind: str) -> Iterator[tuple[str, bool]]:
    """Expressions of a kind's argument, and whether each is a single step; single steps come first."""
    if kind == "number":
        yield from _sums()
        return
    name, ends = KINDS[kind], _ENDS[kind]
    steps = [step.replace("_", name) for step in _STEPS[kind]]
    yield from ((step, True) for step in steps)
    yield from ((f"{end} + {name}", True) for end in ends)
    yield from ((f"{name} + {end}", True) for end in ends)
    yield from ((then.replace("_", step), False) for step in steps for then in _STEPS[kind])
    yield from ((f"{end} + {step}", False) for end in ends for step in steps)
    yield from ((f"{step} + {end}", False) for end in ends for step in steps)
    yield from ((f"{left} + {step} + {right}", False) for left in ends for step in (name, *steps) for right in ends)


def _sums() -> Iterator[tuple[str, bool]]:
    """`x * x + a * x + b` and its parts, with a in 2..9 and b in 1..20."""
    multiples = [f"{number} * x" for number in _MULTIPLES]
    yield from ((term, True) for term in ("x * x", *multiples))
    yield from ((f"x + {number}", True) for number in _SUMMANDS)
    yield from ((f"x * x + {term}", False) for term in (*multiples, *_SUMMANDS))
    yield from ((f"{multiple} + {number}", False) for multiple in multiples for number in _SUMMANDS)
    yield from ((f"x * x + {multiple} + {number}", False) for multiple in multiples for number in _SUMMANDS)


def _inputs(kind: str) -> tuple[list[Any], list[Any]]:
    """Inputs that prompts show, and others that tests use: of several lengths, in any order, with values that repeat."""
    if kind == "number":
        return [0, 100, 1000], [*range(-9, 0), *range(1, 31)]
    shown, hidden = product(*_SHOWN[kind]), _lists(60, (3, 4, 5, 6))
    if kind == "list":
        return [list(values) for values in shown], [[number % 21 - 5 for number in numbers] for numbers in hidden]
    return ["".join(map(str, values)) for values in shown], [
        "".join("abcdefghijkl"[n % 12] for n in numbers) for numbers in hidden
    ]


def _lists(count: int, lengths: Sequence[int]) -> list[list[int]]:
    """Lists of keyed numbers below 1000."""
    rows = [[int(chance * 1000) for chance in row] for row in chances(count, 10, "functions", "hidden")]
    return [row[1 : 1 + lengths[row[0] % len(lengths)]] for row in rows]
