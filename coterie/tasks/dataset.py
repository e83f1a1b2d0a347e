"""The user's own prompts: JSONL, Parquet or a hub data set, as text or as chat messages."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coterie.errors import BadRowError, UserError, nearest
from coterie.models.codec import Answer, Codec
from coterie.models.hub import hub_reason, why_unreachable
from coterie.models.template import TemplateEndlessError
from coterie.noise import key, permutation
from coterie.recipe.paths import is_local_path
from coterie.recipe.settings import DatasetTask
from coterie.tasks.base import Demonstration, Preference, draw
from coterie.tasks.bounds import check_count, check_length, check_row, lines_of
from coterie.types import Messages, Prompt, Scored

Row = tuple[str, Mapping[str, Any] | BadRowError]  # where it stands, and its columns or why it has none
_SILENT_SECONDS = 5.0  # for which nothing is said while rows are read


class Dataset:
    """The task. Held out are the rows of a file of their own, or a share of all: by their prompts alone, so that equal ones are
    on the same side."""

    def __init__(self, settings: DatasetTask, codec: Codec) -> None:
        self._settings, self._codec = settings, codec
        self.left_out: Counter[str] = Counter()  # rows by the reason they can't be used for
        self.shortened: list[str] = []  # rows of whose answer the chat template leaves something out
        prompts = list(self._prompts(settings))
        self.overlap = ""  # what is to be said of an evaluation set whose prompts are also trained on
        if settings.evaluation is not None:
            of_its_own = {"data": settings.evaluation, "split": settings.evaluation_split}
            evaluated = settings.model_copy(update=of_its_own)
            self.train, self.heldout = prompts, list(self._prompts(evaluated, "task.evaluation"))
            contents = {json.dumps(prompt.content, sort_keys=True) for prompt in prompts}
            num_shared = sum(json.dumps(prompt.content, sort_keys=True) in contents for prompt in self.heldout)
            if num_shared:
                self.overlap = f"task.evaluation: {num_shared} of its {len(self.heldout)} prompts are also trained on"
        else:
            self.train, self.heldout = _divided(prompts, settings.heldout)
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
                yield self._prompt(number, origin, row, seen)
                number += 1
            except BadRowError as error:
                if not settings.lenient:
                    raise
                first = first or error
                left_out[error.reason] += 1
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
        content = prompt_of(row, origin, settings.prompt)
        columns = list(filter(None, (settings.answer, settings.chosen, settings.rejected)))
        texts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)]
        texts += [answer_of(row, origin, column) for column in columns]
        for column, text in zip((settings.prompt, *columns), texts, strict=True):
            _check_text(text, origin, column)
        for column in columns:
            _check_turns(row[column], texts[0] if isinstance(content, str) else content, origin, column)
        if settings.chosen and settings.rejected and row[settings.chosen] == row[settings.rejected]:
            raise BadRowError(origin, "a pair of equals", "the preferred answer and the other are the same")
        whole = hashlib.sha256(
            json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        ).hexdigest()
        if whole in seen:
            raise BadRowError(origin, "a duplicate", f"is the same as {seen[whole]}")
        seen[whole] = origin
        try:
            tokens = self._codec.encode_prompt(content)
        except TemplateEndlessError as error:  # each of the rows that follow would take as long
            raise UserError(f"{origin}: {error}") from None
        except UserError as error:
            raise BadRowError(origin, "not to be encoded", str(error)) from None
        others = {name: value for name, value in row.items() if name != settings.prompt}
        return Prompt(number, content, tokens, others, origin)

    def demonstrations(self, count: int, *, seed: int, step: int) -> list[Demonstration]:
        """The rows' answers, every row once an epoch."""
        column = self._settings.answer
        assert column is not None, "recipes refuse sft on a data set without an answer column"
        return [
            self._codec.encode_demonstration(p.content, learned_of(p.columns, p.origin, column))
            for p in draw(self, count, seed=seed, step=step)
        ]

    def preferences(self, count: int, *, seed: int, step: int) -> list[Preference]:
        """The rows' pairs, every row once an epoch."""
        return [self._pair(prompt) for prompt in draw(self, count, seed=seed, step=step)]

    def heldout_preferences(self, count: int, *, seed: int) -> list[Preference]:
        return [self._pair(self.heldout[i]) for i in permutation(len(self.heldout), seed, "pairs")[:count]]

    def check_answers(self, context_length: int | None) -> None:
        """Raises UserError where an answer that is learned can't be encoded, or does not fit the model's context with its prompt."""
        settings = self._settings
        for column in filter(None, (settings.answer, settings.chosen, settings.rejected)):
            for prompt in (*self.train, *self.heldout):
                answer = learned_of(prompt.columns, prompt.origin, column)
                try:
                    length = sum(map(len, self._codec.encode_demonstration(prompt.content, answer)))
                except UserError as error:
                    raise UserError(f"{prompt.origin}: column {column!r}: {error}") from None
                if context_length is not None and length > context_length:
                    raise UserError(
                        f"{prompt.origin}: the prompt and column {column!r} have {length} tokens together, more than the "
                        f"model's context of {context_length}"
                    )
                if not isinstance(prompt.content, str) and not self._codec.template.keeps(prompt.content, answer):
                    self.shortened.append(prompt.origin)

    def _pair(self, prompt: Prompt) -> Preference:
        chosen, rejected = self._settings.chosen, self._settings.rejected
        assert chosen is not None, "recipes refuse preferences on a data set without their columns"
        assert rejected is not None
        better, worse = (learned_of(prompt.columns, prompt.origin, column) for column in (chosen, rejected))
        return self._codec.encode_pair(prompt.content, better, worse)

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


