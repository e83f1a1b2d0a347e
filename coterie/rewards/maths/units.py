"""What a number measures: known units with their sizes, currencies, and nouns (`12 apples`). Nothing here imports torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

from coterie.rewards.maths.numbers import NUMBER_WORDS

_NOUN = "noun "


@dataclass(frozen=True)
class Unit:
    """dimensions: what is measured and its power, sorted, as ("length", 1), ("time", -1). size: in the base units of these."""

    dimensions: tuple[tuple[str, int], ...]
    size: Fraction = Fraction(1)


# A dimension, then sizes, each with the names that have it. A star: metric prefixes may stand before it.
_TABLE = """
length: 1 meter* metre* m* 米; 0.0254 inch in 英寸; 0.3048 foot feet ft 英尺; 0.9144 yard yd 码; 1609.344 mile mi 英里;
    1852 nautical-mile; 9460730472580800 light-year; 1000 公里 千米; 0.01 厘米; 0.001 毫米
mass: 1 gram* gramme* g* 克; 1000 千克 公斤; 500 斤; 453.59237 pound lb; 28.349523125 ounce oz; 1000000 tonne metric-ton 吨; 907184.74 ton
time: 1 second* sec s* 秒; 60 minute min 分钟; 3600 hour hr h 小时; 86400 day 天; 604800 week wk 周 星期; 2629746 month 月 个月;
    31556952 year yr 年; 315569520 decade; 3155695200 century
volume: 1 liter* litre* l* L* 升; 0.001 cc 毫升; 3.785411784 gallon gal; 0.946352946 quart qt; 0.473176473 pint pt; 0.2365882365 cup;
    0.0295735295625 fluid-ounce fl-oz; 0.01478676478125 tablespoon tbsp; 0.00492892159375 teaspoon tsp
