"""Whether two answers are the same mathematical value (R18): their structure, and plain numbers in exact fractions.

What needs algebra is asked of a function, so that this file can run in the trainer: it evaluates nothing that it reads, and
the work that a text can cause is bounded by its length. Nothing here imports torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

Algebra = Callable[[str, str], bool]

_MAX_DIGITS = 300
_MAX_ITEMS = 40
_MAX_DEPTH = 8


class UndecidedError(Exception):
    """The two texts have to be compared by algebra."""


@dataclass(frozen=True)
class Single:
    """One value. unit: the known unit's dimension and its size, None where there is none."""

    text: str
    number: Fraction | None
    unit: tuple[str, Fraction] | None = None
    percent: bool = False


@dataclass(frozen=True)
class Named:
    """`x = 3`. whole: the equation as it stands."""

    name: str
    value: Value
    whole: str


@dataclass(frozen=True)
class Many:
    """`{1, 2}` or `1, 2`: the order says nothing. distinct: a set, where repeating says nothing either."""

    items: tuple[Value, ...]
    distinct: bool


@dataclass(frozen=True)
class Ordered:
    """`(1, 2)` or `[1, 2)`: a point or an interval."""

    brackets: str
    items: tuple[Value, ...]


Value = Single | Named | Many | Ordered


def same_text(gold: str, answer: str) -> bool:
    """Whether they are spelt the same but for case of words, spaces and the end of the sentence."""
    return bool(_plain(gold)) and _plain(gold) == _plain(answer)


def equal(gold: str, answer: str, algebra: Algebra) -> bool:
    """Whether the answer has the gold's value. Raises what `algebra` raises, which is asked of single values."""
    one, other = number(gold), number(answer)
    if one is not None and other is not None:
        return one == other
    if same_text(gold, answer):
        return True
    choice = re.fullmatch(r"\(?([A-J])\)?", _words_only(gold))
    if choice:
        given = _words_only(answer)
        chosen = re.fullmatch(rf"(?:\({choice[1]}\)|{choice[1]}(?=\s*[.:)]|$))(.*)", given)
        return chosen is not None and not _OTHER_CHOICE.search(chosen[1])
    known, given = tidy(gold), tidy(answer)
    if not known or not given:
        return False
    if (is_words(known) and number(known) is None) or (is_words(given) and number(given) is None):
        return _plain(known) == _plain(given)
    return _same(read(known), read(given), algebra)


_OTHER_CHOICE = re.compile(r"(?<![A-Za-z])[A-J][.):,]|(?:^[\s.:)]*|[,/]\s*|\b(?:and|or) )[A-J]\s*$")  # `B) C)`


def parts(gold: str) -> list[str]:
    """The single values in it that algebra would have to read: what is neither a plain number nor words."""
    known = tidy(gold)
    if is_words(known) and number(known) is None:
        return []
    value, found = read(known), []
    stack: list[Value] = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, Named):
            stack.append(one.value)
        elif isinstance(one, Single):
            found += [] if one.number is not None else [one.text]
        else:
            stack += one.items
    return found


def is_words(tidied: str) -> bool:
    """Whether it is text and no mathematics: `Yes`, `even`, 星期一."""
    if re.search(r"[\d\\=<>+*/^(]", tidied):
        return False
    return bool(re.search(r"[A-Za-z]{3,}|[\u0370-\U0010ffff]", re.sub("[⦃⦄]", "", tidied))) or tidied.casefold() in (
        "no",
        "on",
        "up",
    )


