"""`run.db`: everything that is recorded of a run, in SQLite. One writer, any number of readers.

A step is written in one transaction, so a killed writer leaves whole steps only. Lists of numbers are stored as JSON.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.keys import hidden
from coterie.noise import permutation
from coterie.types import Completion, Scored

_SCHEMA = """
CREATE TABLE IF NOT EXISTS metrics (
    stage TEXT, step INTEGER, name TEXT, value REAL, PRIMARY KEY (stage, step, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS completions (
    stage TEXT, step INTEGER, prompt_number INTEGER, completion_number INTEGER, prompt TEXT, text TEXT,
    tokens TEXT, pieces TEXT, sampler_logprobs TEXT, advantage REAL, reward REAL, reward_parts TEXT, ended TEXT, failure TEXT,
    PRIMARY KEY (stage, step, prompt_number, completion_number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS evaluations (
    stage TEXT, step INTEGER, mode TEXT, name TEXT, value REAL, low REAL, high REAL, count INTEGER,
    PRIMARY KEY (stage, step, mode, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS examples (
    stage TEXT, step INTEGER, number INTEGER, prompt TEXT, text TEXT, PRIMARY KEY (stage, step, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS inputs (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (time REAL, stage TEXT, step INTEGER, kind TEXT, message TEXT);
"""
_PATIENCE = 30.0  # seconds for which another writer may hold the file: a person who looks at it, or a backup
_TABLES = ("metrics", "completions", "evaluations", "examples", "events")


class Store:
    """A connection to a run's database."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        if read_only:
            self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        else:
            self._db = sqlite3.connect(path, timeout=_PATIENCE)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        self._db.row_factory = sqlite3.Row

    def close(self) -> None:
        self._db.close()

    def sync(self) -> None:
        """Bring what was written to the disk, so that a checkpoint that outlives a power cut has its steps here."""
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what is written inside."""
        with self._db:
            yield

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        rows = [(stage, step, name, value if math.isfinite(value) else None) for name, value in values.items()]
        self._db.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", rows)

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
            self._db.executemany(f"INSERT INTO completions VALUES ({', '.join('?' * 14)})", rows)
        return left_out

    def evaluation(
        self, stage: str, step: int, mode: str, name: str, value: float, low: float, high: float, count: int
    ) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (stage, step, mode, name, value, low, high, count),
        )

    def example(self, stage: str, step: int, number: int, prompt: str, text: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO examples VALUES (?, ?, ?, ?, ?)", (stage, step, number, prompt, text))

    def event(self, stage: str, step: int, kind: str, message: str) -> None:
        with self._db:
            self._db.execute(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?)", (time.time(), stage, step, kind, hidden(message))
            )

    def inputs(self, values: Mapping[str, str]) -> None:
        """Replace what is known of what the run depends on."""
        with self._db:
            self._db.execute("DELETE FROM inputs")
            self._db.executemany("INSERT INTO inputs VALUES (?, ?)", list(values.items()))

    def truncate(self, stage: str, step: int, later_stages: tuple[str, ...]) -> None:
        """Remove what came after a step, in one transaction: a resume will write it again."""
        with self._db:
            for table in _TABLES:
                self._db.execute(f"DELETE FROM {table} WHERE stage = ? AND step > ?", (stage, step))
                for later in later_stages:
                    self._db.execute(f"DELETE FROM {table} WHERE stage = ?", (later,))

    def read(self, query: str, *values: Any) -> list[sqlite3.Row]:
        return self._db.execute(query, values).fetchall()


def _token_columns(completion: Completion, pieces: list[str]) -> tuple[str, str, str]:
    logprobs = ", ".join(f"{value:.9g}" for value in completion.logprobs.tolist())  # 9 digits give float32 back exactly
    return json.dumps(completion.tokens), json.dumps(pieces, ensure_ascii=False), f"[{logprobs}]"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
