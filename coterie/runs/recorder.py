"""What is recorded of a run: a step in one transaction, and what its figures say to those that listen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.evals.evaluate import Evaluation, Example
from coterie.recipe import GRPO, Recipe, Sampled
from coterie.runs.alarms import Alarms
from coterie.runs.checkpoint import STAGES
from coterie.runs.console import Console
from coterie.runs.notice import Listener, Notice, Recorded, Row
from coterie.runs.outlet import troubles
from coterie.runs.signs import Watch
from coterie.runs.store import Store
from coterie.runs.writing import writing
from coterie.sections import section
from coterie.types import Scored


class Recorder:
    """Writes a run's steps and evaluations into its `run.db`, and says what begins with them."""

    def __init__(self, folder: Path, store: Store, recipe: Recipe, console: Console) -> None:
        self._folder, self._store, self._recipe, self._console = folder, store, recipe, console
        self._watch: Watch | None = None  # made when the first figures come: a resume cuts run.db back before
        self._told: set[str] = set()  # rewards that failed and streams that can't be written
        alarms = Alarms(
            folder, store, recipe, lambda metrics: self._watch is not None and self._watch.is_solved(metrics)
        )
        # in this order, since one that ends the run is the last that is heard
        self._listeners: list[Listener] = [
            self._signs, self._failures, alarms.silence, alarms.skipped, alarms.limits, self._troubles,
        ]  # fmt: skip

    @section("record")
    def record(
        self,
        stage: str,
        step: int,
        metrics: Mapping[str, float],
        scored: Scored | None = None,
        advantages: Tensor | None = None,
        pieces: Any = None,
        rows: Sequence[Row] = (),
    ) -> None:
        """Write a step: its metrics and its completions, in one transaction. Then say what begins with it.

        rows: what it learned from, where that is no completions; they are kept if its loss is not finite.
        """
        self._begin_watch(stage)
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
            for listener in self._listeners:
                self._tell(stage, step, listener(recorded))

    @section("record")
    def record_evaluation(
        self, stage: str, step: int, evaluation: Evaluation, examples: Sequence[Example] = ()
    ) -> None:
        """Write a held-out evaluation and the answers to the task's examples, and say which signs begin with it."""
        self._begin_watch(stage)
        with writing(self._folder), self._store.transaction():
            for mode, estimates in evaluation.estimates.items():
                for name, e in estimates.items():
                    self._store.evaluation(stage, step, mode, name, e.value, e.low, e.high, e.count)
            for number, shown in enumerate(examples):
                self._store.example(stage, step, number, shown.prompt, shown.text, shown.reward, shown.correct)
        accuracy = evaluation.estimates.get("sampled", {}).get("accuracy")
        if self._watches(stage) and self._watch is not None and accuracy is not None:
            signs = self._watch.add_accuracy(step, accuracy)
            self._tell(stage, step, (sign.notice for sign in signs))

    def _tell(self, stage: str, step: int, notices: Iterable[Notice]) -> None:
        for notice in notices:
            self._store.event(stage, step, notice.kind, notice.text)
            if notice.shown:
                self._console.warn(f"step {step}: {notice.shown}")

    def _watches(self, stage: str) -> bool:
        """Whether signs of reward hacking are looked for: where completions are sampled and scored."""
        return stage == STAGES[-1] and self._recipe.samples

    def _begin_watch(self, stage: str) -> None:
        if self._watch is None and self._watches(stage):
            punishes = isinstance(self._recipe, GRPO) and self._recipe.overlong.punishes
            punished = {"overlong": 1.0} if punishes else {}
            weights = {spec.name: spec.weight for spec in self._recipe.rewards} | punished
            self._watch = Watch.of(self._store, weights)

    def _signs(self, step: Recorded) -> Iterator[Notice]:
        if self._watch is not None and self._watches(step.stage):
            for sign in self._watch.add(step.step, step.metrics):
                yield sign.notice

    def _failures(self, step: Recorded) -> Iterator[Notice]:
        """The first failures of a step; the first of each reward is shown."""
        for failure in step.scored.failures[:3] if step.scored else ():
            where = f"prompt {failure.group + 1}, completion {failure.completion + 1}"
            words = f"{failure.reward}, {where}: {failure.reason}"
            new = f"reward {failure.reward}" not in self._told
            self._told.add(f"reward {failure.reward}")
            yield Notice("reward_failure", words, f"a reward failed: {words}" if new else "")

    def _troubles(self, _: Recorded) -> Iterator[Notice]:
        """Once, which stream of the process can't be written any more."""
        for name, trouble in troubles().items():
            if name not in self._told:
                self._told.add(name)
                yield Notice("output_lost", f"{name}: {trouble}; the run goes on without it")