def _same(gold: Value, answer: Value, algebra: Algebra) -> bool:
    gold, answer = _unwrapped(gold), _unwrapped(answer)
    if isinstance(gold, Ordered) and isinstance(answer, Many):
        answer = _by_name(answer, gold.brackets)
    if isinstance(gold, Named) or isinstance(answer, Named):
        return _same_named(gold, answer, algebra)
    if isinstance(gold, Many) and isinstance(answer, Many):
        return _same_items(gold, answer, algebra)
    if isinstance(gold, Ordered) and isinstance(answer, Ordered):
        if gold.brackets != answer.brackets or len(gold.items) != len(answer.items):
            return False
        return all(_same(one, other, algebra) for one, other in zip(gold.items, answer.items, strict=True))
    if isinstance(gold, Single) and isinstance(answer, Single):
        return _same_single(gold, answer, algebra)
    if isinstance(gold, Many) or isinstance(answer, Many) or not _is_set(gold, answer):
        return False
    return algebra(_written(gold), _written(answer))


def _unwrapped(value: Value) -> Value:
    """A set or list of one is its item, and so is what stands in round brackets alone."""
    while (isinstance(value, Many) or (isinstance(value, Ordered) and value.brackets == "()")) and len(
        value.items
    ) == 1:
        value = value.items[0]
    return value


def _is_set(gold: Value, answer: Value) -> bool:
    """Whether one is an interval and the other a single text that may describe one: `1 < x < 2`, `x \\in (1, 2)`."""
    text = "".join(value.text for value in (gold, answer) if isinstance(value, Single))
    return bool(re.search(r"[<>]|\\[lg]e|\\in\b|\\cup|\\mathbb|\\infty", text))


def _by_name(answer: Many, brackets: str) -> Value:
    """`x = 3, y = -1` as the point `(3, -1)`."""
    named = [item for item in answer.items if isinstance(item, Named)]
    names = [item.name for item in named]
    if brackets != "()" or len(named) != len(answer.items) or len(set(names)) != len(names):
        return answer
    return Ordered(brackets, tuple(item.value for item in sorted(named, key=lambda item: item.name)))


def _same_named(gold: Value, answer: Value, algebra: Algebra) -> bool:
    """A name that only one of them gives is left out; two names must be the same, or the equations equivalent."""
    if isinstance(gold, Named) and isinstance(answer, Named):
        if gold.name == answer.name:
            return _same(gold.value, answer.value, algebra)
        both = [one.value for one in (gold, answer)]
        has_letters = [isinstance(one, Single) and bool(re.search("[A-Za-z]", one.text)) for one in both]
        return all(has_letters) and algebra(gold.whole, answer.whole)
    named, other = (gold, answer) if isinstance(gold, Named) else (answer, gold)
    assert isinstance(named, Named)
    if isinstance(other, Single) and _is_relation(other.text):
        whole = (named.whole, other.text)
        return algebra(*(whole if named is gold else whole[::-1]))
    pair = (named.value, other) if named is gold else (other, named.value)
    return _same(*pair, algebra)


def _same_items(gold: Many, answer: Many, algebra: Algebra) -> bool:
    """Each item has a partner. Equality is transitive, so any partner will do."""
    one, other = list(gold.items), list(answer.items)
    if gold.distinct or answer.distinct:
        one, other = _without_repeats(one, algebra), _without_repeats(other, algebra)
    if len(one) != len(other):
        return False
    for item in one:
        partner = next((i for i, candidate in enumerate(other) if _same(item, candidate, algebra)), None)
        if partner is None:
            return False
        other.pop(partner)
    return True


def _without_repeats(items: Sequence[Value], algebra: Algebra) -> list[Value]:
    kept: list[Value] = []
    for item in items:
        if not any(_same(item, other, algebra) for other in kept):
            kept.append(item)
    return kept


def _same_single(gold: Single, answer: Single, algebra: Algebra) -> bool:
    scale = Fraction(1)
    if gold.unit and answer.unit:
        if gold.unit[0] != answer.unit[0]:
            return False
        scale = answer.unit[1] / gold.unit[1]
    if gold.number is not None and answer.number is not None:
        if gold.percent and not answer.percent and 100 * gold.number == answer.number:
            return True  # the answer leaves out the percent sign, as it may leave out any unit of the gold's
        return gold.number == answer.number * scale
    if _is_angle(gold) != _is_angle(answer) and r"\pi" in gold.text + answer.text:
        return algebra(*(_radians(one) for one in (gold, answer)))
    if scale != 1:
        return algebra(gold.text, f"({answer.text})\\cdot\\frac{{{scale.numerator}}}{{{scale.denominator}}}")
    if re.sub(r"[\s{}]", "", gold.text) == re.sub(r"[\s{}]", "", answer.text) and "_" in gold.text + answer.text:
        return True
    if re.search(r"\d\s*_", gold.text + answer.text):  # a number in another base is equal in its spelling alone
        return False
    return algebra(gold.text, answer.text)


