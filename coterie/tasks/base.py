"""What a task is: prompts to train on, held-out prompts, and perhaps demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.models.codec import Answer, Codec
from coterie.types import Messages, Prompt, Scored

Encoded = tuple[list[int], ...]  # the tokens of a prompt, and those of each of its answers
_MOST_ENCODED = 2_000_000  # tokens of rows that stay encoded: about 70 MB


@dataclass(frozen=True)
class Note:
    """Something about the data that a person should know before training. kind: the event that a run records it as."""

    kind: str
    text: str


class Task:
    """Prompts to train on and held-out ones. Everything else is optional, and a task overrides what it has.

    train, heldout: the prompts. examples: held-out ones whose answers are shown first. notes: what is to be said of them.
    """

    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    examples: Sequence[Prompt] = ()
    notes: Sequence[Note] = ()

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._encoded: dict[str, Encoded] = {}
        self._room = _MOST_ENCODED

    def demonstrations(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """What supervised fine-tuning learns in a step: prompts, each with an answer."""
        raise NotImplementedError

    def preferences(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """The pairs that DPO or a reward model learns from in a step: prompts, each with the preferred answer and the other."""
        raise NotImplementedError

    def heldout_preferences(self, count: int, *, seed: int) -> list[Encoded]:
        """At most `count` pairs whose prompts are held out."""
        raise NotImplementedError

    def asked(self, text: str) -> str | Messages:
        """What a person typed, as the content of a prompt of this task."""
        return [{"role": "user", "content": text}]

    def columns_of(self, text: str) -> Mapping[str, Any] | None:
        """What rewards may look at for a prompt that a person typed, or None where the task does not know it."""
        return None

    def judge(self, scored: Scored) -> Mapping[str, Sequence[bool | None]]:
        """What is counted in an evaluation, by name, for each completion [P * G], or None where it does not count; "accuracy", of all of
        them, if the task has one."""
        return {}

    def check_answers(self, context_length: int | None) -> None:
        """Raises UserError where an answer that is learned can't be encoded, or does not fit the model's context."""

    def encoded(self, content: str | Messages, *answers: Answer) -> Encoded:
        """As `Codec.encode_rows`. Rows are drawn again and again, and rendering one takes a hundred times as long as finding it."""
        row = self._encoded.get(known := repr((content, answers)))
        if row is None:
            row = self._codec.encode_rows(content, *answers)
            self._room -= sum(map(len, row))
            if self._room >= 0:
                self._encoded[known] = row
        return row
