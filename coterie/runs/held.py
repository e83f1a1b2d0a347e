"""A database that is written although another program may hold it: what is written meanwhile is kept in memory."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from coterie.deadline import running
from coterie.runs.reader import Reader

_PATIENCE = 5.0  # seconds for which another program may hold the file before what is written is kept in memory
_RETRY = 0.5  # seconds between two tries from then on
_HELD_SECONDS, _HELD_BYTES = 900.0, 1 << 28  # how long, and how much is kept so
_TOO_LONG = "run.db has been held by another program for too long: end what reads or copies it"


class PatientWriter(Reader):
    """A connection that writes a database, and reads it, whoever else does.

    Where another program holds the file (a person who looks at it, a backup) what is written is kept in memory, read from there
    too, and brought into the file once that is free. `tell` is called with a sentence when that begins and ends.
    columns: of the tables that are written so, by table, their names as a list in SQL.
    """

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self.path = path
        self.tell: Callable[[str], None] = lambda _: None
        self._columns = columns
        self._held_since: float | None = None
        self._tried = 0.0
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute(f"PRAGMA busy_timeout={_PATIENCE * 1000:.0f}")
        self._refuse_programs()
        self._version()
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.row_factory = sqlite3.Row

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
                raise sqlite3.OperationalError(_TOO_LONG)
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
                raise sqlite3.OperationalError(_TOO_LONG)
            return
        self.tell(f"{self.path} is held by another program; what is recorded is kept in memory until it lets go")
        self._held_since = running() - _PATIENCE
        if not any(name == "held" for _, name, _ in self._db.execute("PRAGMA database_list")):
            self._db.execute("ATTACH ':memory:' AS held")
        for table, columns in self._columns.items() if self._tables() else ():
            self._db.execute(f"CREATE TABLE IF NOT EXISTS held.{table} AS SELECT {columns} FROM main.{table} WHERE 0")
            both = f"SELECT {columns} FROM main.{table} UNION ALL SELECT {columns} FROM held.{table}"
            self._db.execute(f"CREATE TEMP VIEW {table} AS {both}")

    def _tables(self) -> bool:
        return bool(self._db.execute("SELECT 1 FROM main.sqlite_master WHERE name = 'metrics'").fetchall())

    def _bring(self) -> None:
        """Into the file with what was kept, in the transaction that has begun."""
        assert self._held_since is not None
        for table, columns in self._columns.items() if self._tables() else ():
            self._db.execute(f"DROP VIEW temp.{table}")
            self._db.execute(f"INSERT OR REPLACE INTO main.{table} ({columns}) SELECT {columns} FROM held.{table}")
            self._db.execute(f"DELETE FROM held.{table}")
        seconds = running() - self._held_since
        self._held_since = None
        self.tell(f"{self.path} is free again after {seconds:.0f} s, and nothing is missing")
