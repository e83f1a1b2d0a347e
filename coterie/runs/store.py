"""`run.db`: everything that is recorded of a run, in SQLite. One writer, any number of readers.

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
from coterie.errors import UserError
from coterie.noise import permutation
from coterie.redact import hidden
from coterie.types import Completion, Scored

_SCHEMA = 3  # of the tables below; a database of a later one is refused
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
SKIPPED = ("optimiser/skipped_share", "value/skipped_share")  # the metrics that say a step's loss was not finite
_PATIENCE = 5.0  # seconds for which another program may hold the file before what is written is kept in memory
_RETRY = 0.5  # seconds between two tries from then on
_HELD_SECONDS, _HELD_BYTES = 900.0, 1 << 28  # how long, and how much is kept so


class Store:
    """A connection to a run's database.

    Where another program holds the file (a person who looks at it, a backup) what is written is kept in memory, read from there
    too, and brought into the file once that is free. `tell` is called with a sentence when that begins and ends.
    UserError for a database that a newer version has written.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.tell: Callable[[str], None] = lambda _: None
        self._held_since: float | None = None
        self._tried = 0.0
        self._into = "main"
        if read_only:
            self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
            self._refuse_programs()
            self._version()
        else:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute(f"PRAGMA busy_timeout={_PATIENCE * 1000:.0f}")
            self._refuse_programs()
            version = self._version()
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._migrate(version)
        self._db.row_factory = sqlite3.Row

    def _refuse_programs(self) -> None:
        """UserError for a database that would do something when it is read or written to, which may be somebody else's."""
        self._db.execute("PRAGMA trusted_schema=OFF")
        found = self._db.execute(
            "SELECT type, name FROM sqlite_schema WHERE type NOT IN ('table', 'index') OR sql LIKE 'CREATE VIRTUAL%'"
        ).fetchone()
        if found is not None:
            self._db.close()
            raise UserError(f"{self.path}: holds the {found[0]} {found[1]!r:.80}, which no run writes; it is not used")

    def _version(self) -> int:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > _SCHEMA:
            self._db.close()
            raise UserError(
                f"{self.path}: was written by a newer version of coterie (its schema is {version}, and this version knows up to "
                f"{_SCHEMA}); go on with that version"
            )
        return version

    def _migrate(self, version: int) -> None:
        """Bring a new database, or an older one, to what this version writes."""
        lacking = [line for table, made_of in _TABLES.items() for line in self._lacking(table, *made_of)]
        if lacking or version < _SCHEMA:
            with self.transaction(keep=False):
                for statement in lacking:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={_SCHEMA}")

    def _lacking(self, table: str, columns: str, key: str | None) -> list[str]:
        """The statements that make a table what it should be."""
        there = {name for _, name, *_ in self._db.execute(f"PRAGMA table_info({table})")}
        if not there:
            return [f"CREATE TABLE {table} ({columns}{f', PRIMARY KEY ({key})) WITHOUT ROWID' if key else ')'}"]
        missing = [column for column in columns.split(", ") if column.split()[0] not in there]
        return [f"ALTER TABLE {table} ADD COLUMN {column}" for column in missing]

    def close(self) -> None:
        self._db.close()

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
        self._held_since, self._into = running() - _PATIENCE, "held"
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
        self._held_since, self._into = None, "main"
        self.tell(f"{self.path} is free again after {seconds:.0f} s, and nothing is missing")

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        columns = _COLUMNS[table]
        marks = ", ".join("?" * len(columns.split(",")))
        insert = "INSERT OR REPLACE" if table in ("evaluations", "examples") else "INSERT"
        self._db.executemany(f"{insert} INTO {self._into}.{table} ({columns}) VALUES ({marks})", rows)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        rows = [(stage, step, name, value if math.isfinite(value) else None) for name, value in values.items()]
        with self.transaction():
            self._insert("metrics", rows)

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
            with self.transaction():
                self._insert("completions", rows)
        return left_out

    def evaluation(
        self, stage: str, step: int, mode: str, name: str, value: float, low: float, high: float, count: int
    ) -> None:
        with self.transaction():
            self._insert("evaluations", [(stage, step, mode, name, value, low, high, count)])

    def example(
        self, stage: str, step: int, number: int, prompt: str, text: str, reward: float | None, correct: bool | None
    ) -> None:
        with self.transaction():
            self._insert("examples", [(stage, step, number, prompt, text, reward, correct)])

    def event(self, stage: str, step: int, kind: str, message: str) -> None:
        with self.transaction():
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

    def inputs_before(self) -> tuple[dict[str, str], dict[str, str]]:
        """What was written by `inputs`: what the run depends on, and its surroundings."""
        inputs, surroundings = (
            {row["name"]: row["value"] for row in self.read(f"SELECT name, value FROM {table}")}
            for table in ("inputs", "surroundings")
        )
        return inputs, surroundings

    def num_steps(self, stage: str, last: int) -> int:
        """How many steps up to `last` have a metric."""
        query = "SELECT COUNT(DISTINCT step) AS number FROM metrics WHERE stage = ? AND step <= ?"
        return int(self.read(query, stage, last)[0]["number"])

    def num_skipped(self, stage: str, first: int, last: int) -> int:
        """In how many of these steps, ends included, a loss or gradient was not finite."""
        query = (
            "SELECT COUNT(DISTINCT step) AS number FROM metrics WHERE stage = ? AND name IN (?, ?) AND value > 0 "
            "AND step BETWEEN ? AND ?"
        )
        return int(self.read(query, stage, *SKIPPED, first, last)[0]["number"])

    def num_with_metric(self, stage: str, name: str, first: int, last: int) -> int:
        """How many of these steps, ends included, have a finite value of a metric."""
        query = "SELECT COUNT(value) AS number FROM metrics WHERE stage = ? AND name = ? AND step BETWEEN ? AND ?"
        return int(self.read(query, stage, name, first, last)[0]["number"])

    def metrics_of(self, stage: str, step: int) -> dict[str, float]:
        """The finite metrics of a step."""
        query = "SELECT name, value FROM metrics WHERE stage = ? AND step = ? AND value IS NOT NULL"
        return {row["name"]: row["value"] for row in self.read(query, stage, step)}

    def gradient_norms(self, stage: str, first: int, last: int) -> list[float]:
        """The gradient's norm in these steps, ends included, but for those in which no group had a signal."""
        query = (
            "SELECT norm.value FROM metrics AS norm LEFT JOIN metrics AS silent ON silent.stage = norm.stage AND silent.step = "
            "norm.step AND silent.name = 'group/no_signal_share' WHERE norm.stage = ? AND norm.name = 'optimiser/grad_norm' "
            "AND norm.step BETWEEN ? AND ? AND norm.value IS NOT NULL AND COALESCE(silent.value, 0) < 1"
        )
        return [value for (value,) in self.read(query, stage, first, last)]

    def best_steps(self, count: int) -> list[int]:
        """The steps on the way with the highest held-out accuracy, or reward where there is none."""
        for name in ("accuracy", "reward"):
            rows = self.read(
                "SELECT step FROM evaluations WHERE stage = 'train' AND mode IN ('sampled', 'pairs') AND name = ? AND step > 0 "
                "ORDER BY value DESC, step DESC LIMIT ?",
                *(name, count),
            )
            if rows:
                return [row["step"] for row in rows]
        return []

    def read(self, query: str, *values: Any) -> list[sqlite3.Row]:
        return self._db.execute(query, values).fetchall()


_HELD = "run.db has been held by another program for too long: end what reads or copies it"


def _token_columns(completion: Completion, pieces: list[str]) -> tuple[str, str, str]:
    logprobs = ", ".join(f"{value:.9g}" for value in completion.logprobs.tolist())  # 9 digits give float32 back exactly
    return json.dumps(completion.tokens), json.dumps(pieces, ensure_ascii=False), f"[{logprobs}]"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
