"""A number or formula with what it measures, a ratio, and a time of day. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from coterie.rewards.maths.numbers import CHINESE, DECIMAL, number, spelled
from coterie.rewards.maths.units import CHINESE_UNITS, CURRENCIES, Unit, ratio_of, units_of


@dataclass(frozen=True)
class Quantity:
    """One value. text: without its unit. units: those that the text may mean, none where it has none.

    percent: of a hundred, so that `number` is a hundredth; "told" where the words around it say so, which a gold need not.
    letter: as the text is a quantity if its last letter is a unit: `5m`.
    """

    text: str
    number: Fraction | None
    units: tuple[Unit, ...] = ()
    percent: bool | Literal["told"] = False
    letter: Quantity | None = None


@dataclass(frozen=True)
class Clock:
    """`2:30 pm`: minutes from midnight, or of the half of the day where that is not told. ratio: what else it may be."""

    minutes: Fraction
    is_half: bool
    ratio: Fraction
    hour: int | None = None  # of a time without minutes, as `3 pm`


_MONEY = re.compile(rf"([-+]?)\s*((?:US|us)?[{CURRENCIES}]|USD|EUR|GBP|JPY|CNY|RMB|INR)\s*([-+]?.*)")
_SHORT_SCALES = {"k": "thousand", "K": "thousand", "m": "million", "M": "million", "B": "billion", "b": "billion"}
_MEASURED = re.compile(
    r"(?P<value>.*?[\d})!]|.*?\\(?:pi|infty))(?P<gap>\s*)"
    rf"(?P<unit>[A-Za-z{CURRENCIES}\u4e00-\u9fff/](?:[^\d\\(){{}}=<>+|^]|\\cdot|\^ ?\{{? ?-?[1-9](?: ?\}})?)*)"
)
_CHINESE_MEASURED = re.compile(rf"(负?[-\d.{CHINESE}]+?)\s*({'|'.join(CHINESE_UNITS)}|[\u4e00-\u9fff]+)")
_COUNTERS = "个只本张条块枚人次名位件"
_DEGREES = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?\s*([CF]?)$")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")


def read_quantity(text: str) -> Quantity:
    """A tidied text as one value. What has neither a plain number nor a known form is a formula, for algebra to read."""
    money = _MONEY.fullmatch(text)
    if money:
        short = re.fullmatch(rf"({DECIMAL})\s?([kKmMbB])(?=\W|$)(.*)", money[3])
        inner = read_quantity(f"{short[1]} {_SHORT_SCALES[short[2]]}{short[3]}" if short else money[3])
        per = re.search(r"(?:/|\bper\b|\b(?:a|an|each|every)\b).*", money[3])
        coin = (
            units_of(money[2] + (" " + per[0] if per and not per[0][0].isdigit() else "")) or units_of(money[2]) or ()
        )
        own = inner.units if any(d in ("dollar", "euro") for u in inner.units for d, _ in u.dimensions) else coin
        sign = money[1].strip("+")
        return Quantity(sign + inner.text, -inner.number if sign and inner.number is not None else inner.number, own)
    told = re.fullmatch(rf"([-+]?{DECIMAL}) in %", text)
    if told:
        return Quantity(told[1], Fraction(told[1]) / 100, percent="told")
    if not _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r" degree \1", text).strip()
    scale = {"%": 100, "‰": 1000}.get(text[-1:])
    if scale:
        value = number(text[:-1].strip())
        return Quantity(
            rf"\frac{{{text[:-1]}}}{{{scale}}}", None if value is None else value / scale, percent=scale == 100
        )
    value = number(text)
    if value is not None:
        return Quantity(text, value)
    ratio = re.fullmatch(rf"({DECIMAL})\s*:\s*({DECIMAL})", text)
    if ratio and Fraction(ratio[2]):
        return Quantity(text, Fraction(ratio[1]) / Fraction(ratio[2]))
    return _measured(text) or Quantity(text, None)


def _measured(text: str) -> Quantity | None:
    """A value with a unit behind it."""
    sign = re.match(r"(?:[-+]|minus |negative )?\s*", text)
    assert sign
    in_words = spelled(text[sign.end() :])
    if in_words:
        units = units_of(in_words[1]) if re.match(r"\s*[\u4e00-\u9fff]|\s|$", in_words[1]) else None
        if units is not None:
            value = -in_words[0] if sign[0][:1] in ("-", "m", "n") else in_words[0]
            return Quantity(text[: len(text) - len(in_words[1])], value, units)
    chinese = _CHINESE_MEASURED.fullmatch(text)
    count = number(chinese[1]) if chinese else None
    if chinese and count is not None:
        units = units_of(chinese[2]) if chinese[2] in CHINESE_UNITS else ()
        # 三角形 and 第三者 are no numbers: signs count with a short word for what is counted
        counts = units or chinese[1][-1].isdigit() or chinese[2] in _COUNTERS
        return Quantity(chinese[1], count, units or ()) if counts else None
    found = _MEASURED.fullmatch(text)
    if not found:
        return None
    inner, unit = found["value"].strip(), found["unit"].strip()
    units = units_of(unit)
    if units is None or not (units or found["gap"]):
        return None
    quantity = Quantity(inner, number(inner), units)
    if found["gap"] or unit[0] in CURRENCIES + "/":
        return quantity
    if len(unit) == 1 and unit.isascii():
        return Quantity(text, None, letter=quantity)
    return None if any(dimension.startswith("noun ") for one in units for dimension, _ in one.dimensions) else quantity


def read_clock(text: str) -> Clock | None:
    """`2:30`, `14:05:30`, `2:30 p.m.`, `3 pm`, `noon`. What has no two digits of minutes is a ratio."""
    if text.casefold() in ("noon", "midnight"):
        return Clock(Fraction(720 if text.casefold() == "noon" else 0), False, Fraction(0))
    found = re.fullmatch(
        r"(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?)?\s*(?:([AaPp])\.?\s?[Mm]\b\.?|o'?clock)?(?:\s(?:today|sharp))?", text
    )
    if not found or not (found[2] or found[4] or "clock" in text) or int(found[1]) > 24:
        return None
    hours, minutes = int(found[1]), Fraction(int(found[2] or 0)) + Fraction(int(found[3] or 0), 60)
    ratio = Fraction(hours, int(minutes)) if int(minutes) else Fraction(0)
    if found[4]:
        return Clock((hours % 12 + 12 * (found[4] in "pP")) * 60 + minutes, False, ratio, None if found[2] else hours)
    return Clock(hours * 60 + minutes, 0 < hours <= 12 and len(found[1]) < 3, ratio)


def same_clock(gold: Any, answer: Any) -> bool:
    """The same time, or the same ratio where only one of them can be a time: `2:3` and `10:15`."""
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        same_half = gold.is_half or answer.is_half
        return gold.minutes % 720 == answer.minutes % 720 if same_half else gold.minutes == answer.minutes
    clock, other = (gold, answer) if isinstance(gold, Clock) else (answer, gold)
    if isinstance(other, Quantity) and clock.hour is not None and other.number == clock.hour:
        return not other.units
    return isinstance(other, Quantity) and ":" in other.text and bool(clock.ratio) and clock.ratio == other.number


_WORK = re.compile(r"\d[)}\s]*(?:[-+*/÷:]|\\(?:cdot|times|div)(?![a-z]))[\s({\\a-z-]*[\d.]|\d\s*\)?\s*\(\s*[-.\d]")
_SCIENTIFIC = re.compile(rf"[-+]?{DECIMAL}\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*[-+]?\d+\s*\}}|\d)")


def is_work(text: str) -> bool:
    r"""Whether there is arithmetic in it that is left to be done: `17 \cdot 23`, not `2^{10}`, \sqrt{16} or `3 \times 10^5`."""
    if _SCIENTIFIC.fullmatch(text.strip()):
        return False
    text = re.sub(r"\^\s*\{[^{}]*\}|\^\s*\(\s*-?\d+\s*/\s*\d+\s*\)", "^", text)
    text = re.sub(r"\\frac\s*\{[-\d.\s]*\}\s*\{[-\d.\s]*\}", "1", re.sub(r"\{(\d+)\}_|_\{[^{}]*\}", "", text))
    return bool(_WORK.search(text)) and number(text) is None


def same_quantity(gold: Quantity, answer: Quantity, algebra: Callable[[str, str], bool], *, unevaluated: bool) -> bool:
    if gold.letter and answer.units:
        gold = gold.letter
    if answer.letter and gold.units:
        answer = answer.letter
    scale = ratio_of(gold.units, answer.units)
    if scale is None:
        return False
    if gold.number is not None and answer.number is not None:
        if gold.percent and not answer.percent and not answer.units and 100 * gold.number == answer.number:
            return True  # the answer leaves out the percent sign, as it may leave out any unit of the gold's
        if answer.percent == "told" and gold.number == 100 * answer.number:
            return True
        return gold.number == answer.number * scale
    if gold.number is not None and not unevaluated and is_work(answer.text):
        return False
    if _is_angle(gold) != _is_angle(answer) and r"\pi" in gold.text + answer.text:
        return algebra(*(_radians(one) for one in (gold, answer)))
    one, other = _latex(gold), _latex(answer)
    if scale != 1:
        return algebra(one, f"({other})\\cdot{_latex(Quantity('', scale))}")
    if re.sub(r"[\s{}]", "", gold.text) == re.sub(r"[\s{}]", "", answer.text) and "_" in gold.text + answer.text:
        return True
    if re.search(r"\d\s*_", gold.text + answer.text):  # a number in another base is equal in its spelling alone
        return False
    return algebra(one, other)


def _latex(value: Quantity) -> str:
    return value.text if value.number is None else rf"\frac{{{value.number.numerator}}}{{{value.number.denominator}}}"


def _is_angle(value: Quantity) -> bool:
    return any(unit.dimensions == (("angle", 1),) for unit in value.units)


def _radians(value: Quantity) -> str:
    return rf"({_latex(value)})\cdot\frac{{\pi}}{{180}}" if _is_angle(value) else _latex(value)
