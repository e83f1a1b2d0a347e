"""How large a user's data may be: above all that is meant, and below what ends in hours or out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from coterie.errors import BadRowError, UserError

MAX_ROWS = 2_000_000
MAX_LINE = 64_000_000  # bytes of a line of JSON
MAX_TEXT = 1_000_000  # characters of a prompt, or of an answer that is learned from
MAX_COLUMNS = 1_000
MAX_DEPTH = 100  # of lists and objects inside one another


def lines_of(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """Every line that is not empty, with where it stands. UserError for one that is too long, and for too many."""
    number = num_rows = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise UserError(f"{name}:{number}: has more than {MAX_LINE:,} bytes, which a row may have")
        if line.strip():
            num_rows += 1
            check_count(num_rows, f"{name}:{number}")
            yield f"{name}:{number}", line


def check_count(num_rows: int, origin: str) -> None:
    """UserError at the first row of too many."""
    if num_rows > MAX_ROWS:
        raise UserError(f"{origin}: is row {num_rows:,}, and {MAX_ROWS:,} are allowed")


def check_row(row: dict[Any, Any], origin: str) -> None:
    """BadRowError for too many columns, and for what is nested too deeply."""
    if len(row) > MAX_COLUMNS:
        raise BadRowError(origin, "with too many columns", f"has {len(row):,} columns, and {MAX_COLUMNS:,} are allowed")
    level: list[Any] = [row]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return
    raise BadRowError(origin, "nested too deeply", f"is nested too deeply: {MAX_DEPTH} levels are allowed")


def check_length(text: str, origin: str, column: str) -> None:
    """BadRowError for a text that is too long to be read."""
    if len(text) > MAX_TEXT:
        raise BadRowError(
            origin, "too long", f"column {column!r} has {len(text):,} characters, and {MAX_TEXT:,} are allowed"
        )
