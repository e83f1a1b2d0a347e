"""Whether two answers are the same mathematical value: their structure, and plain numbers in exact fractions.

A text is tidied to one spelling, read as a value of one of the kinds below, and the values are compared. What needs algebra is
asked of a function, so that this file can run in the trainer: it evaluates nothing that it reads, and the work that a text can
cause is bounded by its length. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from coterie.rewards.maths.numbers import DECIMAL, number
from coterie.rewards.maths.quantities import Clock, Quantity, read_clock, read_quantity, same_clock, same_quantity
from coterie.rewards.maths.tidy import CLOSE, OPEN, is_words, plain, tidy, words_only

Algebra = Callable[[str, str], bool]

_MAX_ITEMS = 40
_MAX_DEPTH = 8


class UndecidedError(Exception):
    """The two texts have to be compared by algebra."""


@dataclass(frozen=True)
class Words:
    """`Monday`: text that is no mathematics."""

    text: str


@dataclass(frozen=True)
class Named:
    """`x = 3`. whole: the equation as it stands."""

    name: str
    value: Value
    whole: str

    @property
    def is_curve(self) -> bool:
        """`y = 2x + 1`: an equation of two unknowns, and none that was solved."""
        return self.name in ("y", "z") and bool({"x", "y"} & _letters(_written(self.value)))


@dataclass(frozen=True)
class Chain:
    """`2 + 3 = 5`: sides that have to be equal, of which the last is the answer."""

    sides: tuple[Value, ...]


@dataclass(frozen=True)
class Many:
    """`{1, 2}` or `1, 2`: the order says nothing. distinct: a set, where repeating says nothing either."""

    items: tuple[Value, ...]
    distinct: bool


@dataclass(frozen=True)
class Ordered:
    """`(1, 2)` or `[1, 2)`: a point or an interval. A matrix has its rows as items, and "||" for brackets."""

    brackets: str
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Region:
    r"""`x < 1 or x > 2`, `(-\infty, 1) \cup (2, \infty)`: solved, as some of the real numbers. name: of the unknown, if it has one."""

    text: str
    name: str


@dataclass(frozen=True)
class Relation:
    """An equation or inequality that is not solved: `2x + 3 = 7`, `|x| < 2`."""

    text: str


Value = Quantity | Clock | Words | Named | Chain | Many | Ordered | Region | Relation


def same_text(gold: str, answer: str) -> bool:
    """Whether they are spelt the same but for case of words, spaces and the end of the sentence."""
    return bool(plain(gold)) and plain(gold) == plain(answer)


def equal(gold: str, answer: str, algebra: Algebra, *, unevaluated: bool = False) -> bool:
    """Whether the answer has the gold's value. Raises what `algebra` raises, which is asked of single values.

    unevaluated: whether arithmetic that was not carried out (`17 \\cdot 23`) may stand for a plain number.
    """
    one, other = number(gold), number(answer)
    if one is not None and other is not None:
        return one == other
    if same_text(gold, answer):
        return True
    choice = re.fullmatch(r"\(?([A-J])\)?", words_only(gold))
    if choice:
        given = words_only(answer)
        chosen = re.fullmatch(rf"(?:\({choice[1]}\)|{choice[1]}(?=\s*[.:)]|$))(.*)", given)
        return chosen is not None and not _OTHER_CHOICE.search(chosen[1])
    known, given = tidy(gold), tidy(answer)
    return bool(known and given) and _Comparison(algebra, unevaluated).same(read(known), read(given))


_OTHER_CHOICE = re.compile(r"(?<![A-Za-z])[A-J][.):,]|(?:^[\s.:)]*|[,/]\s*|\b(?:and|or) )[A-J]\s*$")  # `B) C)`


def parts(gold: str) -> list[str]:
    """The single values in it that algebra would have to read: what is neither a plain number nor words."""
    found, stack = [], [read(tidy(gold))]
    while stack:
        one = stack.pop()
        if isinstance(one, Quantity):
            found += [] if one.number is not None else [one.text]
        elif isinstance(one, Relation | Region):
            found.append(one.text)
        elif isinstance(one, Named):
            stack.append(one.value)
        elif isinstance(one, Chain | Many | Ordered):
            stack += one.sides if isinstance(one, Chain) else one.items
    return found


# ---- comparing


@dataclass(frozen=True)
class _Comparison:
    """Whether values are the same, the gold's first. A value that is solved is only equal to one that is."""

    algebra: Algebra
    unevaluated: bool

    def same(self, gold: Value, answer: Value) -> bool:
        gold, answer = _unwrapped(gold), _unwrapped(answer)
        if isinstance(answer, Chain):
            *work, last = answer.sides
            lax = _Comparison(self.algebra, unevaluated=True)
            return self.same(gold, last) and all(lax.same(gold, side) for side in work)
        if isinstance(gold, Chain):
            return self.same(gold.sides[-1], answer)
        if isinstance(gold, Ordered) and isinstance(answer, Many):
            answer = _by_name(answer, gold.brackets)
        if isinstance(gold, Region) or isinstance(answer, Region):
            return self._same_region(gold, answer)
        if isinstance(gold, Named | Relation) or isinstance(answer, Named | Relation):
            return self._same_named(gold, answer)
        if isinstance(gold, Many) and isinstance(answer, Many):
            return self._same_items(gold, answer)
        if isinstance(gold, Ordered) and isinstance(answer, Ordered):
            return self._same_ordered(gold, answer)
        if isinstance(gold, Words) and isinstance(answer, Words):
            return gold.text == answer.text
        if isinstance(gold, Clock) or isinstance(answer, Clock):
            return same_clock(gold, answer)
        if isinstance(gold, Quantity) and isinstance(answer, Quantity):
            return same_quantity(gold, answer, self.algebra, unevaluated=self.unevaluated)
        return False

    def _same_named(self, gold: Value, answer: Value) -> bool:
        """A name that only one of them gives is left out; an equation that is not solved is compared as a whole."""
        if isinstance(gold, Relation) or (
            isinstance(gold, Named) and gold.is_curve and not isinstance(answer, Quantity)
        ):
            if isinstance(answer, Named) and isinstance(gold, Named) and gold.name == answer.name:
                return self.same(gold.value, answer.value)
            whole = isinstance(answer, Relation) or (
                isinstance(answer, Named) and bool(_letters(_written(answer.value)))
            )
            return whole and self.algebra(_written(gold), _written(answer))
        if isinstance(answer, Relation):
            return False
        if isinstance(gold, Named) and isinstance(answer, Named) and gold.name != answer.name:
            return False
        pair = [one.value if isinstance(one, Named) else one for one in (gold, answer)]
        return self.same(*pair)

    def _same_items(self, gold: Many, answer: Many) -> bool:
        """Each item has a partner. Equality is transitive, so any partner will do."""
        one, other = list(gold.items), list(answer.items)
        if gold.distinct or answer.distinct:
            one, other = self._without_repeats(one), self._without_repeats(other)
        if len(one) != len(other):
            return False
        for item in one:
            partner = next((i for i, candidate in enumerate(other) if self.same(item, candidate)), None)
            if partner is None:
                return False
            other.pop(partner)
        return True

    def _without_repeats(self, items: Iterable[Value]) -> list[Value]:
        kept: list[Value] = []
        for item in items:
            if not any(self.same(item, other) for other in kept):
                kept.append(item)
        return kept

    def _same_ordered(self, gold: Ordered, answer: Ordered) -> bool:
        if answer.brackets == "||" and gold.brackets == "()":  # a column as a point
            answer = Ordered("()", tuple(_unwrapped(row) for row in answer.items))
        if gold.brackets != answer.brackets or len(gold.items) != len(answer.items):
            return False
        return all(self.same(one, other) for one, other in zip(gold.items, answer.items, strict=True))

    def _same_region(self, gold: Value, answer: Value) -> bool:
        """Solved inequalities, intervals, sets and their unions, by algebra. A gold that was not solved may be here."""
        one, other = ("" if isinstance(value, Relation) else _region_of(value) for value in (gold, answer))
        if one is None or not other:
            return False
        names = {value.name for value in (gold, answer) if isinstance(value, Region | Named)} - {""}
        return len(names) < 2 and self.algebra(one or _written(gold), other)


