"""Those that hear of every step once it is recorded: signs of reward hacking, rewards that failed, alarms, streams that are lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from coterie.evals.statistics import Estimate
from coterie.recipe import GRPO, Recipe
from coterie.runs.alarms import Alarms
from coterie.runs.checkpoint import STAGES
from coterie.runs.notice import Listener, Notice, Recorded
from coterie.runs.outlet import troubles
from coterie.runs.signs import Watch
from coterie.runs.store import Store


class Listeners:
    """What is to be said of a run's steps and evaluations."""

    def __init__(self, folder: Path, store: Store, recipe: Recipe) -> None:
        self._store, self._recipe = store, recipe
        self._watch: Watch | None = None  # made when the first figures come: a resume cuts run.db back before
        self._told: set[str] = set()  # rewards that failed and streams that can't be written
        alarms = Alarms(
            folder, store, recipe, lambda metrics: self._watch is not None and self._watch.is_solved(metrics)
        )
        # in this order, since one that ends the run is the last that is heard
        self._listeners: list[Listener] = [
            self._signs, self._failures, alarms.silence, alarms.skipped, alarms.limits, self._troubles,
        ]  # fmt: skip

    def begin(self, stage: str) -> None:
        """Before anything of a stage is written: the watch for signs reads what there is."""
        if self._watch is None and self._watches(stage):
            punishes = isinstance(self._recipe, GRPO) and self._recipe.overlong.punishes
            punished = {"overlong": 1.0} if punishes else {}
            weights = {spec.name: spec.weight for spec in self._recipe.rewards} | punished
            self._watch = Watch.of(self._store, weights)

    def hear(self, step: Recorded) -> Iterator[Notice]:
        """What each has to say of a step, one after another. RunFailedError from one that ends the run."""
        for listener in self._listeners:
            yield from listener(step)

    def hear_accuracy(self, stage: str, step: int, accuracy: Estimate) -> Iterator[Notice]:
        """The signs that begin with a held-out accuracy."""
        if self._watch is not None and self._watches(stage):
            for sign in self._watch.add_accuracy(step, accuracy):
                yield sign.notice

    def _watches(self, stage: str) -> bool:
        """Whether signs of reward hacking are looked for: where completions are sampled and scored."""
        return stage == STAGES[-1] and self._recipe.samples

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
