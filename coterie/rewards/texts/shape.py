"""Rewards for the shape of a text: its format, its length, and how much it repeats itself.

All are linear in the length of a completion, whatever stands in it; a pattern of the user's own has a time limit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import regex

from coterie.errors import RewardError, UserError
from coterie.rewards.text_of import completion_text

_MAX_CHARACTERS = 200_000  # of a longer completion `repetition` reads the end, where loops are
_LONGEST_WORD = 12  # what is longer is cut, so that a loop without spaces is no single word
_SEEN = regex.compile(r"[^\s\p{Cf}]")  # what is neither space nor a mark without width
_BOX = "\\boxed{"


@dataclass(frozen=True)
class Format:
    r"""1 for a completion that has the format, else 0; with `score: share` the share of the demands that it meets.

    tags: [think, answer] demands `<think>...</think> <answer>...</answer>`: each tag once, in this order, with something
    in it, and (`alone`) nothing around them. opened: the prompt's template already wrote the first opening tag.
    sections: headings that begin a line, each once, in this order, with something below. boxed: the last `\boxed{...}` is
    closed and not empty. pattern: a regular expression that is found in the text; `\A` and `\Z` are its ends.
    """

    tags: Sequence[str] = ()
    alone: bool = True
    opened: bool = False
    sections: Sequence[str] = ()
    boxed: bool = False
    pattern: str = ""
    score: Literal["all", "share"] = "all"
    seconds: float = 0.2  # for the pattern; a completion that takes longer is a failure
    longest: int = 100_000  # characters; a longer completion does not have the pattern

    def __post_init__(self) -> None:
        for option in ("tags", "sections"):
            names = getattr(self, option)
            if isinstance(names, str) or not all(isinstance(name, str) and name.strip() for name in names):
                raise UserError(f"rewards: format: {option} is a list of names, got {names!r}")
            if len(set(names)) < len(names):
                raise UserError(f"rewards: format: {option} names one twice: {list(names)}")
        if not (self.tags or self.sections or self.boxed or self.pattern):
            raise UserError("rewards: format needs at least one of tags, sections, boxed and pattern")
        if self.opened and not self.tags:
            raise UserError("rewards: format: opened is about the first of the tags, and there are none")
        _check_choice("format: score", self.score, "all", "share")
        _compiled(self.pattern)

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | Exception]:
        return [self._scored(completion_text(completion)) for completion in completions]

    def _scored(self, text: str) -> float | Exception:
        try:
            met = [*self._tags_met(text), *_sections_met(text, self.sections), *self._others_met(text)]
        except TimeoutError:
            return RewardError(f"the pattern took longer than {self.seconds:g} s on a text of {len(text)} characters")
        return float(all(met)) if self.score == "all" else sum(met) / len(met)

    def _tags_met(self, text: str) -> list[bool]:
        """Whether each tag stands there once and is filled; and whether they are in order, with nothing around them."""
        if not self.tags:
            return []
        text = f"<{self.tags[0]}>{text}" if self.opened else text
        spans = [_span(text, tag) for tag in self.tags]
        found = [span for span in spans if span is not None]
        whole = len(found) == len(spans)
        ordered = whole and all(left[1] <= right[0] for left, right in pairwise(found))
        if ordered and self.alone:
            ends = [0, *(end for span in found for end in span), len(text)]
            ordered = not any(text[a:b].strip() for a, b in zip(ends[::2], ends[1::2], strict=True))
        filled = [span is not None and _filled(text, span, tag) for span, tag in zip(spans, self.tags, strict=True)]
        return [*filled, ordered]

    def _others_met(self, text: str) -> list[bool]:
        met = [_is_boxed(text)] if self.boxed else []
        if self.pattern:
            pattern = _compiled(self.pattern)
            met.append(len(text) <= self.longest and pattern.search(text, timeout=self.seconds) is not None)
        return met


def _span(text: str, tag: str) -> tuple[int, int] | None:
    """Where `<tag>...</tag>` begins and ends, if both stand there exactly once and in this order."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening), text.index(closing)
    return (start, end + len(closing)) if start < end else None


def _filled(text: str, span: tuple[int, int], tag: str) -> bool:
    return _SEEN.search(text, span[0] + len(tag) + 2, span[1] - len(tag) - 3) is not None


def _sections_met(text: str, sections: Sequence[str]) -> list[bool]:
    """Whether each heading stands there once with something below it; and whether they are in order."""
    if not sections:
        return []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    places = [[i for i, line in enumerate(lines) if _is_heading(line, section)] for section in sections]
    heads = {place for found in places for place in found}

    def has_text(place: int, section: str) -> bool:
        below = place + 1 < len(lines) and place + 1 not in heads
        return below or len(lines[place]) > len(section.strip())

    met = [len(found) == 1 and has_text(found[0], section) for found, section in zip(places, sections, strict=True)]
    firsts = [found[0] for found in places if found]
    return [*met, len(firsts) == len(sections) and firsts == sorted(firsts)]


