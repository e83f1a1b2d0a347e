"""Which language a few words of one script are in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

_LEAST_LETTERS = 24  # below, only common words tell
_MOST_LETTERS = 2000  # more tell no more
_SURE = 0.6  # the probability that a language needs; a text's length is in it
_BY_SCRIPTS = {
    "Cyrillic": "be bg kk ky mk mn ru uk", "Cyrillic Latin": "sr", "Arabic": "ar fa ps ug ur", "Devanagari": "hi mr ne", "Han": "zh",
    "Han Kana": "ja", "Bengali": "as bn", "Hangul": "ko", "Greek": "el", "Hebrew": "he", "Thai": "th", "Lao": "lo", "Khmer": "km",
    "Tamil": "ta", "Telugu": "te", "Kannada": "kn", "Malayalam": "ml", "Gujarati": "gu", "Gurmukhi": "pa", "Oriya": "or", "Sinhala": "si",
    "Armenian": "hy", "Georgian": "ka", "Ethiopic": "am", "Tibetan": "dz",
    "Latin": "af an az br bs ca cs cy da de en eo es et eu fi fo fr ga gl hr ht hu id is it jv ku la lb lt lv mg ms mt nb nl nn "
    "no oc pl pt qu ro rw se sk sl sq sv sw tl tr vi vo wa xh zu",
}  # fmt: skip
SCRIPTS = {code: frozenset(scripts.split()) for scripts, codes in _BY_SCRIPTS.items() for code in codes.split()}
# The others in Latin script are hardly ever meant, and noise in short texts.
_LIKELY = "ca cs da de en es fi fr hr hu id it la lt nl no pl pt ro sk sl sv sw tl tr vi"
_FAMILIES = (
    "no nb nn da", "hr bs sr sl", "id ms jv", "es gl an ca", "pt gl", "cs sk", "be ru uk", "bg mk", "hi mr ne", "as bn",
)  # fmt: skip
_COMMON = {
    "en": "the is are was and of to that this it you we they with for from have has be not what how which can will so "
    "then there if by at let answer because when my your he she his her solve find yes each step first next",
    "es": "el la los las es son y de que un una con por para del se su en lo más pero como cuál qué cómo está hay "
    "entonces respuesta porque cuando mi primero luego sí al cada",
    "fr": "le la les est sont et de que un une des du dans pour avec par il elle nous vous je qui ne pas ce cette sur "
    "au donc réponse quel quelle comment parce quand mon puis oui chaque",
    "de": "der die das ist sind und von dass ein eine einen mit für aus wir sie ich nicht auf zu den dem im wie was "
    "also dann antwort weil wenn mein zuerst ja jede auch es",
    "it": "il lo la gli è sono e di che un una con per del della non si in come quale cosa quindi risposta perché "
    "quando mio prima poi ogni",
    "pt": "o a os as é são e de que um uma com por para do da não se em no na como qual então resposta porque quando "
    "meu primeiro depois sim cada",
}
_WORDS = {language: frozenset(words.split()) for language, words in _COMMON.items()}


def family(language: str) -> set[str]:
    """The language, and those that a short text can't be told apart from it."""
    return {language}.union(*(group.split() for group in _FAMILIES if language in group.split()))


def identify(script: str, words: Sequence[str], expected: str = "") -> str:
    """The language of words of a script, or empty where it can't be told. Of `expected` less is asked than of others."""
    codes = _codes(script)
    if len(codes) <= 1:
        return next(iter(codes), "")
    told = _by_common_words(words) if script == "Latin" else ""
    if told or sum(map(len, words)) < _LEAST_LETTERS:
        return told
    language, sure = _by_letters(frozenset({*codes, expected} - {""}), " ".join(words)[:_MOST_LETTERS])
    return language if sure >= _SURE else ""


@functools.cache
def _codes(script: str) -> frozenset[str]:
    if script == "Latin":
        return frozenset(_LIKELY.split())
    return frozenset(code for code, scripts in SCRIPTS.items() if script in scripts)


def _by_common_words(words: Sequence[str]) -> str:
    """The language most of whose common words stand there, if no other comes near."""
    lower = [word.lower() for word in words]
    hits = {language: sum(word in common for word in lower) for language, common in _WORDS.items()}
    first, second = sorted(hits, key=lambda language: (-hits[language], language))[:2]
    return first if hits[first] >= max(1, len(words) / 5, 2 * hits[second]) else ""


def _by_letters(codes: frozenset[str], text: str) -> tuple[str, float]:
    """The likeliest of the languages, and its probability among them."""
    ranked = [(language, float(share)) for language, share in _identifier().rank(text) if language in codes]
    total = sum(share for _, share in ranked)
    return (ranked[0][0], ranked[0][1] / total) if total > 0 else ("", 0.0)


@functools.cache
def _identifier() -> Any:
    """py3langid's own model, read once: that takes half a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