dollar: 1 dollar usd us-dollar $ us$ buck 美元; 0.01 cent ¢ penny pennies
euro: 1 euro eur €; 0.01 euro-cent eurocent
sterling: 1 pound £ gbp quid 英镑; 0.01 pence
yuan: 1 yuan 元 块 块钱 rmb cny ¥ renminbi 人民币
yen: 1 yen jpy ¥ 日元
rupee: 1 rupee ₹ inr
celsius: 1 celsius degree-celsius degrees-celsius degree-c degree C centigrade 摄氏度
fahrenheit: 1 fahrenheit degree-fahrenheit degree-f degree F 华氏度
kelvin: 1 kelvin K
angle: 1 degree deg 度
power: 1 watt* W*; 745.69987158227022 horsepower hp
energy: 1 joule* J*; 4.184 calorie* cal*; 3600 watt-hour* Wh*
voltage: 1 volt* V*
current: 1 ampere* amp* A*
resistance: 1 ohm*
force: 1 newton* N*
pressure: 1 pascal* Pa*; 101325 atm
frequency: 1 hertz* Hz*
amount: 1 mole* mol*
data: 1 bit*; 8 byte* B*; 8000 KB
person: 1 person people persons 人
"""
_PREFIXES = {
    "kilo": 3, "mega": 6, "giga": 9, "tera": 12, "hecto": 2, "deca": 1, "deci": -1, "centi": -2, "milli": -3, "micro": -6, "nano": -9,
    "k": 3, "M": 6, "G": 9, "T": 12, "h": 2, "d": -1, "c": -2, "m": -3, "μ": -6, "n": -9,
}  # fmt: skip
_SHORT = {"mph": "mile / hour", "kph": "km / hour", "kmh": "km / hour", "mpg": "mile / gallon", "bps": "bit / second"}


def _units() -> dict[str, list[Unit]]:
    """By each name and symbol, with each prefix that fits: what it may mean."""
    found: dict[str, list[Unit]] = {}
    for dimension, rows in re.findall(r"(\w+): ([^:]+)(?:\n|$)", re.sub(r"\n +", " ", _TABLE)):
        for size, *names in map(str.split, rows.split(";")):
            for name in names:
                for prefix, exponent in _prefixes(name).items():
                    unit = Unit(((dimension, 1),), Fraction(size) * Fraction(10) ** exponent)
                    found.setdefault(prefix + name.strip("*").replace("-", " "), []).append(unit)
    return found


def _prefixes(name: str) -> dict[str, int]:
    """Names take whole prefixes, symbols letters, and `amp` and `cal` both."""
    length = len(name.strip("*"))
    fits = {True: length > 2, False: length < 4}
    return {"": 0} | {one: power for one, power in _PREFIXES.items() if name.endswith("*") and fits[len(one) > 1]}


_UNITS = _units()
CURRENCIES = "$€£¥₹¢"
CHINESE_UNITS = sorted((name for name in _UNITS if re.match("[\u4e00-\u9fff]", name)), key=len, reverse=True)


# Words after which no more is said of what is counted, and words that change the number, with which it is none.
_ENDING = """in of for on at from by with to left total altogether together remaining more each every who that which when while
during after before and so as because since if overall instead now then there here all away apart long tall high wide deep old only too"""
_CHANGING = """or not is are was were be isn't squared cubed below above less fewer than minus plus under over short percentage factorial
wrong incorrect fails violates contradicts disagrees differs maybe mod modulo base negative no zillion gazillion bazillion jillion"""
ENDS = frozenset(_ENDING.split())
_CHANGES = frozenset(_CHANGING.split()) | NUMBER_WORDS


def units_of(phrase: str) -> tuple[Unit, ...] | None:
    """The units that a phrase behind a number may name, none where it says nothing of units. None where it is no such phrase."""
    text = re.sub(r"\\cdot(?![a-z])|·|\*", " ", phrase).strip(" .")
    text = re.sub(r"\b(?:per|an?)\s+(?=[A-Za-z])", "/ ", text)
    text = re.sub(r"[A-Za-z]+", lambda found: _SHORT.get(found[0].casefold(), found[0]), text)
    candidates: list[Unit] = [Unit(())]
    for at, part in enumerate(text.split("/")):
        found = _product(part.strip(), lone=at == 0)
        if found is None:
            return None
        candidates = [_times(one, other, 1 if at == 0 else -1) for one, other in product(candidates, found)][:8]
    return tuple(unit for unit in candidates if unit.dimensions)


def _product(text: str, *, lone: bool) -> list[Unit] | None:
    """The units of a phrase without `per`: one, several with powers (`kg m^2`), or a noun."""
    if not text:
        return [Unit(())] if lone else None
    squared = re.fullmatch(r"(square|sq\.?|cubic|cu\.?)\s+(.+)|(.+?)\s+(squared|cubed)", text, re.IGNORECASE)
    if squared:
        inner = _product((squared[2] or squared[3]).strip(), lone=lone)
        power = 2 if (squared[1] or squared[4])[0] in "sS" else 3
        return None if inner is None else [_times(Unit(()), unit, power) for unit in inner]
    if whole := _named(text):
        return whole
    found: list[Unit] = [Unit(())]
    for factor in re.findall(r"\S+?(?:\s*\^\s*\{?\s*-?\d\s*\}?)(?=\s|$)|\S+", text):
        name, _, power = factor.partition("^")
        units = _named(name.strip())
        digits = power.strip(" {}") or "1"
        if not units or not re.fullmatch(r"-?\d", digits):
            return _noun(text)
        found = [_times(one, other, int(digits)) for one, other in product(found, units)][:8]
    return found


def _named(name: str) -> list[Unit]:
    small = re.sub(r"\s+", " ", name).casefold()
    longer = [small, _one(small), _one(small).removesuffix("e")] if len(small) > 1 else []
    return next((_UNITS[each] for each in (name, *longer) if each in _UNITS), [])


def _noun(text: str) -> list[Unit] | None:
    """What is counted, by the words before a preposition or the like. None where a word changes the number or this is no noun."""
    words = text.split()
    if not all(re.fullmatch(r"[A-Za-z][A-Za-z'’-]*[,.]?|[\u4e00-\u9fff]+", word) for word in words):
        return None
    words = [word.casefold().strip(",.") for word in words]
    words = words[: next((at for at, word in enumerate(words) if word in ENDS), len(words))]
    if 1 < len(words) < len(text.split()) and (known := _product(" ".join(words), lone=True)):
        return known
    if any({word, word.removesuffix("s")} & _CHANGES for word in words) or any(
        len(word) < 2 for word in words if word.isascii()
    ):
        return None
    if not words:
        return [Unit(())]
    if len(words) == 1 and (known := _named(words[0])):
        return known
    return [Unit(((_NOUN + " ".join(_one(word) for word in words), 1),))]


def _one(word: str) -> str:
    """A noun's singular, or near enough: it is only compared with another's."""
    return re.sub("ies$", "y", word) if word.endswith("ies") else re.sub("(?<=ss|.x|ch|sh)es$|(?<!s)s$", "", word)


def _times(one: Unit, other: Unit, power: int) -> Unit:
    powers = dict(one.dimensions)
    for dimension, exponent in other.dimensions:
        powers[dimension] = powers.get(dimension, 0) + power * exponent
    return Unit(tuple(sorted((d, e) for d, e in powers.items() if e)), one.size * other.size**power)


def ratio_of(gold: tuple[Unit, ...], answer: tuple[Unit, ...]) -> Fraction | None:
    """What an answer's number is multiplied by to be in the gold's units. None where they measure different things.

    A unit may be left out on either side. Nouns are the same where one only says more than the other (`red apples`).
    """
    if not gold or not answer:
        return Fraction(1)
    for one, other in product(gold, answer):
        if one.dimensions == other.dimensions or _same_nouns(one, other):
            return other.size / one.size
    return None


def _same_nouns(one: Unit, other: Unit) -> bool:
    if not all(len(unit.dimensions) == 1 and unit.dimensions[0][0].startswith(_NOUN) for unit in (one, other)):
        return False
    (first, power), (second, other_power) = one.dimensions[0], other.dimensions[0]
    shorter, longer = sorted((first.split()[1:], second.split()[1:]), key=lambda words: len(set(words)))
    return power == other_power and shorter[-1] == longer[-1] and set(shorter) <= set(longer)
