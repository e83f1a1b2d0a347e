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
_TOKEN = re.compile(rf"\s*+(?:(?P<number>{NUMBER})|(?P<sign>\*\*|[-+*/^()%]))", re.ASCII)
SIGNS = {"×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "−": "-", "–": "-", "％": "%", "（": "(", "）": ")"}
_PLAIN = str.maketrans(SIGNS)


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

    @property
    def value(self) -> Fraction:
        return _folded(self.kind, self.values)


@dataclass(frozen=True)
class Power:
    base: Node
    exponent: Number
    value: Fraction


Node = Number | Operation | Power


class _UnreadableError(Exception):
    """Not in the grammar, out of bounds, or divided by zero."""


def read(text: str) -> Node | None:
    """The expression that makes up the whole of a text, or None."""
    tokens: list[str] = []
    at = 0
    text = text.strip().translate(_PLAIN)
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or len(tokens) == _MAX_TOKENS:
            return None
        tokens.append(found["number"] or found["sign"])
        at = found.end()
    try:
        return _Reader(tokens).whole()
    except _UnreadableError:
        return None


def number_of(text: str) -> Fraction | None:
    """The value of a text that is one number: `-3`, `1,200`, `2.50`, `3/4`, `20%`."""
    node = read(text)
    return node.value if node is not None and is_plain(node) else None


def is_plain(node: Node) -> bool:
    """Whether it is a number, or a fraction of two."""
    if isinstance(node, Operation):
        return _leaves(node) and (len(node.parts) == 1 or (node.kind, _turned(node)) == ("*", [False, True]))
    return isinstance(node, Number)


def numbers(node: Node) -> list[Number]:
    """All that stand in an expression, exponents left out."""
    if isinstance(node, Number):
        return [node]
    if isinstance(node, Power):
        return numbers(node.base)
    return [number for _, part in node.parts for number in numbers(part)]


def num_operations(node: Node) -> int:
    if isinstance(node, Number):
        return 0
    if isinstance(node, Power):
        return 1 + num_operations(node.base)
    return len(node.parts) - 1 + sum(num_operations(part) for _, part in node.parts)


def one_step(node: Node) -> set[Fraction]:
    """What one operation in it makes of numbers that stand there: 9 of `3 * (4 + 5)`; and 3, 7 and 6 of `1 + 2 + 4 - 1`.

    A run of additions is one operation, and so is a run of multiplications.
    """
    return {abs(value) for value in _made(node)}


def is_idle(node: Node) -> bool:
    """Whether a part of it changes nothing, as in `5 + 0` and `5 * 1`."""
    if isinstance(node, Number):
        return False
    if isinstance(node, Power):
        return node.exponent.value == 1 or is_idle(node.base)
    nothing = Fraction(0 if node.kind == "+" else 1)
    return (len(node.parts) > 1 and nothing in node.values) or any(is_idle(part) for _, part in node.parts)


def _turned(node: Operation) -> list[bool]:
    return [turned for turned, _ in node.parts]


def _leaves(node: Operation) -> bool:
    return all(isinstance(part, Number) for _, part in node.parts)


def _made(node: Node) -> Iterator[Fraction]:
    if isinstance(node, Power) and isinstance(node.base, Number):
        yield node.value
    elif isinstance(node, Power):
        yield from _made(node.base)
    elif isinstance(node, Operation):
        run: list[Fraction] = []
        for (_, part), value in zip(node.parts, node.values, strict=True):
            yield from _made(part)
            run = [*run, value] if _is_leaf(part) else []
            yield from list(accumulate(reversed(run), add if node.kind == "+" else mul))[1:]


def _is_leaf(node: Node) -> bool:
    """A number, one with a sign, or a fraction that is not a whole number, which stays as it is."""
    signed = isinstance(node, Operation) and len(node.parts) == 1 and _leaves(node)
    return isinstance(node, Number) or signed or (is_plain(node) and node.value.denominator != 1)


def _folded(kind: str, values: Sequence[Fraction]) -> Fraction:
    total = Fraction(0 if kind == "+" else 1)
    for value in values:
        total = total + value if kind == "+" else total * value
        _check_size(total)
    return total


def _check_size(value: Fraction) -> None:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise _UnreadableError


class _Reader:
    """sum: product ((+|-) product)*; product: signed ((*|/) signed)*; signed: (+|-) power; power: atom (^ atom)."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def whole(self) -> Node:
        node = self._operation("+")
        if self._at < len(self._tokens):
            raise _UnreadableError
        return node

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._next()
        if not token:
            raise _UnreadableError
        self._at += 1
        return token

    def _operation(self, kind: str) -> Node:
        forward, back = ("+", "-") if kind == "+" else ("*", "/")
        parts = [(False, self._part(kind))]
        while self._next() in (forward, back) or (kind == "*" and self._next() == "("):  # 2(3 + 4)
            turned = self._next() != "(" and self._take() == back
            parts.append((turned, self._part(kind)))
        if len(parts) == 1:
            return parts[0][1]
        return _operation(kind, parts)

    def _part(self, kind: str) -> Node:
        return self._operation("*") if kind == "+" else self._signed()

    def _signed(self) -> Node:
        if self._next() not in ("+", "-"):
            return self._power()
        negative = self._take() == "-"
        node = self._power()
        return _operation("+", [(True, node)]) if negative else node

    def _power(self) -> Node:
        base = self._atom()
        if self._next() not in ("^", "**"):
            return base
        self._take()
        exponent = self._atom()
        if not isinstance(exponent, Number) or exponent.value.denominator != 1 or exponent.value > _MAX_POWER:
            raise _UnreadableError
        value = Fraction(1)
        for _ in range(int(exponent.value)):
            value *= base.value
            _check_size(value)
        return Power(base, exponent, value)

    def _atom(self) -> Node:
        token = self._take()
        if token == "(":
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                raise _UnreadableError
            node = self._operation("+")
            self._depth -= 1
            if self._take() != ")":
                raise _UnreadableError
            return node
        if not token[-1].isdigit() or sum(map(str.isdigit, token)) > _MAX_DIGITS:
            raise _UnreadableError
        value = Fraction(token.replace(",", ""))
        if self._next() == "%":
            self._take()
            return Number(value / 100, value)
        return Number(value, value)


def _operation(kind: str, parts: Sequence[tuple[bool, Node]]) -> Operation:
    values = []
    for turned, part in parts:
        if turned and kind == "*" and part.value == 0:
            raise _UnreadableError
        values.append(part.value if not turned else -part.value if kind == "+" else 1 / part.value)
    made = Operation(kind, tuple(parts), tuple(values))
    _check_size(made.value)
    return made
