"""Whether a completion takes back one of its own steps, the "aha" of a model that checks itself.

A sign to look at, not to pay for: paid for, it is learned as a phrase. Its weight in a recipe is 0.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from coterie.rewards.maths.expressions import NUMBER, number_of
from coterie.rewards.text_of import completion_text

_MAX_CHARACTERS = 100_000  # of a longer completion the beginning is read
_WINDOW = 400  # characters after a marker in which the new claim has to stand
_CHECK_WINDOW = 60  # characters after "wait" in which a word says that only a check follows
_LEFT = 80  # characters before a value in which its left side stands
_MAX_CLAIMS = 50  # before a marker, whose values it may repeat
_NEW_CLAIMS = 3  # after a marker, one of which has to be new


@dataclass(frozen=True)
class SelfCorrection:
    """1 for a completion that revises an earlier step, else 0. For a metric: give it `weight: 0`."""

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(revises(completion_text(completion))) for completion in completions]


# Words that take something back, that stop to think, and that check. The last alone change nothing.
_DENIAL = (
    r"\b(?:(?:that|this|which)(?: is|'s| was|’s) (?:not (?:right|correct)|wrong|incorrect)|(?:made|is|was) an? (?:\w+ )?(?:mistake|error)"
    r"|i was wrong|correction|on second thought|(?:it|that|this) should (?:actually )?(?:be|have been))\b"
    r"|不对|[算弄搞写看]错|我错了|有误|更正|纠正"
)
_PAUSE = (
    r"\b(?:wait|hold on|oops|hmm+|no)\b(?=\s*[,.!…:—-]|\s+(?:a|no|that|this|i)\b)|(?:^|[.!?\n—,-]\s*)actually\b"
    r"|(?<![^\n。！？，,.!?\s])(?:等一下|等等|等下|且慢|慢着)"
)
_CHECK = r"\b(?:re-?)?(?:check|verify|verifying|checking)\b|检查|验算|检验|验证|核对"
_MARKER = re.compile(rf"(?P<denial>{_DENIAL})|(?P<pause>{_PAUSE})", re.IGNORECASE | re.MULTILINE)
_CHECKS = re.compile(_CHECK, re.IGNORECASE)

# A number that something is said to be. One that goes on, as in `x = 15 / 3 + 1`, is no value yet.
_CLAIM = re.compile(
    r"(?:=|≈|\b(?:is|be|get|gives)\b(?:\s(?:now|actually))?:?|应该是|应为|等于|得到|得|是|为)"
    rf"\s{{0,3}}\$?(?P<value>-?\s?(?:{NUMBER})(?:\s?/\s?\d{{1,9}})?)(?![\d.,]*\d)(?!\s{{0,3}}[-+*/×÷^(=])",
)
_ARITHMETIC = re.compile(r"(?<![\d.)])[\d(][\d\s().+\-*/×÷^]*$")
_NAME = re.compile(r"(?:(?<![\w.])(?P<unknown>[A-Za-z]\w?)|(?P<answer>answer|result|答案|结果))\s*$", re.IGNORECASE)
_CHOICE = re.compile(
    r"\b(?:or|if|when|for|case|try|let|suppose|assume|where|either|another|other|second)\b|或|若|当|令|设|如果|假设|情况|另",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Claim:
    """left: what is said to be the value, in one spelling; empty where that is not clear. choice: one of several cases."""

    left: str
    value: Fraction
    start: int
    line: int
    choice: bool


def revises(text: str) -> bool:
    """Whether a later claim takes back an earlier one.

    Either the same left side gets another value (`3 * 4 = 11`, on a later line `3 * 4 = 12`), or words such as "wait"
    or 不对 stand between a claim and a value that was not claimed before. A check that finds nothing to change is no revision.
    """
    text = text[:_MAX_CHARACTERS]
    claims = _claims(text)
    values: dict[str, _Claim] = {}
    for claim in claims:
        known = values.setdefault(claim.left, claim) if claim.left and not claim.choice else claim
        if known.value != claim.value and known.line < claim.line:
            return True
    return any(_takes_back(text, marker, claims) for marker in _MARKER.finditer(text))


def _takes_back(text: str, marker: re.Match[str], claims: Sequence[_Claim]) -> bool:
    """Whether a value that is new stands after a marker, where there was one before it."""
    if marker["pause"] is not None and _CHECKS.search(text, marker.end(), marker.end() + _CHECK_WINDOW):
        return False
    split = bisect_left(claims, marker.start(), key=lambda claim: claim.start)
    before, after = claims[max(0, split - _MAX_CLAIMS) : split], claims[split : split + _NEW_CLAIMS]
    old = {claim.value for claim in before}
    return bool(old) and any(c.value not in old and c.start <= marker.end() + _WINDOW for c in after)


def _claims(text: str) -> list[_Claim]:
    found, line, counted = [], 0, 0
    for match in _CLAIM.finditer(text):
        line += text.count("\n", counted, match.start())
        counted = match.start()
        before = re.split(r"[\n,;，；。:：!?！？]", text[max(0, match.start() - _LEFT) : match.start()])[-1]
        value = number_of(match["value"].replace(" ", ""))
        if value is not None:
            found.append(_Claim(_left(before), value, match.start(), line, bool(_CHOICE.search(before))))
    return found


def _left(before: str) -> str:
    """The expression or the name that a value belongs to, without spaces."""
    arithmetic = _ARITHMETIC.search(before)
    if arithmetic and re.search(r"[-+*/×÷^]", arithmetic.group().strip()):
        return re.sub(r"\s", "", arithmetic.group())
    name = _NAME.search(before)
    whole = name is not None and not before[: name.start()].rstrip().endswith(tuple("+-*/×÷^"))  # of a + b, b is none
    return name.group().strip().lower() if name is not None and whole else ""