def _unwrapped(value: Value) -> Value:
    """A set or list of one is its item, and so is what stands in round or square brackets alone."""
    while isinstance(value, Many | Ordered) and len(value.items) == 1 and getattr(value, "brackets", "") != "||":
        value = value.items[0]
    return value


def _by_name(answer: Many, brackets: str) -> Value:
    """`x = 3, y = -1` as the point `(3, -1)`."""
    named = [item for item in answer.items if isinstance(item, Named)]
    names = [item.name for item in named]
    if brackets != "()" or len(named) != len(answer.items) or len(set(names)) != len(names):
        return answer
    return Ordered(brackets, tuple(item.value for item in sorted(named, key=lambda item: item.name)))


def _written(value: Value) -> str:
    if isinstance(value, Chain):
        return _written(value.sides[-1])
    if isinstance(value, Many | Ordered):
        inner = ", ".join(_written(item) for item in value.items)
        return f"{value.brackets[0]}{inner}{value.brackets[1]}" if isinstance(value, Ordered) else OPEN + inner + CLOSE
    return value.whole if isinstance(value, Named) else "" if isinstance(value, Clock) else value.text


def _region_of(value: Value) -> str | None:
    """An interval, a set or a solved inequality as algebra reads it. None for anything else."""
    if isinstance(value, Named):
        return _region_of(value.value)
    is_region = isinstance(value, Region | Many | Quantity) or (isinstance(value, Ordered) and len(value.items) == 2)
    return (OPEN + _written(value) + CLOSE if isinstance(value, Quantity) else _written(value)) if is_region else None