def _is_angle(value: Single) -> bool:
    return value.unit is not None and value.unit[0] == "angle1"


def _radians(value: Single) -> str:
    return rf"({value.text})\cdot\frac{{\pi}}{{180}}" if _is_angle(value) else value.text


def _written(value: Value) -> str:
    if isinstance(value, Single):
        return value.text
    if isinstance(value, Named):
        return value.whole
    inner = ", ".join(_written(item) for item in value.items)
    return f"{value.brackets[0]}{inner}{value.brackets[1]}" if isinstance(value, Ordered) else rf"\{{{inner}\}}"


# ---- from a text to a value

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ",
    "±": r"\pm ", "⁄": "/", "、": ",", "和": ",", "或": ",", "。": ".", "⟨": "(", "⟩": ")", "√": r"\sqrt ",
}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True))
_DROPPED = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|quad|qquad)(?![A-Za-z])|\\[!,;: ]|\\\$|[$£€¥₹]|(?<=[^\s\\])~|\*\*"
)
_WRITTEN = re.compile(r"\\(?:text|mathrm|mbox|textbf|textit|mathbf|operatorname|textrm|rm|mathit)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_FUNCTIONS = "arcsin|arccos|arctan|sqrt|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|infty"
_SCALES = {
    "hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}", "trillion": "10^{12}", "dozen": "12",
    "万": "10^{4}", "百万": "10^{6}", "千万": "10^{7}", "亿": "10^{8}",
    "成": "10^{-1}", "折": "10^{-1}",
}  # fmt: skip
_DIGITS = {sign: digit for digit, signs in enumerate(("零〇", "一", "二两", "三", "四", "五", "六", "七", "八", "九")) for sign in signs}  # fmt: skip
_SIGNS_OF_NUMBERS = "".join(_DIGITS) + "十百千万亿"
_OPEN, _CLOSE = "⦃", "⦄"  # the braces of a set, which LaTeX writes \{ \}


def tidy(text: str) -> str:
    """One spelling: plain digits, LaTeX for signs, no spacing commands, no thousands separators, no words of Chinese around."""
    text = _in_one_alphabet(text)
    text = "".join(_SIGNS.get(character, character) for character in text)
    text = re.sub(r"\\\(|\\\)|\\\[|\\\]", " ", text) if "matrix" not in text else text
    text = re.sub(r"(\d)(?:\{,\}|\\[,!;: ]|,\\!)(?=\d{3}(?!\d))", r"\1", text)
    text = re.sub(
        r"(?<=[0-9a-z)])\*\*(-?\d+|[a-z](?![a-z])|(?=\())", lambda found: f"^{{{found[1]}}}" if found[1] else "^", text
    )
    text = _DROPPED.sub(" ", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    for _ in range(2):
        text = _WRITTEN.sub(r" \1 ", text)
    text = re.sub(r"\\%|\bper ?cent\b", "%", text)
    text = text.replace(r"\{", _OPEN).replace(r"\}", _CLOSE).replace(r"\lbrace", _OPEN).replace(r"\rbrace", _CLOSE)
    text = re.sub(rf"(?<![\\A-Za-z])(?={_FUNCTIONS})({_FUNCTIONS})(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\d.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,4})(?![\d.])", r"\1\\times 10^{\2}", text)
    text = re.sub(r"\\leq?(?![A-Za-z])", r"\\le ", re.sub(r"\\geq?(?![A-Za-z])", r"\\ge ", text))
    text = re.sub(
        r"\\(?:varnothing|emptyset)|⦃\s*⦄|\bno (?:real )?solutions?\b", r"\\emptyset ", text, flags=re.IGNORECASE
    )
    if not re.search(r"[\[(⦃]", text):
        text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
        text = re.sub(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d.])", lambda found: found[0].replace(" ", ""), text)
    text = re.sub(
        r"(?<![\w-])([a-z]+)(?= (?:hundred|thousand|million)\b)",
        lambda found: str(_WORDS.get(found[1], found[1])),
        text,
    )
    text = re.sub(
        r"(\d)\s*(hundred|thousand|million|billion|trillion|dozen|[百千]?万|亿|[成折]$)(?![A-Za-z])", _times, text
    )
    text = _CHINESE_NUMBER.sub(lambda found: f"{found[1] and '-'}{_in_digits(found[2]) or found[2]} {found[3]}", text)
    text = re.sub("负(?=[\\d])", "-", text)
    bare = re.sub(r"^[\u4e00-\u9fff\s:,]+|[\u4e00-\u9fff]*[\s.]*$", "", text)
    if bare and not re.match("[^\\d-]*(?:不|非|零下|减)", text) and not re.search("[\u4e00-\u9fff]", bare):
        unit = re.search(r"([\u4e00-\u9fff]+)[\s.]*$", text)
        text = f"{bare} {unit[1]}" if unit and unit[1] in _CHINESE_UNITS else bare
    text = re.sub(r"\s+", " ", text).strip().rstrip(".,;:").lstrip("= ").strip()
    text = re.sub(
        r"(\d+) \(([a-z]+)\)$", lambda found: found[1] if f"{_WORDS.get(found[2])}" == found[1] else found[0], text
    )
    return re.sub(r"(?<=\d)(?:st|nd|rd|th)$", "", text)


def _in_one_alphabet(text: str) -> str:
    """Plain digits in every script, raised ones as powers, and no characters that can't be seen."""
    if text.isascii():
        return text
    text = re.sub("[½⅓⅔¼¾⅕⅛]", lambda found: f" {unicodedata.normalize('NFKC', found[0])} ", text)
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda found: "^{" + "".join(_RAISED[c] for c in found[0]) + "}", text)
    text = unicodedata.normalize("NFKC", text)
    seen = (c for c in text if unicodedata.category(c) != "Cf")
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in seen)


