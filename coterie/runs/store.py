"""`run.db`: everything that is recorded of a run, in SQLite: its tables, and its one writer. `reader.py` reads it.

A step is written in one transaction, so a killed writer leaves whole steps only. Lists of numbers are stored as JSON.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.deadline import running
from coterie.noise import permutation
from coterie.redact import hidden
from coterie.runs.reader import SCHEMA, Reader
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
_PATIENCE = 5.0  # seconds for which another program may hold the file before what is written is kept in memory
_RETRY = 0.5  # seconds between two tries from then on
_HELD_SECONDS, _HELD_BYTES = 900.0, 1 << 28  # how long, and how much is kept so


class Store(Reader):
    """A connection that writes a run's database, and reads it.

    Where another program holds the file (a person who looks at it, a backup) what is written is kept in memory, read from there
    too, and brought into the file once that is free. `tell` is called with a sentence when that begins and ends.
    UserError for a database that a newer version has written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tell: Callable[[str], None] = lambda _: None
        self._held_since: float | None = None
        self._tried = 0.0
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute(f"PRAGMA busy_timeout={_PATIENCE * 1000:.0f}")
        self._refuse_programs()
        version = self._version()
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._migrate(version)
        self._db.row_factory = sqlite3.Row

    def _migrate(self, version: int) -> None:
        """Bring a new database, or an older one, to what this version writes."""
        lacking = [line for table, made_of in _TABLES.items() for line in self._lacking(table, *made_of)]
        if lacking or version < SCHEMA:
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

    @property
    def held(self) -> bool:
        """Whether something is kept in memory, since another program holds the file."""
        return self._held_since is not None

    def settle(self, seconds: float = _HELD_SECONDS) -> None:
        """Wait until nothing is kept in memory. sqlite3.OperationalError where that takes longer."""
        end = running() + seconds
        while self.held:
            with self.transaction():
                pass
            if self.held and running() > end:
                raise sqlite3.OperationalError(_HELD)
            time.sleep(0.05 if self.held else 0)

    @contextmanager
    def transaction(self, *, keep: bool = True) -> Iterator[None]:
        """All or nothing of what is written inside. Without `keep` it goes into the file, however long that takes."""
        if self._db.in_transaction:
            yield
            return
        self._begin(keep)
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _begin(self, keep: bool) -> None:
        while not self._begun():
            self._hold()
            if keep:
                self._db.execute("BEGIN")
                return
            time.sleep(_RETRY)
        if self._held_since is not None:
            self._bring()

    def _begun(self) -> bool:
        """Whether the file can be written now: then a transaction has begun."""
        if self.held and running() - self._tried < _RETRY:
            return False
        try:
            self._db.execute(f"PRAGMA busy_timeout={0 if self.held else _PATIENCE * 1000:.0f}")
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            self._tried = running()
            return False
        finally:
            self._db.execute(f"PRAGMA busy_timeout={_PATIENCE * 1000:.0f}")
        return True

    def _hold(self) -> None:
        """Keep what is written from here on in tables in memory, behind views by which it is read with what the file has."""
        if self._held_since is not None:
            (pages,), (size,) = (
                self._db.execute(f"PRAGMA held.{name}").fetchone() for name in ("page_count", "page_size")
            )
            if running() - self._held_since > _HELD_SECONDS or pages * size > _HELD_BYTES:
                raise sqlite3.OperationalError(_HELD)
            return
        self.tell(f"{self.path} is held by another program; what is recorded is kept in memory until it lets go")
        self._held_since = running() - _PATIENCE
        if not any(name == "held" for _, name, _ in self._db.execute("PRAGMA database_list")):
            self._db.execute("ATTACH ':memory:' AS held")
        for table, columns in _COLUMNS.items() if self._tables() else ():
            self._db.execute(f"CREATE TABLE IF NOT EXISTS held.{table} AS SELECT {columns} FROM main.{table} WHERE 0")
            both = f"SELECT {columns} FROM main.{table} UNION ALL SELECT {columns} FROM held.{table}"
            self._db.execute(f"CREATE TEMP VIEW {table} AS {both}")

    def _tables(self) -> bool:
        return bool(self._db.execute("SELECT 1 FROM main.sqlite_master WHERE name = 'metrics'").fetchall())

    def _bring(self) -> None:
        """Into the file with what was kept, in the transaction that has begun."""
        assert self._held_since is not None
        for table, columns in _COLUMNS.items() if self._tables() else ():
            self._db.execute(f"DROP VIEW temp.{table}")
            self._db.execute(f"INSERT OR REPLACE INTO main.{table} ({columns}) SELECT {columns} FROM held.{table}")
            self._db.execute(f"DELETE FROM held.{table}")
        seconds = running() - self._held_since
        self._held_since = None
        self.tell(f"{self.path} is free again after {seconds:.0f} s, and nothing is missing")

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


_HELD = "run.db has been held by another program for too long: end what reads or copies it"


def _token_columns(completion: Completion, pieces: list[str]) -> tuple[str, str, str]:
    logprobs = ", ".join(f"{value:.9g}" for value in completion.logprobs.tolist())  # 9 digits give float32 back exactly
    return json.dumps(completion.tokens), json.dumps(pieces, ensure_ascii=False), f"[{logprobs}]"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
