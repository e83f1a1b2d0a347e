"""Is an output right? Compared here, in the process that is trusted, with what is expected, which no sandbox ever sees.

An output is data (Output.value): it can't answer for itself, so there is no `__eq__` to forge, and every type is what it says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.errors import UserError
from coterie.sandbox.base import Output

_MISSING = object()
_ROUNDING = 1e-4  # of the tolerance, where there is nothing to be relative to


@dataclass(frozen=True)
class Equality:
    """What counts as equal.

    tolerance: between floats, relative to the expected one. Where 0.0 is expected, a ten-thousandth of the tolerance times the
    largest float of the test, at least 1: what rounding leaves of numbers of that size. ints_are_floats: 2 is 2.0; a bool never is a
    number. tuples_are_lists: (1, 2) is [1, 2], which JSON can't tell apart. exact_text: what is printed is compared to the last
    blank; otherwise blanks at the ends of lines and empty lines at the end are passed over.
    """

    tolerance: float = 1e-9
    ints_are_floats: bool = False
    tuples_are_lists: bool = True
    exact_text: bool = False


@dataclass(frozen=True)
class Test:
    """One test: what goes in, and what has to come out. whole: both are texts, of the program's standard input and output."""

    __test__ = False  # no test for pytest

    given: Any
    expected: Any
    whole: bool


def read_tests(tests: Any) -> list[Test]:
    """The tests of a row: {"args": [...], "expected": ...} or {"stdin": "...", "stdout": "..."}, all of one kind.

    A text is read as JSON. Raises UserError for anything else.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise UserError(f"code: the column tests is no JSON: {error}") from error
    if not isinstance(tests, Sequence) or not tests:
        raise UserError(f"code: a row's tests must be a list with at least one test, not {tests!r:.80}")
    read = [_read_test(test) for test in tests]
    if len({test.whole for test in read}) > 1:
        raise UserError("code: the tests of a row must all have args and expected, or all stdin and stdout")
    return read


def _read_test(test: Any) -> Test:
    if isinstance(test, Mapping) and set(test) == {"args", "expected"} and isinstance(test["args"], list | tuple):
        return Test(list(test["args"]), test["expected"], whole=False)
    if (
        isinstance(test, Mapping)
        and set(test) == {"stdin", "stdout"}
        and all(isinstance(t, str) for t in test.values())
    ):
        return Test(test["stdin"], test["stdout"], whole=True)
    raise UserError(
        f'code: a test is {{"args": [...], "expected": ...}} or {{"stdin": "...", "stdout": "..."}}, not {test!r:.120}'
    )


def passes(output: Output, test: Test, equality: Equality) -> bool:
    """Whether the program gave what the test expects. An error never is right, whatever is expected."""
    if output.error is not None:
        return False
    if test.whole:
        return _lines(output.text, equality) == _lines(test.expected, equality)
    try:
        return equal(output.value, test.expected, equality, scale=_largest_float([test.given, test.expected]))
    except RecursionError:
        return False


def _lines(text: str, equality: Equality) -> str | list[str]:
    return text if equality.exact_text else [line.rstrip() for line in text.rstrip().split("\n")]


def _largest_float(value: Any) -> float:
    """In size, of those anywhere in a test."""
    if isinstance(value, float):
        return abs(value) if math.isfinite(value) else 0.0
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return max(map(_largest_float, inner), default=0.0)


def equal(value: Any, expected: Any, equality: Equality, *, scale: float = 1.0) -> bool:
    """Whether a value as Output holds it is `expected`, a value of Python. Types must agree as `equality` says.

    scale: the size of the floats that it comes from, for what rounding leaves where 0.0 is expected. Raises UserError where
    something is expected that no output can be.
    """
    return _same(value, _as_output(expected), equality, scale)


def _as_output(expected: Any, *, is_key: bool = False) -> Any:
    """A value of Python as Output would hold it. is_key: it is one of a dict, or in a set."""
    if expected is None or isinstance(expected, bool | int | float | str):
        return expected
    if isinstance(expected, tuple):
        return {"tuple": [_as_output(inner, is_key=is_key) for inner in expected]}
    if isinstance(expected, list) and not is_key:
        return [_as_output(inner) for inner in expected]
    if isinstance(expected, set | frozenset) and not is_key:
        return {"set": [_as_output(inner, is_key=True) for inner in expected]}
    if isinstance(expected, Mapping) and not is_key:
        return {"dict": [[_as_output(key, is_key=True), _as_output(inner)] for key, inner in expected.items()]}
    what = "the key of an expected dict or set" if is_key else "an expected value"
    raise UserError(f"code: {what} can't be a {type(expected).__name__}; numbers, texts, lists and dicts can")


def _same(value: Any, expected: Any, equality: Equality, scale: float) -> bool:
    """Costs no more than a walk over `expected`: nothing is put into a dict or a set whose hashes the program could choose."""
    if expected is None or isinstance(expected, bool | str):
        return type(value) is type(expected) and bool(value == expected)
    if isinstance(expected, int | float):
        return _equal_numbers(value, expected, equality, scale)
    (kind, items), (wanted_kind, wanted) = _opened(value), _opened(expected)
    alike = equality.tuples_are_lists and {kind, wanted_kind} == {"list", "tuple"}
    if (kind != wanted_kind and not alike) or len(items) != len(wanted):
        return False
    if kind == "set":
        return set(map(_key, items)) == set(map(_key, wanted))
    if kind != "dict":
        return all(_same(one, other, equality, scale) for one, other in zip(items, wanted, strict=True))
    by_key = {_key(key): inner for key, inner in wanted}
    for pair in items:
        if not isinstance(pair, list) or len(pair) != 2:
            return False
        inner = by_key.pop(_key(pair[0]), _MISSING)
        if inner is _MISSING or not _same(pair[1], inner, equality, scale):
            return False
    return not by_key


def _equal_numbers(value: Any, expected: float, equality: Equality, scale: float) -> bool:
    if type(value) not in (int, float) or (type(value) is not type(expected) and not equality.ints_are_floats):
        return False
    if type(value) is int and type(expected) is int:
        return value == expected
    try:
        one, other = float(value), float(expected)
    except OverflowError:
        return False
    if math.isnan(other):
        return math.isnan(one)
    if math.isinf(one) or math.isinf(other):
        return one == other
    near = equality.tolerance * (abs(other) or _ROUNDING * max(scale, 1.0))
    return abs(one - other) <= near


def _opened(value: Any) -> tuple[str, list[Any]]:
    """Which container a value of Output is, and what is in it. ("", []) for everything else."""
    if isinstance(value, list):
        return "list", value
    if isinstance(value, dict) and len(value) == 1:
        ((kind, items),) = value.items()
        if kind in ("tuple", "set", "dict") and isinstance(items, list):
            return kind, items
    return "", []


def _key(value: Any) -> str:
    """A text that stands for a value of Output, the same for the same value and type: 1, 1.0 and True differ."""
    return json.dumps(value, sort_keys=True)
