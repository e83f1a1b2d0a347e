"""The user's own prompts: JSONL, Parquet or a hub data set, as text or as chat messages."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from coterie.errors import BadRowError, UserError, standing_at
from coterie.models.codec import Codec
from coterie.models.template import TemplateEndlessError
from coterie.noise import key, permutation
from coterie.recipe.settings import DatasetTask
from coterie.tasks.base import Encoded, Note, Task
from coterie.tasks.draw import draw
from coterie.tasks.rows import Rows, answer_of, check_text, check_turns, learned_of, prompt_of, read_rows
from coterie.types import Messages, Prompt, Scored

_SILENT_SECONDS = 5.0  # for which nothing is said while rows are read


class Dataset(Task):
    """The task. Held out are the rows of a file of their own, or a share of all: by their prompts alone, so that equal ones are
    on the same side."""

    train: list[Prompt]
    heldout: list[Prompt]

    def __init__(self, settings: DatasetTask, codec: Codec) -> None:
        super().__init__(codec)
        self._settings = settings
        if settings.chat:
            codec.check_chats("task.chat")
        self._answers = [name for name in (settings.answer, settings.chosen, settings.rejected) if name]
        self.notes: list[Note] = []
        self.left_out: Counter[str] = Counter()  # rows by the reason they can't be used for
        prompts = list(self._prompts(settings))
        if settings.evaluation is None:
            self.train, self.heldout = _divided(prompts, settings.heldout)
        else:
            evaluated = settings.model_copy(update={"data": settings.evaluation, "split": settings.evaluation_split})
            self.train, self.heldout = prompts, list(self._prompts(evaluated, "task.evaluation"))
            contents = set(map(_written, self.train))
            num_shared = sum(_written(prompt) in contents for prompt in self.heldout)
            if num_shared:
                text = f"task.evaluation: {num_shared} of its {len(self.heldout)} prompts are also trained on"
                self.notes.append(Note("overlap", text))
        for reason, count in self.left_out.items():
            rows = "1 row is" if count == 1 else f"{count} rows are"
            self.notes.append(Note("rows_left_out", f"task.data: {rows} left out: {reason}"))
        self.examples = (self.heldout or self.train)[:2]

    def _prompts(self, settings: DatasetTask, named: str = "task.data") -> Iterator[Prompt]:
        """The rows that can be used. A row that can't is refused; or left out, where the settings are lenient."""
        left_out: Counter[str] = Counter()
        seen: dict[str, str] = {}
        number = num_rows = 0
        first: BadRowError | None = None
        for origin, row in _counted_aloud(read_rows(settings, named), settings.data):
            num_rows += 1
            try:
                with standing_at(origin):
                    prompt = self._prompt(number, origin, row, seen)
            except BadRowError as error:
                if not settings.lenient:
                    raise
                first = first or error
                left_out[error.reason] += 1
                continue
            yield prompt
            number += 1
        self.left_out += left_out
        if first is not None and (left_out.total() > settings.max_left_out * num_rows or not number):
            counts = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
            raise UserError(
                f"{settings.data}: {left_out.total()} of {num_rows} rows can't be used ({counts}), more than "
                f"task.max_left_out={settings.max_left_out:g} allows; the first: {first}"
            )

    def _prompt(self, number: int, origin: str, row: Mapping[str, Any] | BadRowError, seen: dict[str, str]) -> Prompt:
        """A row as a prompt. `seen`: where each row before it stands, by its content."""
        settings = self._settings
        if isinstance(row, BadRowError):
            raise row
        content = prompt_of(row, settings.prompt, settings.chat)
        asked = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        answers = [answer_of(row, column) for column in self._answers]
        for column, text in zip((settings.prompt, *self._answers), (asked, *answers), strict=True):
            check_text(text, column)
        for column in self._answers:
            check_turns(row[column], content, column)
        if settings.chosen and settings.rejected and row[settings.chosen] == row[settings.rejected]:
            raise BadRowError("a pair of equals", "the preferred answer and the other are the same")
        columns = json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        first = seen.setdefault(hashlib.sha256(columns).hexdigest(), origin)
        if first != origin:
            raise BadRowError("a duplicate", f"is the same as {first}")
        try:
            tokens = self._codec.encode_prompt(content)
        except TemplateEndlessError as error:  # each of the rows that follow would take as long
            raise UserError(f"{origin}: {error}") from None
        except UserError as error:
            raise BadRowError("not to be encoded", str(error)) from None
        others = {name: value for name, value in row.items() if name != settings.prompt}
        return Prompt(number, content, tokens, others, origin)

    def demonstrations(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """The rows' answers, every row once an epoch."""
        return self._learned(draw(self, count, seed=seed, step=step), self._settings.answer)

    def preferences(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """The rows' pairs, every row once an epoch."""
        return self._learned(draw(self, count, seed=seed, step=step), self._settings.chosen, self._settings.rejected)

    def heldout_preferences(self, count: int, *, seed: int) -> list[Encoded]:
        prompts = [self.heldout[i] for i in permutation(len(self.heldout), seed, "pairs")[:count]]
        return self._learned(prompts, self._settings.chosen, self._settings.rejected)

    def _learned(self, prompts: list[Prompt], *columns: str | None) -> list[Encoded]:
        """Prompts with what stands in these columns of their rows."""
        given = [column for column in columns if column is not None]
        assert len(given) == len(columns), "recipes refuse what learns from columns that a data set has not"
        return [self.encoded(p.content, *(learned_of(p.columns, column) for column in given)) for p in prompts]

    def check_answers(self, context_length: int | None) -> None:
        """Also notes the answers of which the chat template leaves something out."""
        shortened: list[str] = []
        for column in self._answers:
            encoded = (
                self.encoded if column == self._settings.answer else self._codec.encode_rows
            )  # pairs stay as pairs
            for prompt in (*self.train, *self.heldout):
                answer = learned_of(prompt.columns, column)
                try:
                    length = sum(map(len, encoded(prompt.content, answer)))
                except UserError as error:
                    raise UserError(f"{prompt.origin}: column {column!r}: {error}") from None
                if context_length is not None and length > context_length:
                    raise UserError(
                        f"{prompt.origin}: the prompt and column {column!r} have {length} tokens together, more than the "
                        f"model's context of {context_length}"
                    )
                if not isinstance(prompt.content, str) and not self._codec.template.keeps(prompt.content, answer):
                    shortened.append(prompt.origin)
        if shortened:
            said = f"task.data: the chat template leaves out a part of {len(shortened)} answers, the first at {shortened[0]}; "
            self.notes.append(Note("answers_shortened", f"{said}they are learned as it renders them"))

    def asked(self, text: str) -> str | Messages:
        """The prompt that has this text, or one like the others: as text or as a chat, with what all chats begin and end with."""
        known = self._known(text)
        chats = [prompt.content for prompt in (*self.train, *self.heldout) if not isinstance(prompt.content, str)]
        if known is not None or not chats:
            return known.content if known is not None else text
        firsts, lasts = ([chat[place] for chat in chats] for place in (0, -1))
        before = firsts[:1] if firsts[0]["role"] != "user" and all(m == firsts[0] for m in firsts) else []
        after = lasts[:1] if lasts[0]["role"] == "assistant" and all(m == lasts[0] for m in lasts) else []
        return [*before, {"role": "user", "content": text}, *after]

    def columns_of(self, text: str) -> Mapping[str, Any] | None:
        """Those of the first row with this prompt."""
        known = self._known(text)
        return known.columns if known is not None else None

    def _known(self, text: str) -> Prompt | None:
        """The first prompt with this text, or that asks this and then lets the assistant begin."""
        return next((prompt for prompt in (*self.train, *self.heldout) if text in (prompt.text, prompt.asked)), None)

    def judge(self, scored: Scored) -> Mapping[str, list[bool]]:
        """Whether the total reward is above `correct_above`, where the recipe says what that is."""
        bound = self._settings.correct_above
        return {} if bound is None else {"accuracy": (scored.rewards > bound).flatten().tolist()}


def _counted_aloud(rows: Rows, name: str) -> Rows:
    """The rows, with a line now and then that says how many there were, where there are so many that it takes long."""
    last = time.monotonic()
    for number, row in enumerate(rows, start=1):
        if time.monotonic() - last >= _SILENT_SECONDS and sys.stderr is not None:
            last = time.monotonic()
            print(f"reading {name}: {number:,} rows", file=sys.stderr, flush=True)
        yield row


def _written(prompt: Prompt) -> str:
    """The content of a prompt, the same for equal ones."""
    return json.dumps(prompt.content, sort_keys=True)


def _divided(prompts: list[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """What is trained on, and what is held out."""
    places = [key("heldout", _written(prompt)) for prompt in prompts]
    ordered = sorted(set(places))
    num_heldout = math.ceil(share * len(ordered)) if len(ordered) > 1 else 0
    heldout = set(ordered[: min(num_heldout, len(ordered) - 1)])
    train = [prompt for prompt, place in zip(prompts, places, strict=True) if place not in heldout]
    return train, [prompt for prompt, place in zip(prompts, places, strict=True) if place in heldout]
