"""Rows of a user's data: JSONL, Parquet or a hub data set, one after another, strictly, and within bounds: above all that is meant,
and below what ends in hours or out of memory."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coterie.errors import BadRowError, UserError, nearest
from coterie.models.codec import Answer
from coterie.models.hub import hub_reason, why_unreachable
from coterie.recipe.paths import is_local_path
from coterie.recipe.settings import DatasetTask
from coterie.types import Messages

MAX_ROWS = 2_000_000
MAX_LINE = 64_000_000  # bytes of a line of JSON
MAX_TEXT = 1_000_000  # characters of a prompt, or of an answer that is learned from
MAX_COLUMNS = 1_000
MAX_DEPTH = 100  # of lists and objects inside one another

Rows = Iterator[tuple[str, Mapping[str, Any] | BadRowError]]  # where each stands, and its columns or why it has none


def read_rows(settings: DatasetTask, named: str = "task.data") -> Rows:
    """Every row with where it stands (file:line), or what is wrong with it. Raises UserError for a missing file.

    named: the setting that names the file."""
    path = Path(settings.data)
    if not path.exists() and not is_local_path(settings.data):
        return _hub_rows(settings, named)
    if not path.is_file():
        wrong = (
            "is a folder; name a file in it" if path.is_dir() else f"does not exist; name another: --set {named}=FILE"
        )
        raise UserError(f"{named}: {'' if path.is_dir() else 'the file '}{settings.data} {wrong}")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return jsonl_rows(path)
    raise UserError(f"{named}: {settings.data} is neither .jsonl nor .parquet")


def jsonl_rows(path: Path) -> Rows:
    """Every object of a JSONL file with where it stands. Raises UserError for a file without any, and for a line that is too long."""
    number = num_rows = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE + 1):
            number += 1
            origin = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise UserError(f"{origin}: has more than {MAX_LINE:,} bytes, which a row may have")
            if not line.strip():
                continue
            num_rows += 1
            _check_count(num_rows, origin)
            yield origin, _or_wrong(_parsed, line)
    _check_some(num_rows, path)


def _parquet_rows(path: Path) -> Rows:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs the extra: pip install 'coterie[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        num_rows = file.metadata.num_rows
        _check_count(num_rows, f"{path}:{num_rows}")
        rows = (row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}:{number}", _or_wrong(_within_bounds, row)
    except UserError:
        raise
    except Exception as error:  # damage shows in many ways: pyarrow's own errors, and those of text that is none
        raise UserError(f"{path}: is not a readable Parquet file: {error}") from None
    _check_some(num_rows, path)


def _hub_rows(settings: DatasetTask, named: str) -> Rows:
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
        _check_count(number, origin)
        yield origin, _or_wrong(_within_bounds, row)


def _check_count(num_rows: int, origin: str) -> None:
    if num_rows > MAX_ROWS:
        raise UserError(f"{origin}: is row {num_rows:,}, and {MAX_ROWS:,} are allowed")


def _check_some(num_rows: int, path: Path) -> None:
    if not num_rows:
        raise UserError(f"{path}: has no rows")


def _or_wrong(read: Callable[[Any], dict[str, Any]], given: Any) -> dict[str, Any] | BadRowError:
    """What `read` makes of a row, or what it finds wrong with it."""
    try:
        return read(given)
    except BadRowError as error:
        return error


def _parsed(line: bytes) -> dict[str, Any]:
    """The object in a line of JSON."""
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()
        row = json.loads(text, parse_constant=_no_number, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise BadRowError("not UTF-8", f"is not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:  # also a number with more digits than Python reads
        raise BadRowError("not valid JSON", f"is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRowError("not an object", f"is a {type(row).__name__}; each line must be an object with columns")
    return _within_bounds(row)


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


def _within_bounds(row: dict[str, Any]) -> dict[str, Any]:
    """The same row. BadRowError for too many columns, and for what is nested too deeply."""
    if len(row) > MAX_COLUMNS:
        details = f"has {len(row):,} columns, and {MAX_COLUMNS:,} are allowed"
        raise BadRowError("with too many columns", details)
    level: list[Any] = [row]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return row
    raise BadRowError("nested too deeply", f"is nested too deeply: {MAX_DEPTH} levels are allowed")


# What stands in a row. Each raises BadRowError for what can't be used.


def _column(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise BadRowError("without a column", f"has no column {column!r}; {nearest(column, map(str, row))}")
    return row[column]


def prompt_of(row: Mapping[str, Any], column: str, chat: bool = False) -> Any:
    """The prompt of a row: text, or a list of messages; `chat` makes of a text a list of one."""
    content = _column(row, column)
    if isinstance(content, str):
        if not content.strip():
            raise BadRowError("empty", f"the prompt in column {column!r} is empty")
        return [{"role": "user", "content": content}] if chat else content
    if chat and isinstance(content, list):
        raise BadRowError("chats already", f"column {column!r} holds a chat already; leave task.chat out")
    if not isinstance(content, list):
        wrong = f"{content!r:.60}, {type(content).__name__}; text or chat messages are allowed"
        raise BadRowError("of a wrong type", f"column {column!r} holds {wrong}")
    for message in content:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            wrong = f"the message {message!r:.60}; each needs a role and a content, as text"
            raise BadRowError("of a wrong type", f"column {column!r} holds {wrong}")
    if not content:
        raise BadRowError("empty", f"column {column!r} holds no messages")
    return content


def answer_of(row: Mapping[str, Any], column: str) -> str:
    """The text of an answer: a string, or a list of messages of which the assistant's last one is the answer."""
    given = answer = _column(row, column)
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict) and answer[-1].get("role") == "assistant":
        answer = answer[-1].get("content")
    if not isinstance(answer, str):
        raise BadRowError(
            "of a wrong type",
            f"column {column!r} holds {given!r:.60}; text, or messages that end with the assistant's, are allowed",
        )
    return answer


def learned_of(row: Mapping[str, Any], column: str) -> Answer:
    """An answer to be learned: a text, or the assistant's message with whatever else it holds for the template, as its reasoning."""
    text, given = answer_of(row, column), row[column]
    return {name: value for name, value in given[-1].items() if value is not None} if isinstance(given, list) else text


def check_text(text: str, column: str) -> None:
    """For nothing but white space, for too much, and for halves of characters, which JSON can spell and UTF-8 can't."""
    if not text.strip():
        raise BadRowError("empty", f"column {column!r} is empty")
    if len(text) > MAX_TEXT:
        raise BadRowError("too long", f"column {column!r} has {len(text):,} characters, and {MAX_TEXT:,} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRowError("not Unicode", f"column {column!r} holds half of a character") from None


def check_turns(answer: Any, content: str | Messages, column: str) -> None:
    """For an answer's messages before the last that are none of the prompt's: they would be left out."""
    said = content if isinstance(content, str) else [message["content"] for message in content]
    for message in answer[:-1] if isinstance(answer, list) else ():
        text = message.get("content") if isinstance(message, dict) else message
        if not isinstance(text, str) or text not in said:
            raise BadRowError(
                "of other turns", f"column {column!r} holds the message {message!r:.60}, which is none of the prompt's; an "
                "answer is the assistant's last message, so the turns before it belong into the prompt"
            )  # fmt: skip