def _times(found: re.Match[str]) -> str:
    return rf"{found[1]}\times {_SCALES[found[2]]}"


def _in_digits(text: str) -> str | None:
    """A whole number in Chinese: 一百零五 -> 105, 二零二四 -> 2024. None where it is none, or can be read in two ways (一百五)."""
    if not text or re.search("[百千万亿][一二两三四五六七八九]$", text):
        return None
    for sign, size in (("亿", 10**8), ("万", 10**4)):
        before, at, after = text.partition(sign)
        if at:
            upper, lower = _in_digits(before), _in_digits(after or "零")
            return None if upper is None or lower is None else str(int(upper) * size + int(lower))
    if not re.search("[十百千]", text):
        return str(int("".join(str(_DIGITS[sign]) for sign in text)))
    total, digit = 0, 0
    for sign in text:
        if sign in "十百千":
            total, digit = total + (digit or 1) * 10 ** ("十百千".index(sign) + 1), 0
        else:
            digit = _DIGITS[sign]
    return str(total + digit)


def _plain(text: str) -> str:
    """Without what is no part of a word or formula."""
    text = _in_one_alphabet(_WRITTEN.sub(r"\1", text)).strip().strip("$").strip().rstrip(".。,;").strip()
    squeezed = re.sub(r"\s+", "" if re.search("[A-Za-z]{2}", text) else " ", text)
    squeezed = re.sub(r"(?<=\d)([AaPp])\.?[Mm]$", lambda found: f"{found[1].lower()}m", squeezed)
    return squeezed.rstrip("!").casefold() if re.fullmatch(r"[A-Za-z]{2,}!?", squeezed) else squeezed


