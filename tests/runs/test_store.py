"""run.db: held by others, it is kept in memory; groups over the limit are counted."""

import sqlite3
import time

import pytest

from coterie.runs import held as module
from coterie.runs.store import Store


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    monkeypatch.setattr(module, "_RETRY", 0.05)


@pytest.fixture
def held(tmp_path, impatient):
    """A database with a step in it, and another connection that holds it."""
    store = Store(tmp_path / "run.db")
    store.metrics("train", 1, {"a": 1.0})
    other = sqlite3.connect(tmp_path / "run.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    said = []
    store.tell = said.append
    yield store, other, said
    other.close()
    store.close()


def in_file(store):
    with sqlite3.connect(store.path) as db:
        return db.execute("SELECT step, name, value FROM metrics ORDER BY step").fetchall()


def test_what_is_written_meanwhile_is_read_and_then_in_the_file(held):
    store, other, said = held
    for step in (2, 3, 4):
        with store.transaction():
            store.metrics("train", step, {"a": float(step)})
            store.evaluation("train", step, "sampled", "accuracy", 0.5, 0.4, 0.6, 10)
        store.event("train", step, "kind", f"message {step}")
    assert store.held
    assert len(said) == 1
    assert in_file(store) == [(1, "a", 1.0)]
    assert [tuple(row) for row in store.read("SELECT step, value FROM metrics WHERE step < 4 ORDER BY step DESC")] == [
        (3, 3.0), (2, 2.0), (1, 1.0),
    ]  # fmt: skip
    other.execute("ROLLBACK")
    store.settle()
    assert not store.held
    assert "nothing is missing" in said[1]
    assert in_file(store) == [(step, "a", float(step)) for step in (1, 2, 3, 4)]
    assert [row["message"] for row in store.read("SELECT message FROM events ORDER BY step")] == [
        "message 2", "message 3", "message 4",
    ]  # fmt: skip
    assert len(store.read("SELECT * FROM evaluations")) == 3


def test_it_may_be_held_again_and_again(held):
    store, other, said = held
    for step in (2, 3):
        store.metrics("train", step, {"a": 0.0})
        assert store.held
        other.execute("ROLLBACK")
        store.settle()
        other.execute("BEGIN IMMEDIATE")
    other.execute("ROLLBACK")
    assert [step for step, _, _ in in_file(store)] == [1, 2, 3]
    assert len(said) == 4


def test_a_failed_transaction_leaves_nothing_in_memory_either(held):
    store, _, _ = held

    def fail():
        with store.transaction():
            store.metrics("train", 2, {"a": 2.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [row["step"] for row in store.read("SELECT step FROM metrics")] == [1]


@pytest.mark.timed
def test_it_costs_a_step_no_time(held):
    store, _, _ = held
    store.metrics("train", 2, {"a": 2.0})
    began = time.monotonic()
    for step in range(3, 103):
        store.metrics("train", step, {"a": 2.0})
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("limit", ["_HELD_SECONDS", "_HELD_BYTES"])
def test_there_is_an_end_to_it(held, monkeypatch, limit):
    store, _, _ = held
    monkeypatch.setattr(module, limit, 0.2 if "SECONDS" in limit else 40_000)

    def record():
        for step in range(2, 1000):
            store.event("train", step, "kind", "x" * 1000)
            time.sleep(0.001)

    with pytest.raises(sqlite3.OperationalError, match="held by another program for too long"):
        record()
    with pytest.raises(sqlite3.OperationalError, match="for too long"):
        store.settle(0.1)


@pytest.mark.parametrize(
    "harm",
    [
        "ALTER TABLE completions DROP COLUMN failure",
        "ALTER TABLE examples DROP COLUMN correct",
        "DROP TABLE surroundings",
        "DROP TABLE events",
        "PRAGMA user_version=0",
        "PRAGMA user_version=1",
    ],
)
def test_what_a_database_lacks_is_added_and_what_it_has_is_left(tmp_path, harm):
    """Whatever its number says: versions between two releases had the one without the other."""
    store = Store(tmp_path / "run.db")
    store.metrics("train", 1, {"a": 1.0})
    made = store.read("SELECT name, sql FROM sqlite_schema ORDER BY name")
    store.close()
    with sqlite3.connect(tmp_path / "run.db") as db:
        db.execute(harm)
    store = Store(tmp_path / "run.db")
    store.example("train", 1, 0, "prompt", "text", 1.0, True)
    store.event("train", 1, "kind", "message")
    store.inputs({"a": "1"}, {"b": "2"})
    assert [row["value"] for row in store.read("SELECT value FROM metrics")] == [1.0]
    assert [row["name"] for row in store.read("SELECT name FROM sqlite_schema ORDER BY name")] == [
        row["name"] for row in made
    ]
    assert store.read("SELECT failure FROM completions") == []
    assert [row["correct"] for row in store.read("SELECT correct FROM examples")] == [1]
    store.close()


@pytest.mark.timed
def test_a_store_that_lacks_nothing_is_opened_without_a_write(tmp_path):
    """A resume that is refused changes nothing, and one waits for nobody who only holds the file."""
    Store(tmp_path / "run.db").close()
    other = sqlite3.connect(tmp_path / "run.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    Store(tmp_path / "run.db").close()
    assert time.monotonic() - began < 2
    other.close()
