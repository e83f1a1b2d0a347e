r"""Numbers as people write them, in exact fractions: `1,234.5`, `1 1/2`, `0.\overline{3}`, two and a half million, 三分之二.

Nothing is evaluated: there is no arithmetic but one division, so the digits of a result are those of the text, but for the
words of scale (million, 亿), of which a number holds few. Nothing here imports torch.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_MAX_DIGITS = 300
_MAX_CHARACTERS = 200  # of a number in words

DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_FRACTION = rf"\\frac\s*(?:\{{\s*([-+]?{DECIMAL})\s*\}}|(\d))\s*(?:\{{\s*([-+]?{DECIMAL})\s*\}}|(\d))"
_FORMS = (  # their groups: a decimal, the two numbers of a fraction, or the three of a mixed number
    re.compile(rf"({DECIMAL})(?:\s*/\s*({DECIMAL}))?", re.ASCII),
    re.compile(_FRACTION, re.ASCII),
    re.compile(rf"(\d+)\s*{_FRACTION}", re.ASCII),
    re.compile(r"(\d+)\s+(?:and\s+)?(\d+)\s*/\s*(\d+)", re.ASCII),
)
_REPEATING = re.compile(r"(\d*)\.(\d*)\s*\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?", re.ASCII)

_ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen",
    "twenty thirty forty fifty sixty seventy eighty ninety",
    "third fourth fifth sixth seventh eighth ninth tenth",
)
_ONES, _TENS, _ORDINALS = (words.split() for words in _ENGLISH)
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9, "bn": 10**9,
    "trillion": 10**12, "quadrillion": 10**15, "quintillion": 10**18, "googol": 10**100, "dozen": 12, "score": 20, "gross": 144,
}  # fmt: skip
_PARTS = {part: size for size, part in enumerate(_ORDINALS, start=3)} | {
    "half": 2, "halve": 2, "quarter": 4, "hundredth": 10**2, "thousandth": 10**3, "millionth": 10**6, "billionth": 10**9,
}  # fmt: skip
WORDS_BELOW_100 = dict(zip(_ONES, range(20), strict=True)) | dict(zip(_TENS, range(20, 100, 10), strict=True))
NUMBER_WORDS = frozenset((*_ONES, *_TENS, *_SCALES, *_PARTS))

_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_ONES[1:10])}))?|{'|'.join(reversed(_ONES))})(?![a-z])"
_BELOW_1000 = rf"(?:(?:{_BELOW_100}|an?) hundreds?(?:(?: and)? {_BELOW_100})?|{_BELOW_100})"
_SCALE = rf"(?:{'|'.join(_SCALES)})s?(?![a-z])"
_DIGITAL = rf"(?:\d+ \d+/\d+|{DECIMAL}(?: ?/ ?{DECIMAL})?)"
_SCALED = rf"(?:{_BELOW_1000}|{_DIGITAL}|an?) ?{_SCALE}(?: ?{_SCALE})?"
_CARDINAL = rf"(?:{_SCALED}(?:,?(?: and)? {_SCALED})*(?:,?(?: and)? {_BELOW_1000})?|{_BELOW_1000})"
_PART = rf"(?:{'|'.join(_PARTS)})s?(?![a-z])"
_SPELLED = re.compile(
    rf"(?:(?:(?P<whole>{_CARDINAL}|{_DIGITAL}) and )?(?:(?P<count>{_CARDINAL}|{_DIGITAL}|an?)[ -]?(?P<part>{_PART})(?!-[a-z])|(?P<half>half))"
    rf"(?P<scale>(?: an?)?(?: {_SCALE})*)|(?P<cardinal>{_CARDINAL}))(?![a-z])",
    re.IGNORECASE | re.ASCII,
)


def number(text: str) -> Fraction | None:
    """The value of a plain number: a decimal, a fraction, a mixed number, one in words. None for anything else."""
    text, sign = text.strip(), 1
    if sum(character.isdigit() for character in text) > _MAX_DIGITS:
        return None
    while found := re.match(r"[-+负]\s*|(?:minus|negative)\s+(?=[\w(])", text, re.IGNORECASE):
        sign, text = sign * (1 if found[0][0] == "+" else -1), text[found.end() :]
        if text[:1] == "(" and text.find(")") == len(text) - 1:
            text = text[1:-1].strip()
    value = _digital(text)
    if value is None and text[:1].isalnum():
        value, rest = spelled(text) or (_chinese(text), "")
        value = None if rest else value
    return None if value is None else sign * value


def spelled(text: str) -> tuple[Fraction, str] | None:
    """The number in words that a text begins with, and what follows it. Digits are read only with a word of scale.

    `two hundred and five`, `3.5 million`, `2 thirds`, `one and a half`, `half a dozen`.
    """
    found = _SPELLED.match(text[:_MAX_CHARACTERS])
    if not found or (found["part"] and re.fullmatch("(?i)[a-z]+ty.(?!half)[a-z]+[^s]", found[0])):  # not `twenty-third`
        return None
    if found["cardinal"]:
        value = _cardinal(found["cardinal"])
    else:
        size = 2 if found["half"] else _PARTS[_singular(found["part"], _PARTS)]
        value = _cardinal(found["count"] or "one") / size + (_cardinal(found["whole"]) if found["whole"] else 0)
        value *= _cardinal(f"one {found['scale']}")
    return value, text[found.end() :]


def _cardinal(text: str) -> Fraction:
    """What the words of a number, which the expression has found to be one, are worth."""
    total, group, one = Fraction(0), Fraction(0), Fraction(1)
    for word in re.findall(rf"[a-z]+|{_DIGITAL}", text.casefold()):
        scale = _SCALES.get(_singular(word, _SCALES))
        if scale == 100:
            group = (group or one) * scale
        elif scale:  # `two million million`
            total, group = (total + (group or one) * scale if group or not total else total * scale), Fraction(0)
        elif word not in ("and", "a", "an"):
            group += WORDS_BELOW_100[word] if word in WORDS_BELOW_100 else _digital(word) or 0
            one = Fraction(0)  # `0 million`
    return total + group if total or group or not one else one


def _singular(word: str, table: dict[str, int]) -> str:
    word = word.casefold()
    return word if word in table else word.removesuffix("s")


def _digital(text: str) -> Fraction | None:
    if repeating := _REPEATING.fullmatch(text):
        whole, head, tail = repeating.groups()
        return int(whole or 0) + (int(head or 0) + Fraction(int(tail), 10 ** len(tail) - 1)) / 10 ** len(head)
    found = next((found for form in _FORMS if (found := form.fullmatch(text))), None)
    if not found:
        return None
    *before, last = [Fraction(group) for group in found.groups() if group is not None]
    if not before:
        return last
    *mixed, upper = before
    return None if last == 0 or (mixed and min(upper, last) < 0) else sum(mixed, upper / last)


# ---- Chinese, and characters of other scripts

_DIGITS = {sign: digit for digit, signs in enumerate(("零〇", "一", "二两", "三", "四", "五", "六", "七", "八", "九")) for sign in signs}  # fmt: skip
CHINESE = "".join(_DIGITS) + "十百千万亿"
_CHINESE_SCALES: dict[str, int | Fraction] = {"百": 10**2, "千": 10**3, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8, "成": Fraction(1, 10), "折": Fraction(1, 10)}  # fmt: skip


def _chinese(text: str) -> Fraction | None:
    """一百零五, 三分之二, 3.5万, 七折."""
    divided = re.fullmatch("(.{1,20})分之(.{1,20})", text)
    if divided:
        lower, upper = number(divided[1]), number(divided[2])
        return upper / lower if upper is not None and lower else None
    scaled = re.fullmatch(rf"({DECIMAL}|[{CHINESE}]{{1,20}}?)\s*([百千]?万|亿|[百千成折])", text)
    if scaled and (scaled[1].isascii() or scaled[2] in "成折"):
        count = number(scaled[1])
        return None if count is None else count * _CHINESE_SCALES[scaled[2]]
    if not re.fullmatch(f"[{CHINESE}]{{1,20}}", text):
        return None
    digits = _in_digits(text)
    return None if digits is None else Fraction(digits)


def _in_digits(text: str) -> int | None:
    """A whole number: 一百零五 -> 105, 二零二四 -> 2024. None where it can be read in two ways (一百五)."""
    if not text or re.search("[百千万亿][一二两三四五六七八九]$", text):
        return None
    for sign, size in (("亿", 10**8), ("万", 10**4)):
        before, at, after = text.partition(sign)
        if at:
            upper, lower = _in_digits(before), _in_digits(after or "零")
            return None if upper is None or lower is None else upper * size + lower
    if not re.search("[十百千]", text):
        return int("".join(str(_DIGITS[sign]) for sign in text))
    total, digit = 0, 0
    for sign in text:
        if sign in "十百千":
            total, digit = total + (digit or 1) * 10 ** ("十百千".index(sign) + 1), 0
        else:
            digit = _DIGITS[sign]
    return total + digit


_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))


def in_one_alphabet(text: str) -> str:
    """Plain digits in every script, raised ones as powers, and no characters that can't be seen."""
    if text.isascii():
        return text
    text = re.sub("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]", lambda found: f" {unicodedata.normalize('NFKC', found[0])} ", text)
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda found: "^{" + "".join(_RAISED[c] for c in found[0]) + "}", text)
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/")
    seen = (c for c in text if unicodedata.category(c) != "Cf")
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in seen)
