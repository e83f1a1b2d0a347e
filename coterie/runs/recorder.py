"""What is recorded of a run: a step in one transaction, and what its figures say to those that listen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.evals.evaluate import Evaluation, Example
from coterie.recipe import Recipe, Sampled
from coterie.runs.console import Console
from coterie.runs.listeners import Listeners
from coterie.runs.notice import Notice, Recorded
from coterie.runs.store import Store
from coterie.runs.writing import writing
from coterie.sections import section
from coterie.tasks.base import Encoded
from coterie.types import Scored


class Recorder:
    """Writes a run's steps and evaluations into its `run.db`, and says what begins with them."""

    def __init__(self, folder: Path, store: Store, recipe: Recipe, console: Console) -> None:
        self._folder, self._store, self._recipe, self._console = folder, store, recipe, console
        self._listeners = Listeners(folder, store, recipe)

    @section("record")
    def record(
        self,
        stage: str,
        step: int,
        metrics: Mapping[str, float],
        scored: Scored | None = None,
        advantages: Tensor | None = None,
        pieces: Any = None,
        rows: Sequence[Encoded] = (),
    ) -> None:
        """Write a step: its metrics and its completions, in one transaction. Then say what begins with it.

        rows: what it learned from, where that is no completions; they are kept if its loss is not finite.
        """
        self._listeners.begin(stage)
        with writing(self._folder), self._store.transaction():
            self._store.metrics(stage, step, metrics)
            if scored is not None and advantages is not None:
                assert isinstance(self._recipe, Sampled)
                limit = self._recipe.record.max_megabytes_per_step * 1e6
                left_out = self._store.completions(stage, step, scored, advantages, pieces, max_bytes=limit)
                if left_out:
                    self._store.metrics(stage, step, {"record/num_left_out_groups": left_out})
        recorded = Recorded(stage, step, metrics, scored, rows, pieces)
        with writing(self._folder):
            self._tell(stage, step, self._listeners.hear(recorded))

    @section("record")
    def record_evaluation(
        self, stage: str, step: int, evaluation: Evaluation, examples: Sequence[Example] = ()
    ) -> None:
        """Write a held-out evaluation and the answers to the task's examples, and say which signs begin with it."""
        self._listeners.begin(stage)
        with writing(self._folder), self._store.transaction():
            for mode, estimates in evaluation.estimates.items():
                for name, e in estimates.items():
                    self._store.evaluation(stage, step, mode, name, e.value, e.low, e.high, e.count)
            for number, shown in enumerate(examples):
                self._store.example(stage, step, number, shown.prompt, shown.text, shown.reward, shown.correct)
        accuracy = evaluation.estimates.get("sampled", {}).get("accuracy")
        if accuracy is not None:
            self._tell(stage, step, self._listeners.hear_accuracy(stage, step, accuracy))

    def _tell(self, stage: str, step: int, notices: Iterable[Notice]) -> None:
        for notice in notices:
            self._store.event(stage, step, notice.kind, notice.text)
            if notice.shown:
                self._console.warn(f"step {step}: {notice.shown}")
