"""Whether a completion keeps to the language of its prompt.

Scripts decide first: Han against Latin needs no statistics and holds for two characters. Only languages that share
a script are told apart by their words and by py3langid, and only where there is enough text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coterie.errors import UserError, nearest
from coterie.rewards.text_of import completion_text, prompt_text
from coterie.rewards.texts.identify import SCRIPTS, family, identify
from coterie.rewards.texts.scripts import Word, sentences

_MAX_CHARACTERS = 100_000  # of a longer completion the beginning is judged
_CHUNK = 80  # letters of the sentences that are identified together
_DOMINANT = 0.6  # the share of a prompt that its language must have
_KANA = 0.15  # the share of a sentence's Han and kana from which on it is Japanese
_SURELY_CHINESE = 10  # Han characters in a row of sentences without any kana
_NAMES = 0.5  # names in a foreign script, to the words around them
_NAMES_OF_LANGUAGES = {"english": "en", "chinese": "zh", "中文": "zh", "japanese": "ja", "spanish": "es", "french": "fr", "german": "de"}  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """The language that is asked for, and its scripts. language is empty where only the script is known."""

    language: str
    scripts: frozenset[str]


@dataclass(frozen=True)
class Language:
    """The share of a completion's words that is in the language of its prompt, from 0 to 1.

    language: a code such as en or zh for all completions; else the column `language`, where the data has one; else the
    prompt's own. Abstains where a completion has no words (code, formulas and numbers are none) or `nothing`, a
    number, is its value there; and where the prompt's language can't be told.
    """

    language: str = ""
    nothing: float | None = None

    def __post_init__(self) -> None:
        if self.language:
            language_code(self.language)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], language: Sequence[str | None] | None = None, **_: Any
    ) -> list[float | None]:
        asked = [self.language or code or "" for code in language or [None] * len(completions)]
        rows = zip(prompts, completions, asked, strict=True)
        return [self._scored(prompt_text(p), completion_text(c), code) for p, c, code in rows]

    def _scored(self, prompt: str, completion: str, code: str) -> float | None:
        expected = expected_of(code) if code else language_of(prompt)
        if expected is None:
            return None
        share = share_in(completion, expected, prompt)
        return self.nothing if share is None else share


def language_code(name: str) -> str:
    """`zh-CN`, `ZH_Hans`, `Chinese` -> zh. Raises UserError for a language that there is not."""
    code = str(name).strip().lower()
    code = _NAMES_OF_LANGUAGES.get(code, code.replace("_", "-").partition("-")[0])
    if code not in SCRIPTS:
        raise UserError(f"rewards: language: there is no {name!r}; {nearest(code, SCRIPTS)}")
    return code


@functools.lru_cache(maxsize=256)
def expected_of(name: str) -> Expected:
    code = language_code(name)
    return Expected(code, SCRIPTS[code])


@functools.lru_cache(maxsize=4096)
def language_of(prompt: str) -> Expected | None:
    """What a prompt is written in; None where it has no words, or no language makes up most of it."""
    words = [word for sentence in sentences(prompt[:_MAX_CHARACTERS]) for word in sentence]
    amounts: dict[str, float] = {}
    for word in words:
        amounts[word.script] = amounts.get(word.script, 0) + word.units
    eastern = amounts.get("Han", 0) + amounts.get("Kana", 0)
    if eastern and eastern >= _DOMINANT * sum(amounts.values()):
        return expected_of("ja" if _is_japanese(words) else "zh")
    if not amounts or max(amounts.values()) < _DOMINANT * sum(amounts.values()):
        return None
    script = max(amounts, key=lambda name: amounts[name])
    language = identify(script, [word.text for word in words if word.script == script])
    return expected_of(language) if language else Expected("", frozenset({script}))


def _is_japanese(words: Sequence[Word]) -> bool:
    kana, han = _num_letters(words, "Kana"), _num_letters(words, "Han")
    return kana > 0 and kana >= _KANA * (kana + han)


def _is_chinese(words: Sequence[Word]) -> bool:
    return not _num_letters(words, "Kana") and _num_letters(words, "Han") >= _SURELY_CHINESE


def _num_letters(words: Sequence[Word], *scripts: str) -> int:
    """Of these scripts, or of all where none is named."""
    return sum(len(word.text) for word in words if not scripts or word.script in scripts)


def share_in(text: str, expected: Expected, prompt: str = "") -> float | None:
    """The share of a text's words that is in a language, None if there are none to judge.

    A word in another script is left out where the prompt has it, and where it is a name among enough words of the
    language. Every other one counts against it.
    """
    found = sentences(text[:_MAX_CHARACTERS])
    inside, outside = 0.0, 0.0
    own: list[list[Word]] = []  # of each sentence, what is in a script of the language
    for sentence in found:
        native = [word for word in sentence if word.script in expected.scripts]
        amount = sum(word.units for word in native)
        outside += _foreign(sentence, expected, amount, prompt)
        inside += amount
        own.append(native)
    wrong = min(inside, _of_another_language(own, found, expected))
    total = inside + outside
    return None if total == 0 else (inside - wrong) / total


def _foreign(sentence: Sequence[Word], expected: Expected, native: float, prompt: str) -> float:
    """How many units of a sentence are in a script that its language does not use, names and the prompt's words left out."""
    foreign = [word for word in sentence if word.script not in expected.scripts and word.text not in prompt]
    names = sum(word.units for word in foreign if word.is_name)
    return sum(word.units for word in foreign) - min(names, _NAMES * native)


def _of_another_language(own: Sequence[Sequence[Word]], whole: Sequence[Sequence[Word]], expected: Expected) -> float:
    """How many units are in the right script and yet in another language."""
    if expected.language == "zh":
        return sum(word.units for s, full in zip(own, whole, strict=True) if _is_japanese(full) for word in s)
    if expected.language == "ja":
        return sum(word.units for part in _stretches(own, _SURELY_CHINESE) if _is_chinese(part) for word in part)
    if not expected.language:
        return 0.0
    wrong = 0.0
    for part in _stretches(own, _CHUNK):
        told = identify(part[0].script, [word.text for word in part], expected.language) if part else ""
        if told and told not in family(expected.language):
            wrong += sum(word.units for word in part)
    return wrong


def _stretches(own: Sequence[Sequence[Word]], least: int) -> list[list[Word]]:
    """Sentences put together until each stretch has `least` letters; what is left at the end joins the last one."""
    parts: list[list[Word]] = [[]]
    for sentence in own:
        if _num_letters(parts[-1]) >= least:
            parts.append([])
        parts[-1] += sentence
    if len(parts) > 1 and _num_letters(parts[-1]) < least:
        last = parts.pop()
        parts[-1] += last
    return parts