def _words_only(text: str) -> str:
    return _WRITTEN.sub(r"\1", text).strip().strip("$*").strip().rstrip(".")


def read(text: str, depth: int = 0) -> Value:
    """The structure of a tidied text."""
    text = text.strip()
    if depth > _MAX_DEPTH:
        return Single(text, None)
    items = _split(text)
    if 1 < len(items) <= _MAX_ITEMS:
        return Many(tuple(read(item, depth + 1) for item in items), distinct=False)
    brackets = _brackets(text)
    if brackets:
        items = _split(text[1:-1])[:_MAX_ITEMS]
        if brackets in ("⦃⦄", "{}"):
            if not re.search(r"\\mid|[|:<>]", text):
                return Many(tuple(read(item, depth + 1) for item in items), distinct=True)
        elif len(items) > 1 or brackets == "()":
            return Ordered(brackets, tuple(read(item, depth + 1) for item in items))
    if r"\pm" in text or r"\mp" in text:
        plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
        minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
        return Many((read(plus, depth + 1), read(minus, depth + 1)), distinct=False)
    member = re.fullmatch(rf"(?:{_NAME})\s*\\in\s*(.+)", text)
    return read(member[1], depth + 1) if member else _assignment(text, depth) or _single(text)


def _split(text: str) -> list[str]:
    """Its items, where commas, semicolons, `and` and `or` stand outside all brackets."""
    if "matrix" in text or re.search(r"\d\s*:\s*\d.*,", text):
        return [text]
    text = re.sub(r",?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*", ",", text)
    items, depth, start = [], 0, 0
    for at, character in enumerate(text):
        if character in "([{⦃":
            depth += 1
        elif character in ")]}⦄":
            depth -= 1
        elif character in ",;" and depth == 0:
            items.append(text[start:at])
            start = at + 1
    items.append(text[start:])
    return [item for item in items if item.strip()]


def _brackets(text: str) -> str:
    """The brackets that hold the whole of it, or the empty text."""
    if len(text) < 2 or text[0] not in "([{⦃" or text[-1] not in ")]}⦄":
        return ""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "([{⦃") - (character in ")]}⦄")
        if depth == 0:
            return text[0] + text[-1] if at == len(text) - 1 else ""
    return ""


_NAME = r"[A-Z]{2}|[A-Za-z](?:_(?:\{\w{1,6}\}|\w))?'?(?:\s*\([a-z](?:\s*,\s*[a-z])*\))?|\\[a-z]+(?:_\w)?"
_EQUALS = re.compile(r"(?<![<>!\\=])=(?!=)")


def _assignment(text: str, depth: int) -> Named | Single | None:
    """`x = 3`, and what a chain like `2 + 3 = 5` ends in."""
    sides = [side.strip() for side in _EQUALS.split(text)]
    if len(sides) < 2 or not all(sides):
        return None
    if len(sides) == 2 and re.fullmatch(_NAME, sides[1]) and not re.fullmatch(_NAME, sides[0]):
        sides.reverse()
    sums = {value for side in sides[1:] if (value := _sum(side)) is not None}
    if len(sums) > 1:  # x = 6 = 5
        return None
    if re.fullmatch(_NAME, sides[0]) and not _is_relation(sides[-1]):
        return Named(re.sub(r"[\s{}]", "", sides[0]), read(sides[-1], depth + 1), text)
    return None


def _is_relation(text: str) -> bool:
    return bool(_EQUALS.search(text) or re.search(r"[<>]|\\[lgn]e(?![a-z])", text))


# ---- numbers and units

