"""What of comparing answers needs algebra. Runs in workers only: it imports sympy, and a text can make it spin.

math-verify's grammar reads the LaTeX, which never goes through Python's eval. Sets and inequalities are then compared by math-verify,
and expressions by their values, at points that are always the same and to 60 digits: math-verify rounds, so that a small difference
would be none, and simplifies, which misses many equal forms.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
from math_verify import verify

from coterie.rewards.maths.tidy import CLOSE, OPEN
from coterie.rewards.maths.values import AND, NAME, OR, PREFIXED, REALS, SIGNS, brackets, equal, is_region, parts, split

logging.getLogger("math_verify").setLevel(logging.CRITICAL)

_TIDYING = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_READING = ConversionConfig(lowercase_symbols=False)
_DIGITS = 60
_CLOSE = sympy.Rational(1, 10**45)
_NOTHING = sympy.Rational(1, 10**150)  # what is left of an exact zero after evaluation
_MAX_LOG = 200_000.0  # bits of the largest number that is worked out
_MAX_DEPTH = 30  # of brackets in one another
_SIGNS = (1, -1)
_POINTS = [(1, 0)] * 3 + [(size, sign) for size in (1, 10, 100, 10**4, 10**7) for sign in _SIGNS]
_WHOLE_POINTS = [(2, 0)] * 2 + [(size, sign) for size in (20, 1000) for sign in _SIGNS]  # where others have no value
_MIN_POINTS = 3


class TooLargeError(Exception):
    """A number in the expression has too many digits to be worked out."""


class UnreadableError(Exception):
    """The text is no mathematics that can be read."""


def compare(gold: str, answer: str | None, unevaluated: bool = False) -> str:
    """`equal`, `unequal`, or `unreadable` where it is the gold that can't be read. answer: None asks for that alone."""
    if answer is None:
        try:
            for text in parts(gold):
                _read(text)
        except (UnreadableError, TooLargeError):
            return "unreadable"
        return "equal"
    try:
        return "equal" if equal(gold, answer, same_value, unevaluated=unevaluated) else "unequal"
    except Exception:  # sympy raises what it likes at what a model wrote, which must not escape its low reward by that
        return "unequal"


def _read(text: str) -> Any:
    return read_set(text) if is_region(text) else read_latex(text)


@functools.lru_cache(maxsize=512)
def read_latex(text: str) -> Any:
    """The sympy object of a tidied text. Raises UnreadableError and TooLargeError."""
    text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?", r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = text.replace(OPEN, r"\{").replace(CLOSE, r"\}")
    text = re.sub(r"_(\d)(?!\d)", r"_{\1}", text)
    text = re.sub(r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}", text)
    text = re.sub(r"(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])", r"(\1+\\frac{\2}{\3})", text)
    if "matrix" not in text and re.search(r"(?<![\\A-Za-z{])[A-Za-z]{4,}", text):
        raise UnreadableError  # words: letter by letter they would be a product
    if re.search("[^\x00-\x7f]|[\"'`#$&]|__", text) and "matrix" not in text:
        raise UnreadableError
    if re.search(r"\d\s+[\d.]", text) or PREFIXED.search(text):
        raise UnreadableError  # `1 2` is no number, and `0x1F` no product
    depths = accumulate((character in "([{") - (character in ")]}") for character in text)
    if max(depths, default=0) > _MAX_DEPTH:
        raise TooLargeError  # the grammar takes seconds for it
    if re.search(r"\\sqrt\s*\[[^\]]*\^", text):
        raise TooLargeError  # sympy works out the index of a root while it reads
    try:
        found = latex2sympy(
            text, is_real=True, convert_degrees=False, normalization_config=_TIDYING, conversion_config=_READING
        )
    except Exception as error:  # a grammar, and sympy behind it, which raise what they like
        raise UnreadableError from error
    if not isinstance(found, sympy.Basic | sympy.MatrixBase):
        raise UnreadableError
    check_size(found)  # before anything in it is put together anew, which works it out
    known = {value: sympy.Rational(str(value)) for value in found.atoms(sympy.Float)}
    known |= {symbol: sympy.I for symbol in found.free_symbols if symbol.name == "i"}
    return found.xreplace(known) if known else found


