"""The equalities that a text claims: `Tom has 3 + 4 = 7 apples` claims that 3 + 4 is 7.

Words around an expression explain it. A unit between a number and a sign is left out; an equality with an unknown or a
named quantity on a side, as `x = 5`, claims nothing that could be checked here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from coterie.rewards.maths.expressions import SIGNS, Node, Token, is_plain, num_operations, parse, tokens

_MAX_SENTENCE = 1000  # characters; an equals sign in a longer one is a claim that can't be read
_MAX_UNIT = 4  # words between a number and the sign that follows: `3 apples in each box * 4`


@dataclass(frozen=True)
class Claim:
    """Two expressions that should be equal; None for one that is out of bounds, or divided by zero."""

    left: Node | None
    right: Node | None
    rounded: Fraction | None = None  # of `≈`: how far apart they may be

    @property
    def holds(self) -> bool:
        if self.left is None or self.right is None:
            return False
        return abs(self.left.value - self.right.value) <= (self.rounded or 0)


def lines_of(text: str) -> list[str]:
    """Lines, and the sentences in them."""
    return [line for line in re.split(r"\n|(?<=[^\d\s])\.\s|(?<=\d)\.\s(?=\D)|[。；;!?！？]", text) if line.strip()]


def claims_of(line: str) -> list[Claim]:
    """What a line claims, in order. `a = b = c` claims two things."""
    if "=" not in line and "≈" not in line:
        return []
    if len(line) > _MAX_SENTENCE:
        return [Claim(None, None)]
    found = _with_units_dropped(list(tokens(_plain(line))))
    signs = [place for place, token in enumerate(found) if token.kind == "equals"]
    starts, ends = [0, *(sign + 1 for sign in signs)], [*signs, len(found)]
    sides = [found[start:end] for start, end in zip(starts, ends, strict=True)]
    claims = (_claim(*pair, about=found[sign].text == "≈") for sign, pair in zip(signs, pairwise(sides), strict=True))
    return [claim for claim in claims if claim is not None]


_BULLET = re.compile(r"^\s*(?:[-*•]|\(?(?:\d{1,2}|[a-z])[.)、])\s+", re.ASCII)
_LATEX = (
    (re.compile(r"\\(?:times|cdot)\b"), "*"), (re.compile(r"\\div\b"), "/"), (re.compile(r"\\approx\b"), "≈"),
    (re.compile(r"\\[dt]?frac\{([^{}]{1,60})\}\{([^{}]{1,60})\}"), r"((\1)/(\2))"),
    (re.compile(r"\\text\{([^{}]{0,60})\}"), r" \1 "), (re.compile(r"\\(?:left|right|[()\[\],;!])|\\?[$€£¥￥]"), ""),
    (re.compile(r"[<>!=]=|=[<>]|=="), "?"), (re.compile(r"(?<!\S)\*\*(?=\S)|(?<=\S)\*\*(?![\w(-])"), " "),
)  # fmt: skip
_SIGNS = str.maketrans(dict(zip("０１２３４５６７８９＝＋", "0123456789=+", strict=True)) | SIGNS)


def _plain(line: str) -> str:
    """Without the mark of a list, and LaTeX as plain signs."""
    line = _BULLET.sub("", line).translate(_SIGNS)
    for pattern, plain in _LATEX:
        line = pattern.sub(plain, line)
    return line


def _with_units_dropped(line: Sequence[Token]) -> list[Token]:
    """Without the words between a number and a sign; `3 x 4` and `20% of 50` become products."""
    kept: list[Token] = []
    at = 0
    while at < len(line):
        token, after_number = line[at], bool(kept) and (kept[-1].kind == "number" or kept[-1].text in (")", "%"))
        if token.kind == "word" and after_number:
            end = next((end for end in range(at, len(line)) if line[end].kind != "word"), len(line))
            follows = line[end] if end < len(line) else None
            times = end - at == 1 and follows is not None and (follows.kind == "number" or follows.text == "(")
            if times and (token.text in ("x", "X") or (token.text in ("of", "的") and _is_share(kept))):
                kept.append(Token("sign", "*", True))
                at = end
                continue
            unit = end - at <= _MAX_UNIT and not any(_is_unknown(word) for word in line[at:end])
            if unit and follows is not None and (follows.kind == "equals" or follows.text in ("+", "-", "*", "/")):
                kept[-1] = replace(kept[-1], has_unit=True)
                at = end
                continue
        kept.append(token)
        at += 1
    return kept


def _is_share(kept: Sequence[Token]) -> bool:
    """Whether what stands before `of` is a share: `20%` or `1/4`."""
    return kept[-1].text == "%" or (len(kept) > 2 and kept[-2].text == "/")


def _is_unknown(word: Token) -> bool:
    return len(word.text) == 1 and word.text.isascii()


def _claim(before: Sequence[Token], after: Sequence[Token], *, about: bool) -> Claim | None:
    """The claim between what stands before an equals sign and after it, if both sides are arithmetic."""
    start = max((i + 1 for i, token in enumerate(before) if token.kind in ("word", "stop")), default=0)
    end = min((i for i, token in enumerate(after) if token.kind in ("word", "stop")), default=len(after))
    if end and end < len(after) and after[end - 1].text == "(":  # 12 (apples)
        end -= 1
    left, right = before[start:], after[:end]
    word = before[start - 1] if start and before[start - 1].kind == "word" else None
    if not left or not right or (start and not _begins_anew(left, before[:start])) or _has_remainder(after[end:]):
        return None
    if right[-1].kind == "sign" and right[-1].text not in (")", "%"):  # 12 = 3 * y
        return None
    if end < len(after) and after[end].kind == "word" and not after[end].spaced and _is_unknown(after[end]):  # = 3x
        return None
    if any(one.text == "%" and two.kind == "number" for one, two in pairwise(left)):  # 10 % 3, a remainder
        return None
    known, told = (parse([token.text for token in side]) for side in (left, right))
    if known is not None and num_operations(known) == 0 and (word is not None or left[-1].has_unit):
        return None  # `2 hours = 120 minutes`, `the area of 5 = 3 + 4`: a name, no sum
    rounded = _half_a_unit(right[-1].text) if about and told is not None and is_plain(told) else None
    return Claim(known, told, rounded)


def _begins_anew(left: Sequence[Token], before: Sequence[Token]) -> bool:
    """Whether an expression may begin after a word or a mark: `is 3`, `is -3`, but not `x + 3`, `3x`, `√16` or `12:30`."""
    last, first = before[-1], left[0]
    if first.text == "-":
        return first.spaced and len(left) > 1 and not left[1].spaced and not _is_unknown(last)
    if first.kind == "sign" and first.text != "(":
        return False
    if last.kind == "word":
        return first.spaced or not last.text.isascii()
    clock = last.text == ":" and len(before) > 1 and before[-2].kind == "number"
    return first.spaced or (not clock and last.text in ",，、：:<[{\"“‘'「")


def _has_remainder(rest: Sequence[Token]) -> bool:
    """Whether `7 remainder 1` or `7……1` is meant, which is no value."""
    words = [token.text.lower() for token in rest[:2]]
    return bool(words) and (words[0] in ("remainder", "rem", "r", "余", "余数", "…") or words == [".", "."])


def _half_a_unit(number: str) -> Fraction:
    """What rounding to the digits of a number may have changed."""
    return Fraction(1, 2 * 10 ** len(number.partition(".")[2]))
