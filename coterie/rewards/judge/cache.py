"""Verdicts on disk, so that a question is paid for once, and a resumed run is told the same again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

_TABLE = "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT, checksum TEXT) WITHOUT ROWID"


def default_folder() -> Path:
    """In the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie" / "judge"


class Cache:
    """Keys and verdicts as text, in one SQLite file that several runs may share.

    It holds hashes and verdicts, no texts. What is damaged is as good as missing; where the file can't be used at all there is a
    warning, and every question is asked.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "verdicts.sqlite"
        self._db: sqlite3.Connection | None = None
        with self._done_without():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._db = _connection(self._path)
            except sqlite3.OperationalError:  # in use, or no place to write to
                raise
            except sqlite3.DatabaseError:  # damaged: it holds nothing that can't be asked again
                self._path.unlink()
                self._db = _connection(self._path)

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        """The verdicts that are there and whole."""
        found: dict[str, str] = {}
        if self._db is not None:
            with self._done_without():
                for key in keys:
                    row = self._db.execute("SELECT verdict, checksum FROM verdicts WHERE key = ?", (key,)).fetchone()
                    if row is not None and row[1] == _checksum(key, row[0]):
                        found[key] = row[0]
        return found

    def write(self, key: str, verdict: str) -> None:
        with self._done_without():
            if self._db is not None:
                row = (key, verdict, _checksum(key, verdict))
                self._db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", row)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    @contextlib.contextmanager
    def _done_without(self) -> Iterator[None]:
        """Where the file can't be used there is a warning, and it is closed."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            said = f"the judge's cache {self._path} can't be used: {error}; every question is asked"
            warnings.warn(said, stacklevel=4)
            db, self._db = self._db, None
            with contextlib.suppress(sqlite3.Error):
                if db is not None:
                    db.close()


def _connection(path: Path) -> sqlite3.Connection:
    """Each write is a transaction of its own, which the next power cut may take: it can be asked again."""
    db = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA synchronous = OFF")
        db.execute(_TABLE)
    except sqlite3.Error:
        db.close()
        raise
    return db


def _checksum(key: str, verdict: object) -> str:
    return hashlib.sha256(f"{key} {verdict}".encode()).hexdigest()[:16]