def _is_heading(line: str, section: str) -> bool:
    """Whether a line is this heading, or begins with it as with a whole word: `Plan: ...`, not `Planning`."""
    section = section.strip()
    rest = line[len(section) :]
    return line.startswith(section) and (not rest or not section[-1].isalnum() or not rest[0].isalnum())


def _is_boxed(text: str) -> bool:
    """Whether the last box is closed and holds something."""
    start = text.rfind(_BOX)
    depth, at = 1, start + len(_BOX)
    if start < 0:
        return False
    for place in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return bool(text[at:place].strip())
    return False


@functools.lru_cache(maxsize=64)
def _compiled(pattern: str) -> regex.Pattern[str]:
    """The engine of `regex` has a time limit of its own, which holds in any thread; that of `re` has none."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"rewards: format: the pattern {pattern!r:.80} is no regular expression: {error}") from error


@dataclass(frozen=True)
class Length:
    """0 for a length from `at_least` to `at_most`, falling to -1 over the next `margin` tokens or characters outside.

    With at_least = 0 this is the soft overlong punishment of DAPO (arXiv 2503.14476, section 3.4): its longest
    length is at_most + margin here, and its cache is the margin. Tokens include the end token.
    """

    at_most: int | None = None
    at_least: int = 0
    margin: int = 0
    unit: Literal["tokens", "characters"] = "tokens"

    def __post_init__(self) -> None:
        _check_choice("length: unit", self.unit, "tokens", "characters")
        for option in ("at_most", "at_least", "margin"):
            value = getattr(self, option)
            if value is not None and (type(value) is not int or value < 0):
                raise UserError(f"rewards: length: {option} is a whole number of 0 or more, got {value!r}")
        if self.at_most is None and not self.at_least:
            raise UserError("rewards: length needs at_most, at_least or both")
        if self.at_most is not None and self.at_most < self.at_least:
            raise UserError(f"rewards: length: at_least {self.at_least} is above at_most {self.at_most}")

    @property
    def reads_tokens(self) -> bool:
        """Whether it needs `completion_ids`, which take a tokenizer where nothing was sampled."""
        return self.unit == "tokens"

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None, **_: Any
    ) -> list[float]:
        if self.unit == "characters":
            return [self._scored(len(completion_text(completion))) for completion in completions]
        if completion_ids is None:
            raise UserError("rewards: length counts tokens and there are none here; set unit: characters")
        return [self._scored(len(tokens)) for tokens in completion_ids]

    def _scored(self, length: int) -> float:
        outside = max(self.at_least - length, 0 if self.at_most is None else length - self.at_most, 0)
        return 0.0 if not outside else -min(1.0, outside / self.margin if self.margin else 1.0)


@dataclass(frozen=True)
class Repetition:
    """0 for a text that repeats at most the share `allowed` of its n-grams, falling to -1 where all are the same.

    The share is 1 - distinct / all (seq-rep-n, arXiv 1908.04319, section 4.1; as a penalty on reasoning: arXiv 2502.03373).
    An n-gram is of words, or of characters where a script has no spaces, as Chinese. Digits count one by one, so
    that sums do not look alike. A text of fewer than `n` words repeats nothing.
    """

    n: int = 6
    allowed: float = 0.2

    def __post_init__(self) -> None:
        if type(self.n) is not int or not 1 <= self.n <= 50:
            raise UserError(f"rewards: repetition: n is a whole number from 1 to 50, got {self.n!r}")
        if isinstance(self.allowed, bool) or not isinstance(self.allowed, int | float) or not 0 <= self.allowed < 1:
            raise UserError(f"rewards: repetition: allowed is a share from 0 to below 1, got {self.allowed!r}")

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        shares = [repeated_share(completion_text(completion), self.n) for completion in completions]
        return [min(0.0, (self.allowed - share) / (1 - self.allowed)) for share in shares]


# Scripts without spaces, then numbers digit by digit, then words in pieces, then every mark by itself.
_UNITS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|\d"
    rf"|[\p{{L}}\p{{M}}_']{{1,{_LONGEST_WORD}}}|[^\s\p{{L}}\p{{M}}\d]"
)


def repeated_share(text: str, n: int) -> float:
    """The share of a text's n-grams that have stood there before; 0 where there are none."""
    units = _UNITS.findall(text[-_MAX_CHARACTERS:].casefold())
    count = len(units) - n + 1
    if count < 1:
        return 0.0
    return 1 - len(set(zip(*(units[i : i + count] for i in range(n)), strict=True))) / count


def _check_choice(option: str, value: object, *allowed: str) -> None:
    if value not in allowed:
        raise UserError(f"rewards: {option} is one of {', '.join(allowed)}, got {value!r}")
