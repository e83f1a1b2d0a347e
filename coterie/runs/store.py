"""`run.db`: everything that is recorded of a run, in SQLite: its tables, and its one writer. `reader.py` reads it.

A step is written in one transaction, so a killed writer leaves whole steps only; where another program holds the file, `held.py` keeps
what is written until it is free. Lists of numbers are stored as JSON.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.noise import permutation
from coterie.redact import hidden
from coterie.runs.held import PatientWriter
from coterie.runs.reader import SCHEMA
from coterie.types import Completion, Scored

_TABLES = {  # columns and primary key; a table may hold more than this version knows, and what it lacks is added
    "metrics": ("stage TEXT, step INTEGER, name TEXT, value REAL", "stage, step, name"),
    "completions": (
        "stage TEXT, step INTEGER, prompt_number INTEGER, completion_number INTEGER, prompt TEXT, text TEXT, tokens TEXT, "
        "pieces TEXT, sampler_logprobs TEXT, advantage REAL, reward REAL, reward_parts TEXT, ended TEXT, failure TEXT",
        "stage, step, prompt_number, completion_number",
    ),
    "evaluations": (
        "stage TEXT, step INTEGER, mode TEXT, name TEXT, value REAL, low REAL, high REAL, count INTEGER",
        "stage, step, mode, name",
    ),
    "examples": (
        "stage TEXT, step INTEGER, number INTEGER, prompt TEXT, text TEXT, reward REAL, correct INTEGER",
        "stage, step, number",
    ),
    "events": ("time REAL, stage TEXT, step INTEGER, kind TEXT, message TEXT", None),
    "inputs": ("name TEXT, value TEXT", "name"),
    "surroundings": ("name TEXT, value TEXT", "name"),
}
_COLUMNS = {  # the names alone, of what is written as a run goes on
    table: ", ".join(column.split()[0] for column in columns.split(", "))
    for table, (columns, _) in _TABLES.items()
    if table not in ("inputs", "surroundings")
}


class Store(PatientWriter):
    """A connection that writes a run's database, and reads it. UserError for a database that a newer version has written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _COLUMNS)
        self._migrate()

    def _migrate(self) -> None:
        """Bring a new database, or an older one, to what this version writes."""
        lacking = [line for table, made_of in _TABLES.items() for line in self._lacking(table, *made_of)]
        if lacking or self._version() < SCHEMA:
            with self.transaction(keep=False):
                for statement in lacking:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={SCHEMA}")

    def _lacking(self, table: str, columns: str, key: str | None) -> list[str]:
        """The statements that make a table what it should be."""
        there = {name for _, name, *_ in self._db.execute(f"PRAGMA table_info({table})")}
        if not there:
            return [f"CREATE TABLE {table} ({columns}{f', PRIMARY KEY ({key})) WITHOUT ROWID' if key else ')'}"]
        missing = [column for column in columns.split(", ") if column.split()[0] not in there]
        return [f"ALTER TABLE {table} ADD COLUMN {column}" for column in missing]

    def sync(self) -> None:
        """Bring what was written to the disk, so that a checkpoint that outlives a power cut has its steps here."""
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        columns = _COLUMNS[table]
        marks = ", ".join("?" * len(columns.split(",")))
        insert = "INSERT OR REPLACE" if table in ("evaluations", "examples") else "INSERT"
        with self.transaction():
            into = "held" if self.held else "main"
            self._db.executemany(f"{insert} INTO {into}.{table} ({columns}) VALUES ({marks})", rows)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._insert("metrics", [(stage, step, name, _number(value)) for name, value in values.items()])

    def completions(
        self, stage: str, step: int, scored: Scored, advantages: Tensor, pieces: Any, *, max_bytes: float
    ) -> int:
        """Write groups until `max_bytes` are full, chosen by a key of the step. Returns how many were left out.

        `pieces` gives the text of each token of a completion: token ids -> list of str.
        """
        reasons = {(f.group, f.completion): hidden(f"{f.reward}: {f.reason}") for f in scored.failures}
        size = left_out = 0
        for p in permutation(len(scored.groups), "record", stage, step):
            group = scored.groups[p]
            rows = []
            for c, completion in enumerate(group.completions):
                reward = scored.rewards[p, c].item()
                parts = {name: _number(part[p, c].item()) for name, part in scored.parts.items()}
                rows.append(
                    (
                        *(stage, step, p, c, group.prompt.text, completion.text),
                        *_token_columns(completion, pieces(completion.tokens)),
                        *(advantages[p, c].item(), _number(reward), json.dumps(parts)),
                        *(completion.ended, reasons.get((p, c))),
                    )
                )
            group_size = sum(len(str(value)) for row in rows for value in row)
            if size and size + group_size > max_bytes:
                left_out += 1
                continue
            size += group_size
            self._insert("completions", rows)
        return left_out

    def evaluation(
        self, stage: str, step: int, mode: str, name: str, value: float, low: float, high: float, count: int
    ) -> None:
        self._insert("evaluations", [(stage, step, mode, name, value, low, high, count)])

    def example(
        self, stage: str, step: int, number: int, prompt: str, text: str, reward: float | None, correct: bool | None
    ) -> None:
        self._insert("examples", [(stage, step, number, prompt, text, reward, correct)])

    def event(self, stage: str, step: int, kind: str, message: str) -> None:
        self._insert("events", [(time.time(), stage, step, kind, hidden(message))])

    def inputs(self, values: Mapping[str, str], surroundings: Mapping[str, str]) -> None:
        """Replace what is known of what the run depends on, and of where it runs."""
        with self.transaction(keep=False):
            for table, found in (("inputs", values), ("surroundings", surroundings)):
                self._db.execute(f"DELETE FROM main.{table}")
                self._db.executemany(f"INSERT INTO main.{table} (name, value) VALUES (?, ?)", list(found.items()))

    def truncate(self, stage: str, step: int, later_stages: tuple[str, ...]) -> None:
        """Remove what came after a step, in one transaction: a resume will write it again."""
        with self.transaction(keep=False):
            for table in _COLUMNS:
                self._db.execute(f"DELETE FROM main.{table} WHERE stage = ? AND step > ?", (stage, step))
                for later in later_stages:
                    self._db.execute(f"DELETE FROM main.{table} WHERE stage = ?", (later,))


def _token_columns(completion: Completion, pieces: list[str]) -> tuple[str, str, str]:
    logprobs = ", ".join(f"{value:.9g}" for value in completion.logprobs.tolist())  # 9 digits give float32 back exactly
    return json.dumps(completion.tokens), json.dumps(pieces, ensure_ascii=False), f"[{logprobs}]"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