_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_FRACTION = rf"\\frac\s*(?:\{{\s*([-+]?{_DECIMAL})\s*\}}|(\d))\s*(?:\{{\s*([-+]?{_DECIMAL})\s*\}}|(\d))"
_NUMBERS = {
    "decimal": re.compile(rf"({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?", re.ASCII),
    "fraction": re.compile(_FRACTION, re.ASCII),
    "mixed": re.compile(rf"(\d+)\s*{_FRACTION}", re.ASCII),
    "mixed_plain": re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)", re.ASCII),
    "ratio": re.compile(rf"({_DECIMAL})\s*:\s*({_DECIMAL})", re.ASCII),
    "repeating": re.compile(r"(\d*)\.(\d*)\s*\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?", re.ASCII),
}
_ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_WORDS = {word: number for number, word in enumerate(_ENGLISH.split())} | {
    f"{tens}ty": 10 * number
    for number, tens in enumerate(("thir", "for", "fif", "six", "seven", "eigh", "nine"), start=3)
}


def number(text: str) -> Fraction | None:
    """The value of a plain number: a decimal, a fraction, a mixed number, a percentage. None for anything else.

    There is no arithmetic but one division, and no exponent, so the digits of the result are those of the text.
    """
    text = text.strip()
    if sum(character.isdigit() for character in text) > _MAX_DIGITS:
        return None
    if text.casefold() in _WORDS:
        return Fraction(_WORDS[text.casefold()])
    tens, _, ones = text.casefold().partition("-")  # thirty-one
    if tens.endswith("ty") and {tens, ones} <= _WORDS.keys():
        return Fraction(_WORDS[tens] + _WORDS[ones])
    if re.fullmatch(f"[{_SIGNS_OF_NUMBERS}]{{1,20}}", text):
        digits = _in_digits(text)
        return None if digits is None else Fraction(digits)
    divided = re.fullmatch("(.{1,20})分之(.{1,20})", text)
    if divided:
        lower, upper = number(divided[1]), number(divided[2])
        return upper / lower if upper is not None and lower else None
    sign = 1
    while text[:1] in ("-", "+"):
        sign, text = sign * (-1 if text[0] == "-" else 1), text[1:].strip()
        if _brackets(text) == "()":
            text = text[1:-1].strip()
    for kind, pattern in _NUMBERS.items():
        found = pattern.fullmatch(text)
        if found:
            value = _value(kind, [group for group in found.groups() if group is not None])
            return None if value is None else sign * value
    return None


def _value(kind: str, groups: list[str]) -> Fraction | None:
    if kind == "repeating":
        whole, head, tail = groups
        shift = 10 ** len(head)
        return Fraction(int(whole or 0)) + (Fraction(int(head or 0)) + Fraction(int(tail), 10 ** len(tail) - 1)) / shift
    numbers = [Fraction(group) for group in groups]
    whole_part = numbers.pop(0) if kind.startswith("mixed") else Fraction(0)
    if len(numbers) == 1:
        return numbers[0]
    if numbers[1] == 0 or (kind.startswith("mixed") and min(numbers) < 0):
        return None
    return whole_part + numbers[0] / numbers[1]


_UNITS: dict[str, tuple[str, Fraction]] = {}
for _dimension, _table in {
    "length": "mm millimeter millimetre 毫米=1/1000 cm centimeter centimetre 厘米=1/100 m meter metre 米=1 km kilometer kilometre 公里 千米=1000 "
    "inch inches in=127/5000 ft foot feet=381/1250 yd yard=1143/1250 mi mile=201168/125",
    "mass": "mg milligram=1/1000000 g gram 克=1/1000 kg kilogram 千克 公斤=1 lb pound=45359237/100000000",
    "time": "s sec second 秒=1 min minute 分钟=60 h hr hour 小时=3600 day 天=86400 week 周=604800 month=2629746 year 年=31556952",
    "money": "dollar usd=1 cent=1/100",
    "euro": "euro=1",
    "yuan": "yuan 元=1",
    "celsius": "circC celsius=1",
    "fahrenheit": "circF fahrenheit=1",
    "angle": "circ degree deg 度=1",
    "volume": "ml milliliter millilitre 毫升=1/1000 L liter litre 升=1",
    "square": "unit=1",
}.items():
    for _names, _size in re.findall(r"((?:[^\s=]+ )*[^\s=]+)=(\S+)", _table):
        _UNITS |= {_name: (_dimension, Fraction(_size)) for _name in _names.split()}
