"""Verdicts on disk, so that a question is paid for once, and a resumed run is told the same again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import warnings
from collections.abc import Iterable
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = self._opened()
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def _opened(self) -> sqlite3.Connection:
        try:
            return _connection(self._path)
        except sqlite3.OperationalError:  # in use, or no place to write to
            raise
        except sqlite3.DatabaseError:  # damaged: it holds nothing that can't be asked again
            self._path.unlink()
            return _connection(self._path)

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        """The verdicts that are there and whole."""
        found: dict[str, str] = {}
        if self._db is None:
            return found
        try:
            for key in keys:
                row = self._db.execute("SELECT verdict, checksum FROM verdicts WHERE key = ?", (key,)).fetchone()
                if row is not None and row[1] == _checksum(key, row[0]):
                    found[key] = row[0]
        except sqlite3.Error as error:
            self._give_up(error)
        return found

    def write(self, key: str, verdict: str) -> None:
        if self._db is None:
            return
        try:
            row = (key, verdict, _checksum(key, verdict))
            self._db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", row)
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _give_up(self, error: Exception) -> None:
        warnings.warn(f"the judge's cache {self._path} can't be used: {error}; every question is asked", stacklevel=3)
        with contextlib.suppress(sqlite3.Error):
            self.close()
        self._db = None


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