def read_set(text: str) -> sympy.Set:
    """The real numbers that a solved inequality, an interval, a set or a union of them stands for."""
    pieces = (sympy.Intersection(sympy.S.Reals, *map(_piece, AND.split(either))) for either in OR.split(text))
    return sympy.Union(*pieces)


_HALVES = {
    "<": lambda end: sympy.Interval.open(-sympy.oo, end), r"\le": lambda end: sympy.Interval(-sympy.oo, end),
    ">": lambda end: sympy.Interval.open(end, sympy.oo), r"\ge": lambda end: sympy.Interval(end, sympy.oo),
    "=": sympy.FiniteSet, r"\ne": lambda end: sympy.S.Reals - sympy.FiniteSet(end),
}  # fmt: skip
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def _piece(text: str) -> sympy.Set:
    text = re.sub(rf"^\s*(?:{NAME})\s*\\in(?![a-z])", "", text).strip(" ,")
    left, *without = re.split(rf"\\setminus|\\backslash|-\s*(?={OPEN})", text)
    if without:
        return _piece(left) - _piece(without[0])
    around, inner = brackets(text), split(text[1:-1])
    if around == OPEN + CLOSE:
        return sympy.FiniteSet(*map(read_latex, inner))
    if around and len(inner) == 2:
        return sympy.Interval(*map(read_latex, inner), around[0] == "(", around[1] == ")")
    if REALS.fullmatch(text):
        return sympy.S.Reals
    sides = [side.strip() for side in SIGNS.split(text)]
    halves = []
    for low, sign, high in zip(sides[::2], sides[1::2], sides[2::2], strict=False):
        sign, end = (sign, high) if re.fullmatch(NAME, low) else (_FLIPPED.get(sign, sign), low)
        halves.append(_HALVES[sign](read_latex(end)))
    if not halves:
        raise UnreadableError
    return sympy.Intersection(*halves)


def same_value(gold: str, answer: str) -> bool:
    """Whether two texts that are neither lists nor points have the same value. Raises UnreadableError and TooLargeError."""
    one, other = (_read(text) for text in (gold, answer))
    matrices = [isinstance(each, sympy.MatrixBase | sympy.MatrixExpr) for each in (one, other)]
    if any(matrices):  # first: a number times a matrix is an Expr to sympy
        return all(matrices) and _same_matrix(one.doit(), other.doit())
    if isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr):
        return _same_expression(one, other)
    if isinstance(one, sympy.Eq) and isinstance(other, sympy.Eq):
        return _same_equation(one, other)
    if isinstance(one, sympy.Expr) or isinstance(other, sympy.Expr):
        return False
    return bool(verify(one, other, allow_set_relation_comp=True, float_rounding=15, timeout_seconds=None))


def check_size(expression: Any) -> None:
    """Raises TooLargeError where working it out would make a number of more than `_MAX_LOG` bits."""
    for entry in expression.flat() if isinstance(expression, sympy.MatrixBase) else [expression]:
        _log_size(entry)


def _log_size(expression: Any) -> float:
    """About how many bits the magnitude of a value has, symbols taken as small."""
    if isinstance(expression, sympy.Rational):
        return float(max(abs(expression.p), expression.q).bit_length())
    if isinstance(expression, sympy.Float):
        return abs(float(expression._mpf_[2])) + float(expression._mpf_[3]) + 1.0
    if isinstance(expression, sympy.NumberSymbol):  # above 2, which tells in a tower of them
        return 2.0
    sizes = [_log_size(argument) for argument in expression.args]
    size = sum(sizes) + 1.0
    if isinstance(expression, sympy.Pow) and expression.args == (0, 0):
        raise UnreadableError
    if isinstance(expression, sympy.Pow | sympy.exp):
        base, exponent = 2.0 if isinstance(expression, sympy.exp) else max(sizes[0], 1.0), expression.args[-1]
        size = base * (max(1.0, float(abs(exponent))) if exponent.is_Rational else 2.0 ** min(sizes[-1], 60.0))
    elif isinstance(expression, sympy.factorial | sympy.factorial2 | sympy.gamma | sympy.binomial):
        size = 2.0 ** min(max(sizes), 60.0) * max(max(sizes), 1.0)
    if size > _MAX_LOG or not math.isfinite(size):
        raise TooLargeError
    return size


