"""What `run.db` holds of a run, read: every question that is asked of it. What is written stands in `store.py`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from coterie.errors import UserError
from coterie.evals.statistics import Estimate

SCHEMA = 3  # of the tables in `store.py`; a database of a later one is refused
SKIPPED = ("optimiser/skipped_share", "value/skipped_share")  # the metrics that say a step's loss was not finite


class Reader:
    """A connection to a run's database that only reads it. UserError for a database that a newer version has written.

    The database may be somebody else's, or an older run's: what a method returns may be of any type that SQLite knows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        self._refuse_programs()
        self._version()
        self._db.row_factory = sqlite3.Row

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def read(self, query: str, *values: Any) -> list[sqlite3.Row]:
        return self._db.execute(query, values).fetchall()

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
        if version > SCHEMA:
            self._db.close()
            raise UserError(
                f"{self.path}: was written by a newer version of coterie (its schema is {version}, and this version knows up to "
                f"{SCHEMA}); go on with that version"
            )
        return version

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

    def metrics_by_step(self) -> dict[int, dict[str, float | None]]:
        """Everything that was measured in training; None for what was not finite."""
        steps: dict[int, dict[str, float | None]] = {}
        for step, name, value in self.read("SELECT step, name, value FROM metrics WHERE stage = 'train'"):
            steps.setdefault(step, {})[name] = value
        return steps

    def metric_names(self) -> list[str]:
        """Of training, in order."""
        query = "SELECT DISTINCT name FROM metrics WHERE stage = 'train' ORDER BY name"
        return [row["name"] for row in self.read(query)]

    def series(self, name: str) -> tuple[list[int], list[float | None]]:
        """The steps in which a metric of training was measured, and its values."""
        rows = self.read("SELECT step, value FROM metrics WHERE stage = 'train' AND name = ? ORDER BY step", name)
        values = [None if row["value"] is None else float(row["value"]) for row in rows]
        return [int(row["step"]) for row in rows], values

    def evaluations(self) -> list[sqlite3.Row]:
        """Held-out figures of samples, or of pairs, in the order of the steps."""
        return self.read("SELECT * FROM evaluations WHERE mode IN ('sampled', 'pairs') ORDER BY step")

    def evaluations_after(self, step: int) -> list[sqlite3.Row]:
        """All held-out figures after a step."""
        return self.read("SELECT * FROM evaluations WHERE stage = 'train' AND step = ?", step)

    def accuracies(self) -> dict[int, Estimate]:
        """The held-out accuracy of samples, by step."""
        query = "SELECT step, value, low, high, count FROM evaluations WHERE stage = 'train' AND mode = 'sampled' AND name = 'accuracy'"
        return {step: Estimate(*figures) for step, *figures in self.read(query)}

    def held_out(self, first: int = 0) -> tuple[str, dict[int, float]]:
        """The name of what the best step is chosen by, and its values from step `first` on: accuracy, or reward where there is none."""
        query = (
            "SELECT step, value FROM evaluations WHERE stage = 'train' AND mode IN ('sampled', 'pairs') AND name = ? AND step >= ? "
            "AND value IS NOT NULL"
        )
        for name in ("accuracy", "reward"):
            values = {row["step"]: row["value"] for row in self.read(query, name, first)}
            if values:
                break
        return name, values

    def best_steps(self, count: int) -> list[int]:
        """The steps on the way with the highest held-out figure, the best first; of equals the last."""
        _, values = self.held_out(first=1)
        return sorted(values, key=lambda step: (values[step], step), reverse=True)[:count]

    def examples(self, step: int) -> list[dict[str, Any]]:
        """The answers to the task's examples before training and after a step."""
        query = (
            "SELECT a.prompt AS prompt, a.text AS before, a.reward AS before_reward, a.correct AS before_correct, "
            "b.text AS after, b.reward AS after_reward, b.correct AS after_correct FROM examples a JOIN examples b "
            "ON a.number = b.number AND a.stage = b.stage WHERE a.step = 0 AND b.step = ? ORDER BY a.number"
        )
        return [dict(row) for row in self.read(query, step)]

    def events(self, but: str, most: int) -> list[sqlite3.Row]:
        """Stage, step, kind and message of the first events, those left out whose kind begins with `but`."""
        query = "SELECT stage, step, kind, message FROM events WHERE kind NOT LIKE ? ORDER BY time LIMIT ?"
        return self.read(query, f"{but}%", most)

    def events_of(self, kind: str) -> list[sqlite3.Row]:
        """Step, kind and message of the events whose kind begins so, in the order of the steps."""
        return self.read("SELECT step, kind, message FROM events WHERE kind LIKE ? ORDER BY step, time", f"{kind}%")

    def steps_with_completions(self) -> list[int]:
        """Each is looked up by key after the one before, since all completions may be gigabytes."""
        query = (
            "WITH RECURSIVE steps(step) AS (SELECT MIN(step) FROM completions WHERE stage = 'train' UNION ALL SELECT (SELECT "
            "MIN(step) FROM completions WHERE stage = 'train' AND step > steps.step) FROM steps WHERE steps.step IS NOT NULL) "
            "SELECT step FROM steps WHERE step IS NOT NULL"
        )
        return [row["step"] for row in self.read(query)]

    def tells_apart(self, step: int) -> bool:
        """Whether the completions of a group of this step differ in reward."""
        query = (
            "SELECT 1 FROM completions WHERE stage = 'train' AND step = ? GROUP BY prompt_number "
            "HAVING MAX(reward) > MIN(reward) LIMIT 1"
        )
        return bool(self.read(query, step))

    def groups(self, step: int, most: int) -> Iterator[list[sqlite3.Row]]:
        """The completions of those groups of a step that differ most in reward, the best first."""
        query = (
            "SELECT prompt_number, MAX(reward) - MIN(reward) AS spread FROM completions WHERE stage = 'train' AND "
            "step = ? GROUP BY prompt_number ORDER BY COALESCE(spread, 0) DESC, prompt_number LIMIT ?"
        )
        of_prompt = (
            "SELECT * FROM completions WHERE stage = 'train' AND step = ? AND prompt_number = ? "
            "ORDER BY reward DESC, completion_number"
        )
        return (self.read(of_prompt, step, row["prompt_number"]) for row in self.read(query, step, most))

    def completions_of_training(self) -> Iterator[tuple[int, int, str, str, list[int]]]:
        """Step, number and text of the prompt, text and tokens of every completion."""
        query = (
            "SELECT step, prompt_number, prompt, text, tokens FROM completions WHERE stage = 'train' "
            "ORDER BY step, prompt_number, completion_number"
        )
        return (
            (step, number, prompt, text, json.loads(tokens)) for step, number, prompt, text, tokens in self.read(query)
        )
