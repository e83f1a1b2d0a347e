"""A run and its folder: where it stands, what is recorded of it, when it is saved, and how it is stopped."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie import stopping
from coterie.deadline import hard_deadline, running
from coterie.errors import UserError
from coterie.evals.evaluate import Evaluation, Example
from coterie.faults import at_step
from coterie.recipe import Recipe, load_recipe
from coterie.runs.checkpoint import (
    STAGES,
    Position,
    TrainState,
    load_checkpoint,
)
from coterie.runs.console import Console
from coterie.runs.find import run_at
from coterie.runs.folder import (
    Row,
    folder_for,
    locked,
    told_of,
    versions,
    write_whole,
    writing,
)
from coterie.runs.recorder import Recorder
from coterie.runs.resume import Beginning, find_beginning, take_over
from coterie.runs.resume_check import inputs_of, portable
from coterie.runs.saving import Checkpoints
from coterie.runs.store import Store
from coterie.runs.surroundings import surroundings
from coterie.sections import section
from coterie.training.profile import Profiler
from coterie.trust import check_links
from coterie.types import Scored

_HELD_AT_STOP = 10.0  # seconds for which a run that was told to stop waits for run.db, if another program holds it


class Run:
    """One run folder, locked to this process. Make it with `Run.create` or `Run.reopen`."""

    def __init__(self, folder: Path, recipe: Recipe, console: Console, *, stop_after: int | None = None) -> None:
        self.folder, self.recipe, self.console = folder, recipe, console
        check_links(folder)
        self._lock = locked(folder)
        self.store = Store(folder / "run.db")
        self.store.tell = console.warn
        self._recorder = Recorder(folder, self.store, recipe, console)
        self._checkpoints = Checkpoints(folder, self.store, console)
        self._begins_with: Beginning | None = None  # of a resume
        self._due = False  # a checkpoint
        self.profiler: Profiler | None = None  # watches some of the steps, if one is put here
        self.position: Position | None = None  # of the checkpoint that was resumed from
        self._stop = stopping.Stop()
        self.step = 0  # the one under way
        self._stop_after = stop_after
        self._stop_requested = False
        self._stops = False  # decided once a step, so that a run that stops has saved
        self._seconds_before = 0.0
        self._started = running()
        self._state: TrainState | None = None  # of the stage under way
        self._under_way: str | None = None  # the stage of the step under way

    @classmethod
    def create(cls, recipe: Recipe, name: str, out: str | None, console: Console, *, stop_after: int | None) -> Run:
        """A new folder: `out`, or the first free one of runs/NAME, runs/NAME-2, ..."""
        folder = folder_for(name, out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stored = recipe.model_copy(update={"made_with": {**(recipe.made_with or {}), **versions()}})
            run = cls(folder, recipe, console, stop_after=stop_after)
            run.store.inputs(inputs_of(recipe), surroundings(recipe, versions()))
            written = portable(stored, folder)
            write_whole(folder / "recipe.yaml", written)  # last: from here on it is a run to go on with
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{folder}: can't be written: {error}") from None
        return run

    @classmethod
    def reopen(
        cls, name: str, overrides: list[str], console: Console, *, stop_after: int | None, allow: Sequence[str] = ()
    ) -> Run:
        """An earlier run, at its newest whole checkpoint. What was recorded after it is removed.

        UserError where a setting but `steps`, or a file that the recipe names, has changed and is not in `allow`.
        """
        folder = run_at(name, "--resume")
        recipe = load_recipe(str(folder / "recipe.yaml"), overrides)
        with told_of(folder):
            run = cls(folder, recipe, console, stop_after=stop_after)
        try:
            with writing(folder):
                run._go_on(overrides, allow)
        except BaseException:
            run.close()
            raise
        return run

    def _go_on(self, overrides: list[str], allow: Sequence[str]) -> None:
        """Find where the run stands, and that it is still the same run. Nothing of it is changed yet."""
        self._begins_with = found = find_beginning(self.folder, self.recipe, self.store, self.console, overrides, allow)
        self.recipe = self._recorder.recipe = found.recipe
        self.position = found.position
        if found.position is not None:
            self._seconds_before, self._checkpoints.resumed_at = found.position.seconds, found.position.step

    def begin(self) -> None:
        """Take a reopened run over: what was recorded after its checkpoint is removed. Before, a resume can still be refused."""
        if self._begins_with is None:
            return
        with writing(self.folder):
            take_over(self.folder, self.store, self.console, self._begins_with)

    @property
    def seconds(self) -> float:
        """How long the run has taken, all sessions together, without what it was stopped for."""
        return self._seconds_before + running() - self._started

    @property
    def stop_signal(self) -> int | None:
        """The signal that stopped the run, if one did."""
        return self._stop.number

    @property
    def stopped(self) -> bool:
        """Whether the run was asked to stop before its end."""
        return self._stop_requested

    def remaining(self, stage: str, num_steps: int) -> Iterator[int]:
        """The steps of a stage that are not done yet, numbered from 1, until the run is asked to stop."""
        done = self.position.step if self.position and self.position.stage == stage else 0
        if self.profiler is not None:
            self.profiler.begin_stage(done + 1, self._last_step(stage, done + 1, num_steps))
        with self.console.progress(stage, done, num_steps):
            for step in range(done + 1, num_steps + 1):
                self.step = step
                stopping.allow(leaving=True)
                at_step(step)
                watched = self.profiler.step(stage, step) if self.profiler is not None else nullcontext()
                self._under_way = stage
                with hard_deadline(self.recipe.limits.step_seconds), watched:
                    yield step
                self._under_way = None
                stopping.allow(leaving=True)
                self.console.step_done(step)
                if self._stops:
                    self._stop_requested = step < num_steps or stage != STAGES[-1]
                    return

    def restore(self, stage: str, state: TrainState) -> None:
        """Put what the checkpoint holds in place, if the run was resumed inside this stage."""
        self._state = state
        if self.position and self.position.stage == stage and self.position.step > 0:  # step 0 is the start itself
            load_checkpoint(self.folder / "checkpoints" / self.position.name, state, checked=True)  # when it was found

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
        """Write a step, as `Recorder.record` does."""
        self._recorder.record(stage, step, metrics, scored, advantages, pieces, rows)

    def record_evaluation(
        self, stage: str, step: int, evaluation: Evaluation, examples: Sequence[Example] = ()
    ) -> None:
        """Write a held-out evaluation, as `Recorder.record_evaluation` does."""
        self._recorder.record_evaluation(stage, step, evaluation, examples)

    def checkpoint(self, stage: str, step: int, state: TrainState, *, last: bool = False) -> None:
        """Save if it is time to, at the end of a stage, and before a stop."""
        settings = self.recipe.checkpoint
        best = stage == STAGES[-1] and step in self.store.best_steps(settings.keep_best)
        self._stops = self._should_stop(stage, step)
        must = last or self._stops
        self._due = self._due or step % settings.every == 0 or best
        if must or (self._due and not self.store.held):  # a checkpoint waits for its record, and training does not
            self._due = False
            with section("checkpoint"):
                self._save(Position(stage, step, self.seconds), state)
                if last or self._stops:
                    self._checkpoints.wait()
        elif self._checkpoints.failed:  # told of now, not at the next save
            self._checkpoints.wait()

    def _save(self, position: Position, state: TrainState) -> None:
        patience = _HELD_AT_STOP if self.stop_signal is not None else None
        self._checkpoints.save(position, state, self.recipe.checkpoint, patience=patience)

    def _last_step(self, stage: str, first: int, num_steps: int) -> int:
        """The last step that this session takes of a stage, unless a signal stops it."""
        stop = self._stop_after if stage == STAGES[-1] else None
        return stop if stop is not None and first <= stop <= num_steps else num_steps

    def _should_stop(self, stage: str, step: int) -> bool:
        return self.stop_signal is not None or (stage == STAGES[-1] and step == self._stop_after)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let a signal end the run, with a checkpoint: the step under way is left if nothing has changed in it yet, and finished
        if something has. A second one ends the process at once."""

        def tell(number: int) -> None:
            self.console.say(f"{signal.Signals(number).name}: stopping and saving; again to end at once")

        with stopping.signals(tell) as self._stop:
            stopping.allow(leaving=True)
            try:
                yield
            except stopping.StepLeftError:
                self._save_before_step()

    def _save_before_step(self) -> None:
        """Save where the step that was left began, unless that is saved."""
        self._stop_requested = True
        # of step 0 what has to be is saved
        if self._under_way is not None and self._state is not None and self.step > 1:
            begun = Position(self._under_way, self.step - 1, self.seconds)
            if begun.name not in [position.name for position in (self._checkpoints.saved, self.position) if position]:
                self._save(begun, self._state)
        self._checkpoints.wait()
        self.say_how_to_resume()

    def say_how_to_resume(self) -> None:
        self.console.say(f"stopped and saved; go on exactly from here with: coterie train --resume {self.folder}")

    def close(self) -> None:
        """Let go of the folder, once what is being saved is saved."""
        try:
            self._checkpoints.wait()
        finally:
            self.store.close()
            self._lock.close()