_CHINESE_UNITS = {_name for _name in _UNITS if not _name.isascii()}
_CHINESE_NUMBER = re.compile(
    rf"^(负?)([{_SIGNS_OF_NUMBERS}]{{1,20}})\s*({'|'.join(sorted(_CHINESE_UNITS, key=len, reverse=True))}|[个只本张条块枚人次名位件]?)[\s.]*$"
)
_UNIT = re.compile(
    r"(?P<value>.*[\d})!π]|.*\\pi)\s*(?P<unit>(?:\^\s*\{?\s*\\circ\s*\}?\s*[CF]?"
    r"|(?:square |cubic |sq\.? |cu\.? )?(?:[A-Za-z]{2,}|[\u4e00-\u9fff]+)(?: (?:[A-Za-z]{2,}|a)){0,3}"
    r"|[A-Za-z]+\s*(?:/|per)\s*[A-Za-z]+)\s*(?:\^\s*\{?\s*[23]\s*\}?)?)\s*"
)
_NOUN = re.compile(  # and xyz is a product
    r"(?!(?:squared|cubed|below|percentage|halves|thirds|quarters|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million|billion)ths)\b)"
    r"(?:(?:[A-Za-z]{4,}|[a-z][aeiou][a-z])(?: (?:[A-Za-z]{2,}|a)){0,3}|[\u4e00-\u9fff]+)"
)


def _single(text: str) -> Single:
    """A value without its unit. Nouns that measure nothing (`12 apples`) are left out."""
    last = _EQUALS.split(text)[-1].strip() if re.fullmatch(r"[\d\s+*/().=-]*", text) else text
    if last != text and not _holds(text):
        return Single(text, None)
    text, unit, percent = last, None, False
    found = _UNIT.fullmatch(text)
    if found and not (r"\circ" in found["unit"] and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", found["value"])):
        unit = _unit(found["unit"])
        if unit or (_NOUN.fullmatch(found["unit"].strip()) and text[found.start("unit") - 1] == " "):
            text = found["value"].strip()
    if text.endswith("%"):
        text, percent = text[:-1].strip(), True
    value = number(text)
    if percent:
        value = None if value is None else value / 100
        text = rf"\frac{{{text}}}{{100}}"
    return Single(text, value, unit, percent)


def _holds(chain: str) -> bool:
    """Whether a chain like `2 + 3 = 5` is one whose sides can be added up here and agree."""
    sides = [_sum(side) for side in _EQUALS.split(chain)]
    return None not in sides and len(set(sides)) == 1


def _sum(text: str) -> Fraction | None:
    terms = re.findall(r"[-+]?[^-+]+", text.strip())
    total = Fraction(0)
    for term in terms:
        product = Fraction(1)
        for factor in term.split("*"):
            value = number(factor)
            if value is None:
                return None
            product *= value
        total += product
    return total if terms else None


def _unit(text: str) -> tuple[str, Fraction] | None:
    """The dimension and size of a unit that is known, with squares, cubes and `per`."""
    text = text.strip()
    power = 1
    raised = re.search(r"\^\s*\{?\s*([23])\s*\}?$", text)
    if raised:
        power, text = int(raised[1]), text[: raised.start()].strip()
    for word, number_ in (("square ", 2), ("sq ", 2), ("sq. ", 2), ("cubic ", 3), ("cu ", 3), ("cu. ", 3)):
        if text.startswith(word):
            power, text = number_, text.removeprefix(word)
    parts = [_UNITS.get(part) or _UNITS.get(part.casefold()) or _UNITS.get(part.casefold().removesuffix("s"))
             for part in re.split(r"\s*/\s*|\s+per\s+", re.sub(r"[\^{}\\\s]*circ[\s}]*", "circ", text))]  # fmt: skip
    if not parts or any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    size = known[0][1] ** power
    for _, divisor in known[1:]:
        size /= divisor
    return "/".join([f"{known[0][0]}{power}", *(dimension for dimension, _ in known[1:])]), size
