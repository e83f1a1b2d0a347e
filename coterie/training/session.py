"""A session of a run: its steps until it is asked to stop, when it is saved, and what a signal does to it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from coterie import stopping
from coterie.deadline import hard_deadline, running
from coterie.runs.checkpoint import STAGES, Position, TrainState, load_checkpoint
from coterie.runs.folder import RunFolder
from coterie.runs.recorder import Recorder
from coterie.runs.saving import Checkpoints
from coterie.sections import section
from coterie.training.profile import Profiler

_HELD_AT_STOP = 10.0  # seconds for which a run that was told to stop waits for run.db, if another program holds it


class Session:
    """What trains a run from where it stands to its end, or until it is asked to stop.

    position: of the checkpoint that it goes on from; None for a new run. step: the one under way. stopped: whether it was asked to
    stop before its end. profiler: watches some of the steps, if there is one. recorder: what the loops give their steps to.
    """

    def __init__(self, home: RunFolder, *, stop_after: int | None = None, profiler: Profiler | None = None) -> None:
        self.folder, self.recipe, self.console, self.store = home.path, home.recipe, home.console, home.store
        self.recorder = Recorder(self.folder, self.store, self.recipe, self.console)
        self.profiler = profiler
        self.position: Position | None = home.beginning.position if home.beginning is not None else None
        self.step, self.stopped = 0, False
        self._home = home
        resumed_at = self.position.step if self.position is not None else 0
        self._checkpoints = Checkpoints(self.folder, self.store, self.console, resumed_at)
        self._due = False  # a checkpoint
        self._stop = stopping.Stop()
        self._stop_after = stop_after
        self._stops = False  # decided once a step, so that a run that stops has saved
        self._began = running() - (self.position.seconds if self.position is not None else 0.0)
        self._state: TrainState | None = None  # of the stage under way
        self._under_way: str | None = None  # the stage of the step under way

    @property
    def seconds(self) -> float:
        """How long the run has taken, all sessions together, without what it was stopped for."""
        return running() - self._began

    @property
    def stop_signal(self) -> int | None:
        """The signal that stopped the run, if one did."""
        return self._stop.number

    def remaining(self, stage: str, num_steps: int) -> Iterator[int]:
        """The steps of a stage that are not done yet, numbered from 1, until the run is asked to stop."""
        done = self.position.step if self.position and self.position.stage == stage else 0
        if self.profiler is not None:
            self.profiler.begin_stage(done + 1, self._last_step(stage, done + 1, num_steps))
        with self.console.progress(stage, done, num_steps):
            for step in range(done + 1, num_steps + 1):
                self.step = step
                self._stop.may_leave = True
                watched = self.profiler.step(stage, step) if self.profiler is not None else nullcontext()
                self._under_way = stage
                with hard_deadline(self.recipe.limits.step_seconds), watched:
                    yield step
                self._under_way = None
                self._stop.may_leave = True
                self.console.step_done(step)
                if self._stops:
                    self.stopped = step < num_steps or stage != STAGES[-1]
                    return

    def restore(self, stage: str, state: TrainState) -> None:
        """Put what the checkpoint holds in place, if the run was resumed inside this stage."""
        self._state = state
        if self.position and self.position.stage == stage and self.position.step > 0:  # step 0 is the start itself
            load_checkpoint(self.folder / "checkpoints" / self.position.name, state, checked=True)  # when it was found

    def checkpoint(self, stage: str, step: int, state: TrainState, *, last: bool = False) -> None:
        """Save if it is time to, at the end of a stage, and before a stop."""
        settings = self.recipe.checkpoint
        best = stage == STAGES[-1] and step in self.store.best_steps(settings.keep_best)
        self._stops = self.stop_signal is not None or (stage == STAGES[-1] and step == self._stop_after)
        must = last or self._stops
        self._due = self._due or step % settings.every == 0 or best
        if must or (self._due and not self.store.held):  # a checkpoint waits for its record, and training does not
            self._due = False
            with section("checkpoint"):
                self._save(Position(stage, step, self.seconds), state)
                if must:
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

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let a signal end the run, with a checkpoint: the step under way is left if nothing has changed in it yet, and finished
        if something has. A second one ends the process at once."""

        def tell(number: int) -> None:
            self.console.say(f"{signal.Signals(number).name}: stopping and saving; again to end at once")

        with stopping.signals(tell) as self._stop:
            try:
                yield
            except stopping.StepLeftError:
                self._save_before_step()

    def _save_before_step(self) -> None:
        """Save where the step that was left began, unless that is saved."""
        self.stopped = True
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
            self._home.close()