# ---- intervals, solved inequalities and unions of them

REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|\\R(?![a-z])|(?:all )?reals?(?: numbers?)?", re.IGNORECASE)
OR = re.compile(r"\\cup(?![a-z])|\\(?:lor|vee)(?![a-z])|\bor\b|(?<=[\])])\s*U\s*(?=[\[(])")
AND = re.compile(r"\band\b|\\cap(?![a-z])|\\(?:land|wedge)(?![a-z])")
SIGNS = re.compile(r"(\\[lgn]e(?![a-zA-Z])|[<>]|(?<!\\)=)")


def _region(text: str) -> Region | Relation:
    """What has a sign of an inequality or a set of numbers in it: solved, if every part of it is."""
    names: set[str] = set()
    for part in (part.strip(" ,") for either in OR.split(text) for part in AND.split(either)):
        member = re.fullmatch(rf"({NAME})\s*\\in(?![a-z])\s*(.+)", part)
        name, part = (member[1], member[2]) if member else ("", part)
        if SIGNS.search(part):
            sides = [side.strip() for side in SIGNS.split(part)][::2]
            named = [at for at, side in enumerate(sides) if re.fullmatch(NAME, side)]
            if len(sides) > 3 or len(named) != 1 or (len(sides) == 3 and named != [1]):
                return Relation(text)
            name = sides.pop(named[0])
            if any(not side or name in _letters(side) for side in sides):
                return Relation(text)
        elif not (brackets(part) in ("()", "[]", "(]", "[)", OPEN + CLOSE) or REALS.match(part)):
            return Relation(text)
        names |= {re.sub(r"[\s{}]", "", name)} - {""}
    return Region(text, "".join(names)) if len(names) < 2 else Relation(text)


def is_region(text: str) -> bool:
    """Whether a text that was written out for algebra is a region or set."""
    value = read(text)
    return isinstance(value, Region) or (isinstance(value, Many | Ordered) and _region_of(value) is not None)


def _letters(text: str) -> set[str]:
    """The names in a formula, letter by letter."""
    return set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", text)))


# ---- from a tidied text to a value

