"""What is recorded of a run: a step in one transaction, and what its figures say to those that listen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.evals.evaluate import Evaluation, Example
from coterie.faults import strikes
from coterie.recipe import Recipe
from coterie.runs.alarms import watch_limits
from coterie.runs.checkpoint import STAGES
from coterie.runs.console import Console
from coterie.runs.folder import Row, RunFailedError, write_rows, writing
from coterie.runs.outlet import troubles
from coterie.runs.signs import SIGN, Accuracy, Sign, Watch
from coterie.runs.silence import watch_silence
from coterie.runs.store import SKIPPED, Store
from coterie.sections import section
from coterie.types import RewardFailure, Scored


class Recorder:
    """Writes a run's steps and evaluations into its `run.db`, and says what begins with them."""

    def __init__(self, folder: Path, store: Store, recipe: Recipe, console: Console) -> None:
        self.folder, self.store, self.recipe, self.console = folder, store, recipe, console
        self._watch: Watch | None = None  # made when the first figures come: a resume cuts run.db back before
        self._silent: set[str] = set()  # streams that can't be written and rewards that failed, once told of

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
        """Write a step: its metrics and its completions, in one transaction. Then say which signs begin with it.

        rows: what it learned from, where that is no completions; they are kept if its loss is not finite.
        """
        watch = self._watching(stage)
        with writing(self.folder), self.store.transaction():
            self.store.metrics(stage, step, metrics)
            strikes("in_record")
            if scored is not None and advantages is not None:
                limit = self.recipe.record.max_megabytes_per_step * 1e6
                left_out = self.store.completions(stage, step, scored, advantages, pieces, max_bytes=limit)
                if left_out:
                    self.store.metrics(stage, step, {"record/num_left_out_groups": left_out})
        with writing(self.folder):
            self._give(watch.add(step, metrics) if watch else [])
            self._tell_failures(stage, step, scored.failures if scored else ())
            watch_silence(self.store, self.console, self.recipe, stage, step, metrics)
            self._watch_skipped(stage, step, metrics, scored, rows, pieces)
            is_solved = watch.is_solved if watch else None
            watch_limits(self.store, self.console, self.recipe, stage, step, metrics, is_solved)
            self._tell_troubles(stage, step)

    def _tell_failures(self, stage: str, step: int, failures: Sequence[RewardFailure]) -> None:
        """Record the first failures of a step, and say the first of each reward."""
        for failure in failures[:3]:
            where = f"prompt {failure.group + 1}, completion {failure.completion + 1}"
            words = f"{failure.reward}, {where}: {failure.reason}"
            self.store.event(stage, step, "reward_failure", words)
            if f"reward {failure.reward}" not in self._silent:
                self.console.warn(f"step {step}: a reward failed: {words}")
                self._silent.add(f"reward {failure.reward}")

    def _tell_troubles(self, stage: str, step: int) -> None:
        """Record, once, which stream of the process can't be written any more."""
        for name, trouble in troubles().items():
            if name not in self._silent:
                self.store.event(stage, step, "output_lost", f"{name}: {trouble}; the run goes on without it")
                self._silent.add(name)

    def _watch_skipped(
        self,
        stage: str,
        step: int,
        metrics: Mapping[str, float],
        scored: Scored | None,
        rows: Sequence[Row],
        pieces: Any,
    ) -> None:
        """Keep the rows of a step whose loss was not finite; RunFailedError after too many of them in a row."""
        if not any(metrics.get(name) for name in SKIPPED):
            return
        file = write_rows(self.folder / "skipped" / f"{stage}_{step:06d}.jsonl", scored, rows, pieces)
        self.store.event(stage, step, "step_skipped", f"the loss or its gradient was not finite; its rows: {file}")
        self.console.warn(
            f"step {step}: the loss or its gradient was not finite, so the weights stay as they were; its rows: {file}"
        )
        limit = self.recipe.limits.skipped_steps
        if self.store.num_skipped(stage, step - limit + 1, step) == limit:  # of the sessions before, too
            raise RunFailedError(
                f"the loss or its gradient was not finite in {limit} steps in a row; the weights are as they were before. "
                "A lower optimiser.learning_rate may help"
            )

    @section("record")
    def record_evaluation(
        self, stage: str, step: int, evaluation: Evaluation, examples: Sequence[Example] = ()
    ) -> None:
        """Write a held-out evaluation and the answers to the task's examples, and say which signs begin with it."""
        watch = self._watching(stage)
        with writing(self.folder), self.store.transaction():
            for mode, estimates in evaluation.estimates.items():
                for name, e in estimates.items():
                    self.store.evaluation(stage, step, mode, name, e.value, e.low, e.high, e.count)
            for number, shown in enumerate(examples):
                self.store.example(stage, step, number, shown.prompt, shown.text, shown.reward, shown.correct)
        accuracy = evaluation.estimates.get("sampled", {}).get("accuracy")
        if watch and accuracy is not None:
            self._give(watch.add_accuracy(step, Accuracy(accuracy.value, accuracy.low, accuracy.high)))

    def _watching(self, stage: str) -> Watch | None:
        """What looks for signs of reward hacking, where completions are sampled and scored."""
        if stage != STAGES[-1] or not self.recipe.samples:
            return None
        if self._watch is None:
            punished = {"overlong": 1.0} if self.recipe.overlong.treatment == "punish" else {}
            weights = {spec.name: spec.weight for spec in self.recipe.rewards} | punished
            self._watch = Watch.of(self.store, weights)
        return self._watch

    def _give(self, signs: list[Sign]) -> None:
        """Record signs that begin, and say them once."""
        for sign in signs:
            self.store.event(STAGES[-1], sign.step, f"{SIGN}{sign.name}", sign.text)
            self.console.warn(f"step {sign.step}: {sign.name}: {sign.text}")
