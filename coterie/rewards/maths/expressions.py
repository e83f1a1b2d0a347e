"""Arithmetic as a model writes it: `3 * (4 + 5)`, `1,200 ÷ 4`, `20%`, read with hard bounds and worked out in fractions.

No `eval`: a grammar of a few rules, of bounded length, depth and digits, whose powers are small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from operator import add, mul

_MAX_TOKENS, _MAX_DEPTH, _MAX_DIGITS = 60, 20, 15
_MAX_POWER, _MAX_BITS = 12, 1024

NUMBER = r"(?:\d{1,3}(?:,\d{3})++(?!\d)(?:\.\d++)?|\d++(?:\.\d++)?|\.\d++)"
SIGNS = {"×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "−": "-", "–": "-", "％": "%", "（": "(", "）": ")"}
_TOKEN = re.compile(
    rf"(?P<number>{NUMBER})|(?P<sign>\*\*|[-+*/^()%])|(?P<equals>[=≈])|(?P<word>(?u:[^\W\d_]++))|(?P<stop>(?u:\S))",
    re.ASCII,
)
_PLAIN = str.maketrans(SIGNS)


@dataclass(frozen=True)
class Token:
    kind: str  # number, sign, equals, word or stop
    text: str
    spaced: bool  # whether a space stands before it
    has_unit: bool = False


@dataclass(frozen=True)
class Number:
    """A number as it stands in a text. written: before a percent sign, what it would be without."""

    value: Fraction
    written: Fraction


@dataclass(frozen=True)
class Operation:
    """A sum or a product of parts. Each part counts as it is, or turned round: taken away, or divided by."""

    kind: str  # + or *
    parts: tuple[tuple[bool, Node], ...]
    values: tuple[Fraction, ...]  # of the parts, turned round where they are
    value: Fraction


@dataclass(frozen=True)
class Power:
    base: Node
    exponent: Number
    value: Fraction


Node = Number | Operation | Power


class _UnreadableError(Exception):
    """Not in the grammar, or out of bounds."""


def tokens(text: str) -> Iterator[Token]:
    """Numbers, signs and words; any other character alone."""
    end = 0
    for found in _TOKEN.finditer(text):
        yield Token(str(found.lastgroup), found[0], found.start() > end)
        end = found.end()


def parse(words: Sequence[str]) -> Node | None:
    """The expression that all of these tokens are, or None."""
    depths = accumulate((word == "(") - (word == ")") for word in words)
    if len(words) > _MAX_TOKENS or max(depths, default=0) > _MAX_DEPTH:
        return None
    try:
        return _Reader(words).whole()
    except (_UnreadableError, ZeroDivisionError):
        return None


def number_of(text: str) -> Fraction | None:
    """The value of a text that is one number: `-3`, `1,200`, `2.50`, `3/4`, `20%`."""
    node = read(text)
    return node.value if node is not None and is_plain(node) else None


def read(text: str) -> Node | None:
    """The expression that makes up the whole of a text, or None."""
    return parse([token.text for token in tokens(text.translate(_PLAIN))])


def is_plain(node: Node) -> bool:
    """Whether it is a number, or a fraction of two."""
    if not isinstance(node, Operation):
        return isinstance(node, Number)
    is_fraction = node.kind == "*" and [turned for turned, _ in node.parts] == [False, True]
    return all(isinstance(part, Number) for part in _children(node)) and (len(node.parts) == 1 or is_fraction)


def numbers(node: Node) -> list[Number]:
    """All that stand in an expression, exponents left out."""
    return [node] if isinstance(node, Number) else [one for child in _children(node) for one in numbers(child)]


def num_operations(node: Node) -> int:
    own = len(node.parts) - 1 if isinstance(node, Operation) else int(isinstance(node, Power))
    return own + sum(map(num_operations, _children(node)))


def is_idle(node: Node) -> bool:
    """Whether a part of it changes nothing, as in `5 + 0` and `5 * 1`."""
    if isinstance(node, Operation):
        own = len(node.parts) > 1 and (0 if node.kind == "+" else 1) in node.values
    else:
        own = isinstance(node, Power) and node.exponent.value == 1
    return own or any(map(is_idle, _children(node)))


def one_step(node: Node) -> set[Fraction]:
    """What one operation in it makes of numbers that stand there: 9 of `3 * (4 + 5)`; and 3, 7 and 6 of `1 + 2 + 4 - 1`.

    A run of additions is one operation, and so is a run of multiplications.
    """
    made = set().union(*map(one_step, _children(node)))
    if isinstance(node, Power) and isinstance(node.base, Number):
        made.add(abs(node.value))
    elif isinstance(node, Operation):
        run: list[Fraction] = []
        for part, value in zip(_children(node), node.values, strict=True):
            run = [*run, value] if _is_leaf(part) else []
            made.update(map(abs, list(accumulate(reversed(run), _FOLDS[node.kind]))[1:]))
    return made


_FOLDS = {"+": add, "*": mul}


def _is_leaf(node: Node) -> bool:
    """A number, one with a sign, or a fraction that is not a whole number, which stays as it is."""
    is_one = isinstance(node, Number) or (isinstance(node, Operation) and len(node.parts) == 1)
    return is_plain(node) and (is_one or node.value.denominator != 1)


def _children(node: Node) -> list[Node]:
    if isinstance(node, Operation):
        return [part for _, part in node.parts]
    return [node.base] if isinstance(node, Power) else []


class _Reader:
    """sum: product ((+|-) product)*; product: signed ((*|/) signed)*; signed: (+|-) power; power: atom (^ atom)."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [*words, ""]
        self._at = 0

    def whole(self) -> Node:
        node = self._sum()
        if self._words[self._at]:
            raise _UnreadableError
        return node

    def _take(self, *wanted: str) -> str:
        """The next token where it is one of these, which is then behind; else the empty text."""
        found = self._words[self._at]
        if found not in wanted:
            return ""
        self._at += 1
        return found

    def _sum(self) -> Node:
        parts = [(False, self._product())]
        while sign := self._take("+", "-"):
            parts.append((sign == "-", self._product()))
        return _operation("+", parts)

    def _product(self) -> Node:
        parts = [(False, self._signed())]
        while (sign := self._take("*", "/")) or self._words[self._at] == "(":  # 2(3 + 4)
            parts.append((sign == "/", self._signed()))
        return _operation("*", parts)

    def _signed(self) -> Node:
        sign = self._take("+", "-")
        return _operation("+", [(sign == "-", self._power())])

    def _power(self) -> Node:
        base = self._atom()
        if not self._take("^", "**"):
            return base
        exponent = self._atom()
        if not isinstance(exponent, Number) or exponent.value.denominator != 1 or exponent.value > _MAX_POWER:
            raise _UnreadableError
        return Power(base, exponent, _bounded(base.value ** int(exponent.value)))

    def _atom(self) -> Node:
        if self._take("("):
            node = self._sum()
            if not self._take(")"):
                raise _UnreadableError
            return node
        word = self._words[self._at]
        if not (word.isascii() and word[-1:].isdigit()) or sum(map(str.isdigit, word)) > _MAX_DIGITS:
            raise _UnreadableError
        self._at += 1
        value = Fraction(word.replace(",", ""))
        return Number(value / 100 if self._take("%") else value, value)


def _operation(kind: str, parts: Sequence[tuple[bool, Node]]) -> Node:
    """A part alone is itself, unless it is turned round."""
    if len(parts) == 1 and not parts[0][0]:
        return parts[0][1]
    turn = (lambda value: -value) if kind == "+" else (lambda value: 1 / value)
    values = tuple(turn(part.value) if turned else part.value for turned, part in parts)
    *_, total = map(_bounded, accumulate(values, _FOLDS[kind]))
    return Operation(kind, tuple(parts), values, total)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise _UnreadableError
    return value