NAME = r"[A-Z]{2}|[A-Za-z](?:_(?:\{\w{1,6}\}|\w))?'?(?:\s*\([a-z](?:\s*,\s*[a-z])*\))?|[a-z]\s*\^\s*\{?\s*-1\s*\}?\s*\([a-z]\)|\\[a-z]+(?:_\w)?"
PREFIXED = re.compile(r"(?<![\w.])[-+]?0(?:[xX][\da-fA-F]+|[oO][0-7]+|[bB][01]+)(?!\w)")  # `0x1F`
_EQUALS = re.compile(r"(?<![<>!\\=])=(?!=)(?![^{}]*\})")  # outside of `_{k=1}`
_RELATIONS = re.compile(r"\\[lgn]e(?![a-zA-Z])|[<>]|\\cup(?![a-z])|\\setminus|\\mathbb|(?<=[\])])\s*U\s*(?=[\[(])")
_ENVIRONMENT = re.compile(r"\\begin\s*\{([a-zA-Z]*matrix|array)\}(?:\s*\{[^{}]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)


def read(text: str, depth: int = 0) -> Value:
    """The structure of a tidied text."""
    text = text.strip()
    if depth > _MAX_DEPTH:
        return Quantity(text, None)
    if clock := read_clock(text):
        return clock
    if PREFIXED.fullmatch(text):  # a number in another base is equal in its spelling alone
        return Words(text.casefold())
    ratio = re.fullmatch(rf"{DECIMAL}(?:\s*:\s*{DECIMAL}){{2,}}", text)
    if ratio:
        terms = [Fraction(term) for term in re.split(r"\s*:\s*", text)][:_MAX_ITEMS]
        return Ordered("::", tuple(Quantity(str(term), term / (sum(terms) or 1)) for term in terms))
    if is_words(text) and read_quantity(text).number is None:
        return Words(plain(text))
    matrix = _ENVIRONMENT.fullmatch(text)
    if matrix and "matrix" not in matrix[2] and matrix[1] not in ("vmatrix", "Vmatrix"):
        rows = re.sub(r"\\\\\s*$", "", matrix[2].strip()).split(r"\\")
        cells = [tuple(read(cell, depth + 1) for cell in row.split("&")) for row in rows]
        return Ordered("||", tuple(Ordered("||", row) if len(row) > 1 else row[0] for row in cells))
    builder = re.fullmatch(
        rf"[{OPEN}{{]\s*({NAME})\s*(?:\\in(?![a-z])[^:|]{{1,20}}?)?\s*(?:\\mid|\||:)(.+)[{CLOSE}}}]", text
    )
    if builder:
        return _region(builder[2].strip())
    if _RELATIONS.search(text) and not brackets(text) and len(split(text, words=False)) == 1:
        return _region(text)
    if text == r"\emptyset":
        return Many((), distinct=True)
    items = split(text)
    if 1 < len(items) <= _MAX_ITEMS:
        return Many(tuple(read(item, depth + 1) for item in items), distinct=False)
    around = brackets(text)
    if around:
        items = split(text[1:-1])[:_MAX_ITEMS]
        if around in (OPEN + CLOSE, "{}"):
            return Many(tuple(read(item, depth + 1) for item in items), distinct=True)
        if len(items) > 1 or around in ("()", "[]"):
            return Ordered(around, tuple(read(item, depth + 1) for item in items))
    if r"\pm" in text or r"\mp" in text:
        both = (text.replace(r"\pm", one).replace(r"\mp", other) for one, other in ("+-", "-+"))
        return Many(tuple(read(each, depth + 1) for each in both), distinct=False)
    member = re.fullmatch(rf"(?:{NAME})\s*\\in\s*(.+)", text)
    if member:
        return read(member[1], depth + 1)
    if _EQUALS.search(text):
        return _equation(text, depth)
    return read_quantity(text)


def _equation(text: str, depth: int) -> Value:
    """`x = 3`, a chain like `2 + 3 = 5`, or an equation that is not solved."""
    sides = [side.strip() for side in _EQUALS.split(text)][:_MAX_ITEMS]
    if not all(sides):
        return Relation(text)
    if len(sides) == 2 and re.fullmatch(NAME, sides[1]) and not re.fullmatch(NAME, sides[0]):
        sides.reverse()
    name = re.sub(r"[\s{}]", "", sides[0]) if re.fullmatch(NAME, sides[0]) else ""
    values = sides[1:] if name else sides
    if any(_RELATIONS.search(side) or name in _letters(side) for side in values):
        return Relation(text)
    if not name and any(_letters(side) for side in values):
        return Relation(text)
    *work, last = values
    found = tuple(read(side, depth + 1) for side in (*(re.sub(r"\$", "", side) for side in work), last))
    value = found[0] if len(found) == 1 else Chain(found)
    return Named(name, value, text) if name else value


def split(text: str, *, words: bool = True) -> list[str]:
    """Its items, where commas, semicolons, and (words) `and` and `or` stand outside all brackets."""
    if "matrix" in text:
        return [text]
    if words:
        text = re.sub(r",?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])(?!\s*\d+\s*/\s*\d)\s*", ",", text)
    cuts = [at for at, depth in enumerate(_depths(text)) if depth == 0 and text[at] in ",;"]
    items = [text[start + 1 : end] for start, end in pairwise((-1, *cuts, len(text)))]
    return [item for item in items if item.strip()]


def brackets(text: str) -> str:
    """The brackets that hold the whole of it, or the empty text."""
    if len(text) < 2 or text[0] not in "([{" + OPEN or text[-1] not in ")]}" + CLOSE:
        return ""
    *inner, last = _depths(text)
    return text[0] + text[-1] if last == 0 and 0 not in inner else ""


def _depths(text: str) -> list[int]:
    """How many brackets are open after each character."""
    return list(accumulate((at in "([{" + OPEN) - (at in ")]}" + CLOSE) for at in text))
