"""A run's folder is made for one run, also where several start at once, and what keeps it from being written is said."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from coterie.errors import RunFailedError
from coterie.runs import held, store
from coterie.runs.folder import new_folder
from coterie.runs.writing import told_of


def test_runs_that_start_at_once_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: new_folder(tmp_path, "run"), range(40)))
    assert sorted(found) == sorted([tmp_path / "run", *(tmp_path / f"run-{n}" for n in range(2, 41))])
    assert all(folder.is_dir() for folder in found)


def test_a_database_that_is_locked_whole_is_said_to_be_held(tmp_path, monkeypatch):
    """As a shell of SQLite holds it with PRAGMA locking_mode=EXCLUSIVE."""
    monkeypatch.setattr(held, "_PATIENCE", 0.1)
    store.Store(tmp_path / "run.db").close()
    other = sqlite3.connect(tmp_path / "run.db", isolation_level=None)
    for statement in ("PRAGMA locking_mode=EXCLUSIVE", "BEGIN EXCLUSIVE", "DELETE FROM events", "COMMIT"):
        other.execute(statement)
    with (
        pytest.raises(RunFailedError, match=r"run\.db: is held by another program, which has to end"),
        told_of(tmp_path),
    ):
        store.Store(tmp_path / "run.db")
    other.close()
    with told_of(tmp_path):
        store.Store(tmp_path / "run.db").close()


def test_a_folder_that_is_gone_is_not_said_to_hold_checkpoints(tmp_path):
    stands = f"The newest checkpoint stands: coterie train --resume {tmp_path}$"
    with pytest.raises(RunFailedError, match=stands), told_of(tmp_path):
        raise OSError("no space left")
    with pytest.raises(RunFailedError, match=r"Its checkpoints are gone with it\.$"), told_of(tmp_path / "gone"):
        raise OSError("no space left")
