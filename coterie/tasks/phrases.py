"""What is asked and answered in the dialogue task, in English and Chinese (phrases.yaml), and the rules that an answer is judged by.

A content is a subject, a thing and a detail of it: the weather, Paris, tomorrow. Every sentence that answers names both,
and no phrase names another, so that a rule can tell what an answer is about. What an answer claims is made up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

LANGUAGES = ("en", "zh")
Phrases = Mapping[str, Sequence[str]]  # by language


@dataclass(frozen=True)
class Subject:
    """Things and details, each with its Chinese name, and what is asked and answered about them."""

    things: Mapping[str, str]
    details: Mapping[str, str]
    questions: Phrases
    answers: Phrases


@dataclass(frozen=True)
class Content:
    """What a question is about. Things and details go by their English names."""

    subject: str
    thing: str
    detail: str

    def question(self, language: str, which: int) -> str:
        return self._filled(SUBJECTS[self.subject].questions[language][which], language)

    def sentence(self, language: str, which: int) -> str:
        """What answers the question, with no word of courtesy."""
        return self._filled(SUBJECTS[self.subject].answers[language][which], language)

    def _filled(self, phrase: str, language: str) -> str:
        return phrase.format(thing=_NAMES[self.thing][language], detail=_NAMES[self.detail][language])


_TEXTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SUBJECTS = {name: Subject(**texts) for name, texts in _TEXTS["subjects"].items()}
OPENERS, CLOSERS, RUDE_OPENERS, RUDE_CLOSERS = _COURTESIES = [  # before and after the answer
    _TEXTS[name] for name in ("openers", "closers", "rude_openers", "rude_closers")
]
CONTENTS = [
    Content(name, thing, detail)
    for name, subject in SUBJECTS.items()
    for thing, detail in product(subject.things, subject.details)
]
NUM_PHRASES = 3  # of questions, and of answers, for each subject

_NAMES = {
    name: {"en": name, "zh": chinese}
    for subject in SUBJECTS.values()
    for name, chinese in (*subject.things.items(), *subject.details.items())
}


def _any_of(words: Mapping[str, Iterable[str]]) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(words['en'])})\b|{'|'.join(words['zh'])}", re.IGNORECASE)


_COURTESY, _RUDENESS = (_any_of(_TEXTS[name]) for name in ("courtesy", "rudeness"))
_SENTENCE = re.compile(r"[^.!?。！？]+[.!?。！？]")


# The rules: what is counted in an evaluation


def is_polite(text: str) -> bool:
    """A word of courtesy, and none of rudeness, in any language."""
    return bool(_COURTESY.search(text)) and not _RUDENESS.search(text)


def is_on_topic(text: str, thing: str, detail: str = "") -> bool:
    """The thing and the detail that were asked about are named, in any language, and no others. An empty detail is any."""
    return things_of(text) == {thing} and (not detail or details_of(text) == {detail})


def is_in_language(text: str, language: str) -> bool:
    """Chinese has Chinese characters and no Latin letters, English the other way round."""
    scripts = {"zh": re.search(r"[\u4e00-\u9fff]", text), "en": re.search(r"[A-Za-z]", text)}
    return all(bool(found) == (name == language) for name, found in scripts.items())


def is_well_formed(text: str) -> bool:
    """Nothing but sentences that the grammar has, none of them twice. It is no part of what is preferred: it shows decay."""
    said = _SENTENCE.findall(text)
    sentences = [sentence.strip() for sentence in said]
    return (
        "".join(said) == text
        and 0 < len(sentences) == len(set(sentences))
        and all(sentence in all_sentences() for sentence in sentences)
    )


def things_of(text: str) -> set[str]:
    """The things that a text names, by their English names."""
    return _named(text, [thing for subject in SUBJECTS.values() for thing in subject.things])


def details_of(text: str) -> set[str]:
    """The details that a text names, by their English names."""
    return _named(text, [detail for subject in SUBJECTS.values() for detail in subject.details])


def language_of(text: str) -> str:
    """Chinese where there is a Chinese character."""
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"


@cache
def all_sentences() -> frozenset[str]:
    """Every sentence that an answer can have."""
    said = {phrase for phrases in _COURTESIES for language in LANGUAGES for phrase in phrases[language]}
    said |= {c.sentence(language, i) for c in CONTENTS for language in LANGUAGES for i in range(NUM_PHRASES)}
    return frozenset(said - {""})


@cache
def all_words() -> tuple[list[str], list[str]]:
    """English words, each also with a space before it, and Chinese names; and the Chinese characters of the phrases."""
    phrases = [p for s in SUBJECTS.values() for named in (s.questions, s.answers) for p in _plain(named)]
    phrases += [p for named in _COURTESIES for p in _plain(named)]
    words = {word for phrase in (*phrases, *_NAMES) for word in re.findall(r"[A-Za-z]+", phrase)}
    spaced = [f"{space}{word}" for word in sorted(words) for space in (" ", "")]
    names = sorted(named["zh"] for named in _NAMES.values())
    return [*spaced, *names], sorted({c for text in (*phrases, *names) for c in text if not c.isascii()})


def _plain(phrases: Phrases) -> list[str]:
    """Phrases without their slots."""
    texts = [text for language in LANGUAGES for text in phrases[language]]
    return ["".join(literal + " " for literal, *_ in Formatter().parse(text)) for text in texts]


def _named(text: str, names: Iterable[str]) -> set[str]:
    lowered = f" {re.sub(r'[^a-z]+', ' ', text.lower())} "
    return {name for name in names if f" {name.lower()} " in lowered or _NAMES[name]["zh"] in text}