def _same_matrix(one: Any, other: Any) -> bool:
    if one.shape != other.shape:
        return False
    return all(_same_expression(a, b) for a, b in zip(one.flat(), other.flat(), strict=True))


def _same_equation(one: Any, other: Any) -> bool:
    """Whether the difference of the sides of one is a multiple of the other's."""
    first, second = one.lhs - one.rhs, other.lhs - other.rhs
    if not (first.free_symbols and second.free_symbols):
        return _same_expression(one.lhs, other.lhs) and _same_expression(one.rhs, other.rhs)
    ratio = None
    for a, b in _values(first, second):
        zeros = [abs(each) < _NOTHING for each in (a, b)]
        if all(zeros):
            continue
        if any(zeros) or not _close(a / b, ratio or a / b):
            return False
        ratio = ratio or a / b
    return ratio is not None


def _same_expression(one: Any, other: Any) -> bool:
    if one == other:
        return one is not sympy.zoo and one is not sympy.nan
    return all(_close(a, b) for a, b in _values(one, other))


def _values(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    """What both are worth at the same points. Raises UnreadableError where there are too few at which both have a value."""
    names = {symbol.name for each in (one, other) for symbol in each.free_symbols}
    one, other = one.doit(), other.doit()
    if any(each.atoms(sympy.core.function.AppliedUndef) for each in (one, other)):
        raise UnreadableError
    found, complex_ = 0, any(each.has(sympy.I) for each in (one, other))
    for point in range(len(_POINTS + _WHOLE_POINTS) if names else 1):
        try:
            a, b = (_value(each, point) for each in (one, other))
        except TooLargeError:
            continue
        if a is None or b is None or a.is_real != b.is_real or (names and not a.is_real and not complex_):
            continue  # as of a logarithm left of 0
        found += 1
        yield a, b
    if found < (_MIN_POINTS if names else 1):
        raise UnreadableError


def _value(expression: Any, point: int) -> Any:
    at = {symbol: _coordinate(symbol.name, point) for symbol in expression.free_symbols}
    value = expression.xreplace(at) if at else expression
    if at:
        check_size(value)
    if value.is_Rational or value in (sympy.oo, -sympy.oo):
        return value
    value = value.evalf(_DIGITS)
    if not value.is_number or value.has(sympy.nan, sympy.zoo) or value.atoms(sympy.Sum, sympy.Integral, sympy.Limit):
        return None
    real, imaginary = value.as_real_imag()
    return real if abs(imaginary) <= _CLOSE * abs(real) else value


def _coordinate(name: str, point: int) -> Any:
    """Between a quarter of the point's size and three times that, of the sign that the point gives to this name.

    Small and positive first, since many identities hold there alone; then far from 0 on both sides, where others end.
    """
    size, sign = (*_POINTS, *_WHOLE_POINTS)[point]
    digest = hashlib.sha256(f"{name} {point}".encode()).digest()
    value = sympy.Rational(size * (250 + int.from_bytes(digest[:4], "big") % 2750), 1000)
    flip = hashlib.sha256(f"{name} {point // 2}".encode()).digest()[0] % 2
    value = sympy.ceiling(value) if point >= len(_POINTS) else value
    return -value if sign and (sign < 0) != flip else value


def _close(a: Any, b: Any) -> bool:
    if (a.is_Rational and b.is_Rational) or a.is_infinite or b.is_infinite:
        return bool(a == b)
    size = max(abs(a), abs(b))
    return bool(size < _NOTHING or abs(a - b) <= _CLOSE * size)