def _counted_aloud(rows: Iterator[Row], name: str) -> Iterator[Row]:
    """The rows, with a line now and then that says how many there were, where there are so many that it takes long."""
    last = time.monotonic()
    for number, row in enumerate(rows, start=1):
        if time.monotonic() - last >= _SILENT_SECONDS and sys.stderr is not None:
            last = time.monotonic()
            print(f"reading {name}: {number:,} rows", file=sys.stderr, flush=True)
        yield row


def _divided(prompts: list[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """What is trained on, and what is held out."""
    places = [key("heldout", json.dumps(prompt.content, sort_keys=True)) for prompt in prompts]
    ordered = sorted(set(places))
    num_heldout = math.ceil(share * len(ordered)) if len(ordered) > 1 else 0
    heldout = set(ordered[: min(num_heldout, len(ordered) - 1)])
    train = [prompt for prompt, place in zip(prompts, places, strict=True) if place not in heldout]
    return train, [prompt for prompt, place in zip(prompts, places, strict=True) if place in heldout]


def read_rows(settings: DatasetTask, named: str = "task.data") -> Iterator[Row]:
    """Every row with where it stands (file:line), or what is wrong with it. Raises UserError for a missing file.

    named: the setting that names the file."""
    path = Path(settings.data)
    if not path.exists() and not is_local_path(settings.data):
        yield from _hub_rows(settings, named)
    elif not path.is_file():
        wrong = "is a folder; name a file in it" if path.is_dir() else "does not exist"
        raise UserError(f"{named}: {'' if path.is_dir() else 'the file '}{settings.data} {wrong}")
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        yield from jsonl_rows(path)
    else:
        raise UserError(f"{named}: {settings.data} is neither .jsonl nor .parquet")


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Every object of a JSONL file with where it stands. Raises UserError with file:line for a broken line."""
    num_rows = 0
    with path.open("rb") as file:
        for origin, line in lines_of(file, str(path)):
            try:
                text = line.removeprefix(codecs.BOM_UTF8).decode()
                row = json.loads(text, parse_constant=_no_number, object_pairs_hook=_unique)
            except UnicodeDecodeError as error:
                row = BadRowError(origin, "not UTF-8", f"is not UTF-8: {error.reason} at byte {error.start + 1}")
            except (ValueError, RecursionError) as error:  # also a number with more digits than Python reads
                row = BadRowError(origin, "not valid JSON", f"is not valid JSON: {error}")
            row = _within_bounds(row, origin)
            if not isinstance(row, dict | BadRowError):
                kind = f"is a {type(row).__name__}; each line must be an object with columns"
                row = BadRowError(origin, "not an object", kind)
            num_rows += 1
            yield origin, row
    if not num_rows:
        raise UserError(f"{path}: has no rows")


def _within_bounds(row: Any, origin: str) -> Any:
    """The same row, or what is too large about it."""
    try:
        if isinstance(row, dict):
            check_row(row, origin)
    except BadRowError as error:
        return error
    return row


def _no_number(name: str) -> Any:
    """Python reads NaN and Infinity, which JSON does not have, and nobody means."""
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ: of two equal ones the first would be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = next(name for name, count in names.items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs the extra: pip install 'coterie[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        check_count(file.metadata.num_rows, f"{path}:{file.metadata.num_rows}")
        if not file.metadata.num_rows:
            raise UserError(f"{path}: has no rows")
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", _within_bounds(row, f"{path}:{number}")
    except UserError:
        raise
    except Exception as error:  # damage shows in many ways: pyarrow's own errors, and those of text that is none
        raise UserError(f"{path}: is not a readable Parquet file: {error}") from None


def _hub_rows(settings: DatasetTask, named: str) -> Iterator[Row]:
    why_unreachable()  # asked first, so that what is not here is refused at once
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{named}: {settings.data} is no file here, so it is taken for a hub data set, which needs the extra: "
            "pip install 'coterie[data]'"
        ) from None
    try:
        rows = datasets.load_dataset(settings.data, split=settings.split)
    except Exception as error:  # the hub's client raises its own, the network's and the file system's errors
        raise UserError(
            f"{named}: {settings.data} is no file here, and as a hub data set it can't be loaded: {hub_reason(error)}"
        ) from error
    for number, row in enumerate(rows, start=1):
        origin = f"{settings.data}[{settings.split}]:{number}"
        check_count(number, origin)
        yield origin, _within_bounds(row, origin)


def answer_of(row: Mapping[str, Any], origin: str, column: str) -> str:
    """The text of an answer: a string, or a list of messages of which the assistant's last one is the answer."""
    if column not in row:
        raise BadRowError(origin, "without a column", f"has no column {column!r}; {nearest(column, map(str, row))}")
    answer = row[column]
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict) and answer[-1].get("role") == "assistant":
        answer = answer[-1].get("content")
    if not isinstance(answer, str):
        raise BadRowError(
            origin,
            "of a wrong type",
            f"column {column!r} holds {row[column]!r:.60}; text, or messages that end with the assistant's, are allowed",
        )
    return answer


def learned_of(row: Mapping[str, Any], origin: str, column: str) -> Answer:
    """An answer to be learned: a text, or the assistant's message with whatever else it holds for the template, as its reasoning."""
    text, given = answer_of(row, origin, column), row[column]
    return {name: value for name, value in given[-1].items() if value is not None} if isinstance(given, list) else text


def _check_turns(answer: Any, content: str | Messages, origin: str, column: str) -> None:
    """Raises BadRowError where an answer's messages before the last are none of the prompt's: they would be left out."""
    said = content if isinstance(content, str) else [message["content"] for message in content]
    for message in answer[:-1] if isinstance(answer, list) else ():
        text = message.get("content") if isinstance(message, dict) else message
        if not isinstance(text, str) or text not in said:
            raise BadRowError(
                origin, "of other turns", f"column {column!r} holds the message {message!r:.60}, which is none of the prompt's; an "
                "answer is the assistant's last message, so the turns before it belong into the prompt"
            )  # fmt: skip


def _check_text(text: str, origin: str, column: str) -> None:
    """Raises BadRowError for nothing but white space, and for halves of characters, which JSON can spell and UTF-8 can't."""
    if not text.strip():
        raise BadRowError(origin, "empty", f"column {column!r} is empty")
    check_length(text, origin, column)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRowError(origin, "not Unicode", f"column {column!r} holds half of a character") from None


def prompt_of(row: Mapping[str, Any], origin: str, column: str) -> Any:
    """The prompt of a row: text, or a list of messages."""
    if column not in row:
        raise BadRowError(origin, "without a column", f"has no column {column!r}; {nearest(column, map(str, row))}")
    content = row[column]
    if isinstance(content, str):
        if not content.strip():
            raise BadRowError(origin, "empty", f"the prompt in column {column!r} is empty")
        return content
    if not isinstance(content, list):
        raise BadRowError(
            origin,
            "of a wrong type",
            f"column {column!r} holds {content!r:.60}, {type(content).__name__}; text or chat messages are allowed",
        )
    for message in content:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BadRowError(
                origin,
                "of a wrong type",
                f"column {column!r} holds the message {message!r:.60}; each needs a role and a content, as text",
            )
    if not content:
        raise BadRowError(origin, "empty", f"column {column!r} holds no messages")
    return content
