"""Polite, on-topic answers in the question's language, in English and Chinese, preferred to answers that are not.

Questions come from a small grammar (`phrases.py`). Whether one is held out depends on its content alone, so all its wordings, in
both languages, are on the same side. Preferences are pairs of a good answer and one with a flaw; the rules that an evaluation
counts by are no part of what a reward model learns from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from coterie.models.codec import Codec
from coterie.tasks.base import Encoded, Task
from coterie.tasks.chance import chance, chances, drawn
from coterie.tasks.phrases import (
    CLOSERS,
    CONTENTS,
    LANGUAGES,
    NUM_PHRASES,
    OPENERS,
    RUDE_CLOSERS,
    RUDE_OPENERS,
    Content,
    all_words,
    details_of,
    is_in_language,
    is_on_topic,
    is_polite,
    is_well_formed,
    language_of,
    things_of,
)
from coterie.tasks.words import make_word_tokenizer
from coterie.types import Messages, Prompt, Scored, entries_of

HELDOUT_SHARE = 0.1
QUALITIES = {"good": 0.34, "rude": 0.12, "curt": 0.28, "off_topic": 0.12, "other_language": 0.14}  # of demonstrations
FLAWS = {"rude": 0.1, "curt": 0.1, "off_topic": 0.7, "other_language": 0.1}  # of rejected answers
NUM_CHANCES = 6  # that an answer takes: see `write_answer`

_EXAMPLES = (Content("weather", "Paris", "tomorrow"), Content("food", "dumplings", "for supper"))


def is_heldout(content: Content) -> bool:
    """Decided by what is asked about, the same in every run, wording and language."""
    return content in _EXAMPLES or chance("dialogue", content.subject, content.thing, content.detail) < HELDOUT_SHARE


def write_answer(
    content: Content, language: str, quality: str, contents: Sequence[Content], chances: list[float]
) -> str:
    """A good answer to a question about `content`, or one with a flaw.

    rude, curt: the answer is there, with rude words or none of courtesy. off_topic: a polite answer to another question of
    `contents`, near or far. other_language: a good answer in the other language. chances [6]: what else is left open.
    """
    of_opener, of_sentence, of_closer, of_kind, of_thing, of_detail = chances
    if quality == "off_topic":
        content = _other(content, contents, of_kind, of_thing, of_detail)
    if quality == "other_language":
        (language,) = (other for other in LANGUAGES if other != language)
    sentence = content.sentence(language, int(of_sentence * NUM_PHRASES))
    if quality == "curt":
        return sentence
    openers, closers = (RUDE_OPENERS, RUDE_CLOSERS) if quality == "rude" else (OPENERS, CLOSERS)
    parts = (_pick(openers[language], of_opener), sentence, _pick(closers[language], of_closer))
    return (" " if language == "en" else "").join(part for part in parts if part)


def _other(content: Content, contents: Sequence[Content], of_kind: float, of_thing: float, of_detail: float) -> Content:
    """Another thing, another detail of the same thing, or another subject, a third each."""
    if of_kind < 1 / 3:
        near = [c for c in contents if c.subject == content.subject and c.thing != content.thing]
    elif of_kind < 2 / 3:
        near = [c for c in contents if c.thing == content.thing and c.detail != content.detail]
    else:
        near = [c for c in contents if c.subject != content.subject]
    return _pick(near, (of_thing + of_detail) % 1)


def _pick(choices: Sequence[Any], chance: float) -> Any:
    return choices[int(chance * len(choices))]


class Dialogue(Task):
    """The task. `train`, `heldout` and `examples` are prompts in both languages."""

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec)
        self._train_contents = [content for content in CONTENTS if not is_heldout(content)]
        self.train = self._prompts(self._train_contents)
        self.heldout = self._prompts([content for content in CONTENTS if is_heldout(content)])
        wanted = [example.question(language, 0) for example in _EXAMPLES for language in LANGUAGES]
        self.examples = [prompt for prompt in self.heldout if prompt.text in wanted]

    def _prompts(self, contents: list[Content]) -> list[Prompt]:
        prompts: list[Prompt] = []
        for content in contents:
            for language in LANGUAGES:
                for which in range(NUM_PHRASES):
                    asked: Messages = [{"role": "user", "content": content.question(language, which)}]
                    columns = {"subject": content.subject, "thing": content.thing, "detail": content.detail}
                    tokens = self._codec.encode_prompt(asked)
                    prompts.append(Prompt(len(prompts), asked, tokens, {**columns, "language": language}))
        return prompts

    def demonstrations(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """Answers of mixed quality: some good, some with each of the flaws."""
        return [
            self._demonstration(*row)
            for row in chances(count, 2 + NUM_CHANCES, seed, "dialogue", "demonstrations", step)
        ]

    def _demonstration(self, of_prompt: float, of_quality: float, *rest: float) -> Encoded:
        prompt = _pick(self.train, of_prompt)
        answer = _answer(prompt, drawn(QUALITIES, of_quality), self._train_contents, rest)
        return self.encoded(prompt.content, answer)

    def preferences(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """Good answers, each beside one that is rude or curt, off topic or in the other language.

        What is off topic is worded as the good answer is, so that nothing but the names tells them apart.
        """
        rows = chances(count, 2 + 2 * NUM_CHANCES, seed, "dialogue", "preferences", step)
        return [self._preference(self.train, self._train_contents, *row) for row in rows]

    def heldout_preferences(self, count: int, *, seed: int) -> list[Encoded]:
        rows = chances(count, 2 + 2 * NUM_CHANCES, seed, "dialogue", "heldout preferences")
        return [self._preference(self.heldout, CONTENTS, *row) for row in rows]

    def _preference(
        self, prompts: Sequence[Prompt], contents: list[Content], of_prompt: float, of_flaw: float, *rest: float
    ) -> Encoded:
        prompt = _pick(prompts, of_prompt)
        flaw, chosen, rejected = drawn(FLAWS, of_flaw), rest[:NUM_CHANCES], rest[NUM_CHANCES:]
        if flaw == "off_topic":
            rejected = chosen
        good = _answer(prompt, "good", contents, chosen)
        return self.encoded(prompt.content, good, _answer(prompt, flaw, contents, rejected))

    def columns_of(self, text: str) -> Mapping[str, Any] | None:
        """Any text that names one thing of the grammar, with a detail or without."""
        things, details = things_of(text), details_of(text)
        if len(things) != 1 or len(details) > 1:
            return None
        (thing,), detail = things, "".join(details)
        subject = next(content.subject for content in CONTENTS if content.thing == thing)
        return {"subject": subject, "thing": thing, "detail": detail, "language": language_of(text)}

    def judge(self, scored: Scored) -> Mapping[str, list[bool]]:
        """By rule: whether an answer is polite, on topic and in the prompt's language, which together is its accuracy.

        well_formed is counted beside them: a policy that pleases a reward model with nonsense loses it.
        """
        pairs = entries_of(scored.groups)
        judged = {
            "polite": [is_polite(c.text) for _, c in pairs],
            "on_topic": [is_on_topic(c.text, p.columns["thing"], p.columns["detail"]) for p, c in pairs],
            "same_language": [is_in_language(c.text, p.columns["language"]) for p, c in pairs],
        }
        accuracy = [all(verdicts) for verdicts in zip(*judged.values(), strict=True)]
        return {"accuracy": accuracy, **judged, "well_formed": [is_well_formed(c.text) for _, c in pairs]}


def _answer(prompt: Prompt, quality: str, contents: list[Content], chances: Sequence[float]) -> str:
    columns = prompt.columns
    content = Content(columns["subject"], columns["thing"], columns["detail"])
    return write_answer(content, columns["language"], quality, contents, list(chances))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The task's own tokenizer: English words with the space before them, Chinese names and characters, and an end token."""
    words, characters = all_words()
    return make_word_tokenizer([*map(chr, range(32, 127)), *characters], words)
